"""Which sizes a step trains: joint, sandwich and layerwise steps, and updates of a slice alone."""

import json

import helpers
from helpers import run_program, train_args
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import MODEL, make_trainer

from matformer_jax import UserError, sharding
from matformer_jax import granularity as gran
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.models import matlm, slicing
from matformer_jax.training import methods
from matformer_jax.training.trainer import StepKind

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
SGD = {
  "optim.name": "sgd",
  "optim.momentum": 0.0,
  "optim.clip_norm": 0.0,
  "optim.weight_decay": 0.0,
  "optim.schedule": "constant",
  "optim.warmup_steps": 0,
  "optim.peak_lr": 0.5,
}


def size_loss(params, tokens, granularity):
  """Mean cross-entropy of a size, z-loss of the stub task included; written out again."""
  sub_config = gran.submodel_config(MODEL, granularity)
  return dense_loss(slicing.slice_params(params, MODEL, granularity), tokens, sub_config)


def dense_loss(params, tokens, config):
  """The same of a model of its own."""
  logits = matlm.MatLM(config, Execution()).apply({"params": params}, tokens[:, :-1])
  log_z = jax.nn.logsumexp(logits, -1)
  nll = log_z - jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
  return jnp.mean(nll) + 1e-4 * jnp.mean(log_z**2), jnp.mean(nll)


def one_step(trainer, index=0, told=()):
  """(parameters before, after, metrics) of step 1 of a kind."""
  state = trainer.init(0)
  before = jax.device_get(state.params)
  program = trainer.lower(trainer.kinds[index]).compile()
  state, out = program(state, trainer.batch(0), *told)
  return before, jax.device_get(state), jax.device_get(out)


def assert_close(have, want, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), have, want)


@pytest.mark.parametrize("method", ["joint", "sandwich"])
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_step_of_several_sizes_is_the_mean_of_theirs(method, grad_accum):
  """SGD: the step is the mean gradient of sizes, each on its rows, computed one by one."""
  changes = {"method": method, "grad_accum": grad_accum, "batch_size": 24, **SGD}
  if method == "joint":
    changes["batch_size"] = 16
  trainer = make_trainer(**changes)
  rng = np.random.default_rng(5)
  tokens = rng.integers(0, 96, (changes["batch_size"], 17)).astype(np.int32)
  trainer.task.batch = lambda step, rows: tokens[rows]
  before, after, out = one_step(trainer, len(trainer.kinds) - 1)
  sizes = trainer.kinds[-1].granularities
  assert len(sizes) == (4 if method == "joint" else 3)
  total, losses = None, []
  for i, g in enumerate(sizes):
    part = tokens[i :: len(sizes)]
    grads, nll = jax.grad(size_loss, has_aux=True)(before, part, g)
    losses.append(nll)
    total = grads if total is None else jax.tree.map(jnp.add, total, grads)
  np.testing.assert_allclose(out["losses"], losses, rtol=1e-5)
  np.testing.assert_allclose(out["loss"], np.mean(losses), rtol=1e-5)
  want = jax.tree.map(lambda p, g: p - 0.5 * g / len(sizes), before, total)
  assert_close(after.params, want, atol=2e-6)


def test_several_sizes_learn_from_the_largest():
  """Sandwich and distillation: the mean of S's and M's distilled steps and of XL's own."""
  distilled = {"distill.teacher": "self", "distill.weight": 0.5, **SGD}
  tokens = np.random.default_rng(5).integers(0, 96, (24, 17)).astype(np.int32)
  trainer = make_trainer(method="sandwich", batch_size=24, **distilled)
  trainer.task.batch = lambda step, rows: tokens[rows]
  before, after, out = one_step(trainer)
  steps, kls = [], []
  for i, g in enumerate(trainer.kinds[0].granularities):
    one = make_trainer(batch_size=8, **distilled)
    one.task.batch = lambda step, rows, i=i: tokens[i::3][rows]
    state, measured = one.lower(g).compile()(one.init(0), one.batch(0))
    steps.append(jax.tree.map(jnp.subtract, before, state.params))
    kls += [measured["kl"]] if "kl" in measured else []
  assert len(kls) == 2
  np.testing.assert_allclose(out["kl"], np.mean(kls), rtol=1e-4)
  want = jax.tree.map(lambda p, *moves: p - sum(moves) / 3, before, *steps)
  assert_close(after.params, want, atol=2e-6)


@pytest.mark.parametrize("method", ["joint", "layerwise"])
def test_a_mesh_changes_nothing(method):
  """The same step on 8 devices: data, fsdp and tensor parallel."""
  changes = {"method": method, "batch_size": 16, **SGD}
  told = (np.array([3, 0], np.int32),) if method == "layerwise" else ()
  one, eight = (one_step(make_trainer(mesh, **changes), 0, told) for mesh in (None, MESH))
  np.testing.assert_allclose(eight[2]["loss"], one[2]["loss"], rtol=1e-5)
  assert_close(eight[1].params, one[1].params, atol=2e-6)


def test_a_layerwise_step_is_that_of_the_mix():
  trainer = make_trainer(method="layerwise", **SGD)
  program = trainer.lower(trainer.kinds[0]).compile()
  sampled = make_trainer(**SGD)
  for mix in ((1, 3), (0, 2)):
    have, out = program(trainer.init(0), trainer.batch(0), np.array(mix, np.int32))
    static = sampled.lower(gran.parse(mix, MODEL)).compile()
    want, reference = static(sampled.init(0), sampled.batch(0))
    np.testing.assert_allclose(out["loss"], reference["loss"], rtol=1e-5)
    assert_close(have.params, want.params, atol=2e-6)


def test_layers_are_drawn_apart_and_by_their_probabilities():
  p = (0.1, 0.2, 0.3, 0.4)
  draws = np.stack([gran.sample_layers(7, step, p, 8) for step in range(2000)])
  assert draws.shape == (2000, 8) and draws.dtype == np.int32
  for layer in range(8):  # 5 standard errors of the rarest
    counts = np.bincount(draws[:, layer], minlength=4) / 2000
    np.testing.assert_allclose(counts, p, atol=5 * np.sqrt(0.25 / 2000))
  off_diagonal = np.corrcoef(draws.T)[~np.eye(8, dtype=bool)]
  assert np.abs(off_diagonal).max() < 5 / np.sqrt(2000)
  np.testing.assert_array_equal(draws[11], gran.sample_layers(7, 11, p, 8))
  assert set(gran.sample_layers(0, 1, (0, 1, 0, 0), 8)) == {1}


def test_joint_steps_hold_activations_of_one_size():
  """DynaBERT's step on a batch g times as large needs about the memory of XL on its share."""
  config = MatLMConfig(vocab_size=96, num_layers=8, d_model=32, num_heads=4, seq_len=64)

  def temporaries(rows, kind):
    trainer = make_trainer(model_config=config, batch_size=rows)
    trainer.task.batch_shapes = lambda _: jax.ShapeDtypeStruct((rows, 65), jnp.int32)
    return trainer.lower(kind).compile().memory_analysis().temp_size_in_bytes

  sizes = tuple(gran.trained(config))
  alone = temporaries(64, StepKind("XL", sizes[-1:], 1.0))
  joint = temporaries(256, StepKind("joint", sizes, 1.0))
  assert joint < 1.25 * alone


# -------------------------------------------------------------- sliced updates


@pytest.mark.parametrize("mesh", [None, MESH], ids=["one device", "mesh"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_sliced_update_leaves_the_rest_alone(optimizer, mesh):
  """XL first, so that every moment is alive; then S, which must not touch what S lacks."""
  changes = {"optim.name": optimizer, "optim.weight_decay": 0.3}
  trainer = make_trainer(mesh, **changes, **{"optim.scope": "sliced"})
  small, large = trainer.granularities[0], trainer.granularities[-1]
  step = {g: trainer.lower(g).compile() for g in (small, large)}
  state, _ = step[large](trainer.init(0), trainer.batch(0))
  before = jax.device_get(state)
  after = jax.device_get(step[small](state, trainer.batch(1))[0])
  width = MODEL.ffn_widths[0] // MODEL.ffn_groups
  moved = 0
  for (path, old), new in zip(
    jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
  ):
    names = sharding.path_names(path)
    if names[-2:] in (("ffn", "in"), ("ffn", "out")):
      np.testing.assert_array_equal(old[:, :, width:], new[:, :, width:])
      assert not np.array_equal(old[:, :, :width], new[:, :, :width])
      moved += 1
  assert moved >= 4  # parameters and at least one moment, of both matrices
  # By default they decay, and momentum moves them.
  full = make_trainer(mesh, **changes)
  state, _ = full.lower(large).compile()(full.init(0), full.batch(0))
  before = jax.device_get(state.params)
  after = jax.device_get(full.lower(small).compile()(state, full.batch(1))[0].params)
  rest = lambda p: p["blocks"]["0"]["ffn"]["in"][:, :, width:]
  assert not np.array_equal(rest(before), rest(after))


def test_a_sliced_update_is_the_small_models_own():
  """Steps of S alone: what AdamW makes of S as a dense model, by optax, with this schedule."""
  trainer = make_trainer(**{"optim.scope": "sliced", "optim.weight_decay": 0.3})
  small = trainer.granularities[0]
  program = trainer.lower(small).compile()
  state = trainer.init(0)
  params = slicing.slice_params(jax.device_get(state.params), MODEL, small)
  dense = gran.submodel_config(MODEL, small)
  optimizer = trainer.optimizer
  moments = optimizer.init(params)
  grad = jax.jit(jax.grad(lambda p, t: dense_loss(p, t, dense)[0]))
  for step in range(3):
    batch = trainer.batch(step)
    state, _ = program(state, batch)
    updates, moments = optimizer.update(grad(params, np.asarray(batch)), moments, params)
    params = optax.apply_updates(params, updates)
  have = slicing.slice_params(jax.device_get(state.params), MODEL, small)
  assert_close(have, params, atol=1e-4)


# ------------------------------------------------------------- kinds and budgets


def kinds(**changes):
  config = helpers.get_config("tiny")
  config.update_from_flattened_dict(changes)
  return methods.step_kinds(config, MODEL)


def test_kinds_of_steps():
  assert [k.name for k in kinds()] == ["S", "M", "L", "XL"]
  (joint,) = kinds(method="joint")
  assert joint.name == "S,M,L,XL" and joint.probability == 1
  sandwich = kinds(method="sandwich", sampling="0.1/0.2/0.6/0.1")
  assert [(k.name, k.probability) for k in sandwich] == [
    ("S,M,XL", pytest.approx(0.25)),
    ("S,L,XL", pytest.approx(0.75)),
  ]
  (layerwise,) = kinds(method="layerwise")
  assert layerwise.layerwise and layerwise.probability == 1


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"method": "jont"}, "method='jont' is unknown; did you mean 'joint'"),
    ({"method": "sandwich", "sampling": "0.5/0/0/0.5"}, "draws one of M,L"),
    ({"optim.scope": "slice"}, "optim.scope='slice' is unknown"),
    ({"optim.scope": "sliced", "method": "joint"}, "needs steps of one size"),
    ({"optim.scope": "sliced", "optim.name": "adafactor"}, "cannot be of Adafactor"),
  ],
)
def test_mistakes(changes, words):
  with pytest.raises(UserError, match=words):
    kinds(**changes)


def test_vision_has_no_layerwise_steps():
  config = helpers.get_config("digits", "matvit")
  config.method = "layerwise"
  from matformer_jax.config import model_config

  with pytest.raises(UserError, match="needs a language model"):
    methods.step_kinds(config, model_config(config))


def test_four_sizes_cost_what_the_paper_counts():
  """Appendix E.1: 2.58 times the FLOPs per token of XL alone, embeddings and attention's
  products of activations aside, where each size sees as many tokens as XL alone."""
  model = MatLMConfig.from_dict(helpers.get_config("850M").model)
  cost = lambda g: gran.count(model, g).non_embedding_params
  sizes, quarter = gran.trained(model), (0.25,) * 4
  xl = cost(sizes[-1])
  config = helpers.get_config("850M")
  for method in ("sampled", "joint", "layerwise"):
    config.method = method
    found = methods.step_kinds(config, model)
    mean = sum(k.probability * methods.mean_cost(k, sizes, quarter, cost) for k in found)
    assert 4 * mean / xl == pytest.approx(2.58, abs=0.01)


# ----------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", ["joint", "layerwise"])
def test_a_run_is_logged_evaluated_and_resumed(method, tmp_path):
  """Stopped after step 20 and resumed: the losses of 40 steps in one go, bit for bit."""
  changes = dict(method=method, batch_size=16, log_every=5, **helpers.TWO_WIDTHS)
  straight, halved = tmp_path / "straight", tmp_path / "halved"
  result = run_program("train", *train_args(straight, **changes))
  assert result.returncode == 0, result.stderr
  assert f"budget: {method}, 40 steps" in result.stdout
  rows = read(straight / "metrics.jsonl")
  assert len(rows) == 40 and rows[-1]["loss"] < rows[0]["loss"] - 0.3
  if method == "joint":
    assert {row["granularity"] for row in rows} == {"G1,G2"} and "  G1 " in result.stdout
    assert all(row["loss"] == pytest.approx(sum(row["losses"].values()) / 2) for row in rows)
  else:
    assert {row["granularity"] for row in rows} == {"layerwise"} and "losses" not in rows[0]
    assert len({row["draw_hash"] for row in rows}) == 40
  stopped = helpers.train_until_signal(20, 15, *train_args(halved, **changes))
  assert stopped.returncode == 143, stopped.stderr
  assert run_program("train", *train_args(halved, **changes)).returncode == 0
  again = read(halved / "metrics.jsonl")
  assert [row["loss"] for row in again] == [row["loss"] for row in rows]
  other = run_program("train", *train_args(halved, **changes | dict(method="sampled")))
  assert other.returncode == 1 and "method" in other.stderr


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]
