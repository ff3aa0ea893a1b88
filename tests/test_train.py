"""The train step and loop, in process: what one update does and does not change."""

import collections
import dataclasses
import json
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matformer_jax import UserError, sharding, storage
from matformer_jax import granularity as gran
from matformer_jax import train as train_program
from matformer_jax.config import MatLMConfig
from matformer_jax.hosts import goodput
from matformer_jax.hosts.multihost import Hosts
from matformer_jax.hosts.watchdog import Watchdog
from matformer_jax.models import loss_kernel, matlm
from matformer_jax.planning import estimate
from matformer_jax.tasks.language import NextToken
from matformer_jax.tpu import chips, hlo
from matformer_jax.training import metrics, optim
from matformer_jax.training.loop import Loop, StepProfile
from matformer_jax.training.trainer import Trainer, TrainState

MODEL = MatLMConfig(
  vocab_size=96, num_layers=2, d_model=32, num_heads=4, seq_len=16, ffn_groups=4, head_groups=2
)


class StubTask(NextToken):
  """Next-token prediction on random tokens."""

  def __init__(self, model_config=MODEL):
    super().__init__(model_config, 16, z_loss=1e-4)

  def batch(self, step, rows):
    return np.random.default_rng(step).integers(0, 96, (16, 17)).astype(np.int32)[rows]


def make_trainer(mesh=None, model_config=MODEL, **changes) -> Trainer:
  config = helpers.get_config("tiny")
  config.batch_size = 16
  config.update_from_flattened_dict(changes)
  if mesh is None:
    mesh = sharding.make_mesh({}, jax.devices()[:1])
  else:
    mesh = sharding.make_mesh(mesh)
  return Trainer(StubTask(model_config), config, mesh)


def run(trainer, steps=6):
  """Losses and final state of a few steps, XL and S in turn."""
  programs = {}
  state, losses = trainer.init(0), []
  for step in range(1, steps + 1):
    i = 3 * (step % 2)
    if i not in programs:
      programs[i] = trainer.lower(trainer.granularities[i]).compile()
    state, out = programs[i](state, trainer.batch(step))
    losses.append(float(out["loss"]))
  return losses, state


@pytest.fixture(scope="module")
def single_device():
  return run(make_trainer())


def assert_same_parameters(a, b):
  """Equal but for rounding, which Adam turns into up to some 1e-4 where a gradient is near
  zero; one step moves a parameter by up to 1e-2, so a wrong gradient shows."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-3, atol=5e-4),
    a.params,
    b.params,
  )


# ------------------------------------------------------------------ sharding


@pytest.mark.parametrize(
  "mesh",
  [
    dict(fsdp=8),
    dict(data=2, fsdp=2, tensor=2),
    dict(data=8),
    dict(slices=2, fsdp=2, tensor=2),
    dict(slices=2, data=2, fsdp=2),
  ],
)
def test_meshes_agree(single_device, mesh):
  losses, state = run(make_trainer(mesh))
  np.testing.assert_allclose(losses, single_device[0], rtol=2e-5)
  assert_same_parameters(state, single_device[1])


@pytest.mark.parametrize(
  "change",
  [
    dict(num_heads=8, num_kv_heads=8, head_dim=4, nested_heads=True),
    helpers.GROUPED | dict(num_heads=16, num_kv_heads=8, nested_heads=True),
  ],
  ids=["heads", "groups of queries"],
)
def test_nested_heads_on_a_mesh(change):
  model = dataclasses.replace(MODEL, **change)
  plain, state = run(make_trainer(model_config=model), 3)
  losses, sharded = run(make_trainer(dict(data=2, fsdp=2, tensor=2), model), 3)
  np.testing.assert_allclose(losses, plain, rtol=2e-5)
  assert_same_parameters(sharded, state)


def test_bfloat16_trains_close_to_float32(single_device):
  losses, state = run(make_trainer(dtype="bfloat16"))
  np.testing.assert_allclose(losses, single_device[0], rtol=0.02)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_parameters_and_moments_are_sharded():
  trainer = make_trainer(dict(data=2, fsdp=2, tensor=2))
  state = trainer.init(0)
  for tree in (state.params, state.opt_state[1][0].mu):
    leaf = tree["blocks"]["0"]["ffn"]["in"]
    assert leaf.addressable_shards[0].data.size == leaf.size // 4  # fsdp x tensor


def test_gradients_cross_slices_once_in_the_dtype_asked_for(single_device):
  """A sum over slices per parameter, after all others and after micro-batches are added up."""
  for dtype in ("", "bfloat16"):
    changes = {"slice_grad_dtype": dtype, "grad_accum": 2}
    trainer = make_trainer(dict(slices=2, data=2, fsdp=2), **changes)
    found = estimate.equations(trainer.trace(trainer.granularities[0]).jaxpr.jaxpr, "psum")
    across = [(eqn, times) for eqn, times in found if eqn.params["axes"] == ("slices",)]
    sums = [var.aval for eqn, times in across for _ in range(times) for var in eqn.invars]
    gradients = [s for s in sums if s.shape]  # the others are losses
    assert len(gradients) == len(jax.tree.leaves(trainer.abstract_state.params))
    assert {s.dtype for s in gradients} == {jnp.dtype(dtype or "float32")}
    if dtype:  # the other one is among the meshes that agree
      np.testing.assert_allclose(run(trainer, 2)[0], single_device[0][:2], rtol=2e-3)
  with pytest.raises(UserError, match="slice_grad_dtype='int8' is not one of"):
    make_trainer(dict(slices=2, fsdp=4), slice_grad_dtype="int8").execution  # noqa: B018


def test_slices_are_neighbours():
  """CPUs are of no slice, and are split evenly."""
  mesh = sharding.make_mesh({"slices": 2, "fsdp": -1})
  assert sharding.sizes(mesh) == {"slices": 2, "data": 1, "fsdp": 4, "tensor": 1}
  assert [[d.id for d in s.flat] for s in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert "slices" not in sharding.sizes(sharding.make_mesh({"data": -1}))
  for shape, words in (
    ({"slices": 3}, "mesh.slices=3 does not fit the 8 devices here"),
    ({"slices": 16}, "mesh.slices=16 does not fit"),
    ({"slices": 2, "fsdp": 8}, "does not use the 4 devices each of 2 slices"),
  ):
    with pytest.raises(UserError, match=words):
      sharding.make_mesh(shape)


def dense(index: int, model: MatLMConfig) -> MatLMConfig:
  """A plain Transformer as wide as one granularity."""
  return dataclasses.replace(model, ffn_ratios=(), ffn_widths=(model.ffn_widths[index],), spans=())


@pytest.mark.parametrize(
  "mesh", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, tensor=2)]
)
@pytest.mark.parametrize("index,change", [(0, {}), (1, {}), (3, {}), (0, helpers.GROUPED)])
def test_nesting_causes_no_collective(mesh, index, change):
  """A granularity's step communicates exactly what a dense model of its width does."""
  model = dataclasses.replace(MODEL, **change)
  nested = make_trainer(mesh, model)
  plain = make_trainer(mesh, dense(index, model))
  ours = hlo.totals(nested.lower(nested.granularities[index]).compile().as_text())
  theirs = hlo.totals(plain.lower(plain.granularities[0]).compile().as_text())
  assert ours.keys() == theirs.keys() and ours
  for kind, (count, size) in ours.items():
    assert count == theirs[kind][0], kind
    assert size <= 1.05 * theirs[kind][1], kind


def test_a_small_granularity_gathers_less():
  trainer = make_trainer(dict(fsdp=8))
  size = [
    hlo.totals(trainer.lower(g).compile().as_text())["all-gather"][1] for g in trainer.granularities
  ]
  ffn = [MODEL.num_layers * 2 * 4 * width * MODEL.d_model for width in MODEL.ffn_widths]  # float32
  assert size == sorted(size)
  assert size[3] - size[0] == ffn[3] - ffn[0]


@pytest.mark.parametrize(
  "mesh,words", [(dict(fsdp=3), "8 devices"), (dict(fsdp=-1, data=3), "8 devices")]
)
def test_mesh_errors(mesh, words):
  with pytest.raises(UserError, match=words):
    sharding.make_mesh(mesh)


def test_a_mesh_that_does_not_divide_the_model():
  with pytest.raises(UserError, match="head_groups=2 is not divisible by mesh.tensor=4"):
    sharding.check_model_fits_mesh(MODEL, sharding.make_mesh(dict(fsdp=2, tensor=4)))


# ------------------------------------------------------------------ the step


def test_gradient_accumulation_is_the_same_update(single_device):
  losses, state = run(make_trainer(dict(fsdp=4, data=2), grad_accum=2))
  np.testing.assert_allclose(losses, single_device[0], rtol=2e-5)
  assert_same_parameters(state, single_device[1])


@pytest.mark.parametrize("poison", ["nan", "inf", "large"])
def test_a_non_finite_step_changes_no_bit(poison):
  trainer = make_trainer()
  _, state = run(trainer, 4)
  bad = {"nan": np.nan, "inf": np.inf, "large": 3e38}[poison]  # the last overflows on the way
  params = jax.tree.map(lambda x: x, state.params)
  params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(bad)
  state = TrainState(params, state.opt_state)
  before = jax.tree.map(np.array, state)
  step = trainer.lower(trainer.granularities[1]).compile()
  after, out = step(state, trainer.batch(9))
  assert not out["finite"]
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), after, before)
  assert all(jax.tree.leaves(same))


def test_an_update_that_is_not_sane_changes_no_bit():
  """Loss and gradient are finite, and 1e30 times an update is too: what it leaves is useless."""
  trainer = make_trainer(
    **{"optim.peak_lr": 1e30, "optim.warmup_steps": 1, "optim.schedule": "constant"}
  )
  state = trainer.init(0)
  before = jax.tree.map(np.array, state)
  step = trainer.lower(trainer.granularities[0]).compile()
  after, out = step(state, trainer.batch(1))
  assert np.isfinite(out["loss"]) and np.isfinite(out["grad_norm"]) and not out["finite"]
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), after, before)
  assert all(jax.tree.leaves(same))


def test_one_program_per_granularity():
  trainer = make_trainer()
  programs = trainer.compile()
  assert sorted(programs) == [0, 1, 2, 3]
  flops = [programs[i].cost_analysis()["flops"] for i in range(4)]
  assert flops == sorted(set(flops))  # slices, not masks: a smaller size costs less
  assert sorted(make_trainer(sampling="0/0/0.5/0.5").compile()) == [2, 3]


def test_untouched_neurons_move_only_by_optimizer_momentum():
  """The first S step leaves neurons beyond m_S where weight decay alone puts them."""
  trainer = make_trainer(
    **{"optim.weight_decay": 0.0, "optim.warmup_steps": 1, "optim.schedule": "constant"}
  )
  state = trainer.init(0)
  before = np.array(state.params["blocks"]["0"]["ffn"]["in"])
  step = trainer.lower(trainer.granularities[0]).compile()
  for i in (1, 2):  # the learning rate of the first step is 0
    state, _ = step(state, trainer.batch(i))
  after = np.array(state.params["blocks"]["0"]["ffn"]["in"])
  k = MODEL.ffn_widths[0] // MODEL.ffn_groups
  np.testing.assert_array_equal(after[:, :, k:], before[:, :, k:])
  assert np.all(np.any(after[:, :, :k] != before[:, :, :k], -1))


# ----------------------------------------------------------------- optimizers


def test_weight_decay_spares_norm_scales():
  params = matlm.init_params(MODEL, jax.random.key(0))
  config = helpers.get_config("tiny").optim
  config.update(dict(schedule="constant", warmup_steps=1, clip_norm=0.0))
  optimizer = optim.make_optimizer(config, 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  state = optimizer.init(params)
  for _ in range(2):
    updates, state = optimizer.update(zeros, state, params)
  moved = optim.is_matrix(params)
  jax.tree.map(
    lambda u, is_matrix: np.testing.assert_equal(bool(np.any(u)), is_matrix), updates, moved
  )
  flags = collections.Counter(jax.tree.leaves(moved))
  assert flags[True] == 5 and flags[False] == 3


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_schedules(schedule):
  config = helpers.get_config("tiny").optim
  config.update(dict(schedule=schedule, peak_lr=1.0, warmup_steps=10, final_lr_ratio=0.1))
  f = optim.make_schedule(config, 100)
  # The first update has 1/warmup of the peak, the 10th all of it, the 100th is the last.
  assert [float(f(made)) for made in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
  after = {"cosine": 0.99973, "rsqrt": (10 / 11) ** 0.5, "constant": 1.0}[schedule]
  assert f(10) == pytest.approx(after, rel=1e-4)
  end = {"cosine": 0.1, "rsqrt": 10**-0.5, "constant": 1.0}[schedule]
  assert f(99) == pytest.approx(end, rel=1e-4)


def test_adafactor_trains_with_factored_moments_on_a_mesh():
  big = MatLMConfig(vocab_size=256, num_layers=2, d_model=128, num_heads=4, seq_len=16)
  trainer = make_trainer(
    dict(fsdp=8), big, **{"optim.name": "adafactor", "optim.schedule": "rsqrt"}
  )
  losses, state = run(trainer, 9)
  assert losses[8] < losses[0] and np.all(np.isfinite(losses))
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert size(state.opt_state) < 0.1 * size(state.params)


@pytest.mark.parametrize("key,value", [("name", "adamm"), ("schedule", "cosin")])
def test_optimizer_errors(key, value):
  config = helpers.get_config("tiny").optim
  config[key] = value
  with pytest.raises(UserError, match=f"optim.{key}='{value}'.*did you mean"):
    optim.make_optimizer(config, 100)


# ------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
  "key,value",
  [
    *(("steps", 0), ("batch_size", 2.0), ("max_nonfinite", -1), ("checkpoint.keep_last", 0)),
    *(("eval.batch_size", 0), ("eval.batches", -1), ("eval.every", -5)),
  ],
)
def test_integers_out_of_range(key, value):
  config = helpers.get_config("tiny").copy_and_resolve_references()
  with config.ignore_type():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=rf"^{key}={value} must be an integer of at least"):
    train_program._check_config(config)


def run_loop(
  workdir, process=0, evaluate=lambda stop: None, **changes
) -> tuple[list[int], list[int]]:
  """(granularities drawn, steps saved) of the loop with seed 3, whose steps compute nothing.

  Args:
    evaluate: gets the stop signal at every evaluation.
    changes: of the config.
  """
  config = helpers.get_config("tiny")
  config.update_from_flattened_dict({"seed": 3, **changes})
  trainer, hosts, drawn, saved = make_trainer(seed=3), Hosts(index=process), [], []
  stop = types.SimpleNamespace(requested=False)

  def program(index):
    def step(state, batch):
      drawn.append(index)
      return state, {"loss": 1.0, "grad_norm": 1.0, "finite": True}

    return step

  def evaluate_(*args, should_stop):
    evaluate(stop)
    should_stop()  # None: no results

  flops = dict.fromkeys(trainer.names, 1)
  loop = Loop(
    config=config,
    trainer=types.SimpleNamespace(
      task=types.SimpleNamespace(evaluate=evaluate_),
      mesh=trainer.mesh,
      kinds=trainer.kinds,
      draw=trainer.draw,
      batches=lambda first: iter(range(first, config.steps)),
      execution=None,
      put=None,
      granularities=None,
    ),
    programs={i: program(i) for i in range(4)},
    hosts=hosts,
    stop=stop,
    writer=types.SimpleNamespace(save=lambda step, *args: saved.append(step)),
    log=metrics.RunLog(
      None, 0, config.steps, 10, 1, "tok", "tokens_per_s", trainer.names, flops, None
    ),
    ledger=goodput.Ledger(None),
    watchdog=Watchdog(0, hosts),
    staging=storage.Staging(workdir),
    profile=StepProfile(range(0), storage.Staging(workdir)),
    samples=None,
    state=TrainState({}, {}),
    start=0,
    skipped=0,
  )
  assert loop.run() == len(drawn)
  return drawn, saved


@pytest.mark.parametrize("process", [0, 1])
def test_every_process_draws_what_seed_and_step_say(process, tmp_path):
  drawn, saved = run_loop(tmp_path, process)
  assert drawn == [gran.sample_index(3, step, (0.25,) * 4) for step in range(1, 41)]
  assert saved == [10, 20, 30, 40]


def test_a_stop_during_evaluation_keeps_the_step(tmp_path):
  ask = lambda stop: setattr(stop, "requested", True)
  drawn, saved = run_loop(tmp_path, evaluate=ask, **{"eval.every": 7})
  assert len(drawn) == 7 and saved == [7]


def test_a_run_records_every_step(tiny_run):
  rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
  assert [r["step"] for r in rows] == list(range(1, 41))
  p = (0.25,) * 4
  names = ("S", "M", "L", "XL")
  assert [r["granularity"] for r in rows] == [
    names[gran.sample_index(0, s, p)] for s in range(1, 41)
  ]
  assert all(
    r["loss"] > 0 and r["grad_norm"] > 0 and r["step_time_s"] > 0 and r["tokens_per_s"] > 0
    for r in rows
  )
  rates = [r["learning_rate"] for r in rows[:5]]
  assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])  # none of them is 0
  assert np.mean([r["loss"] for r in rows[-8:]]) < np.mean([r["loss"] for r in rows[:8]]) - 0.5
  evals = [json.loads(line) for line in (tiny_run / "eval.jsonl").read_text().splitlines()]
  assert [e["step"] for e in evals] == [20, 40] and set(evals[0]["loss"]) == set(names)
  assert list((tiny_run / "tensorboard").iterdir())


def test_loss_metric_has_full_precision(tiny_run):
  row = json.loads((tiny_run / "metrics.jsonl").read_text().splitlines()[0])
  assert np.float32(row["loss"]) == row["loss"]  # the float32, not a rounded print of it


def test_a_sharded_step_with_the_loss_kernels(monkeypatch):
  """Interpreted on CPU, each device on its own rows: as without the kernels."""
  tiles = loss_kernel.Tiles(rows=16, vocab=128, keep_logits=True, vmem_bytes=0, interpret=True)
  monkeypatch.setattr(loss_kernel, "choose_tiles", lambda *sizes: tiles)
  model = dataclasses.replace(MODEL, vocab_size=256)
  found = []
  for kernels in (None, chips.TPUS["v5p"]):
    trainer = make_trainer(dict(data=2, fsdp=4), model, dtype="bfloat16")
    trainer.__dict__["execution"] = dataclasses.replace(trainer.execution, kernels=kernels)
    traced = trainer.trace(trainer.granularities[1])
    assert ("logits_gradients" in str(traced.jaxpr)) == bool(kernels)
    _, out = traced.lower().compile()(trainer.init(0), trainer.batch(1))
    found.append([float(out["loss"]), float(out["grad_norm"])])
  np.testing.assert_allclose(found[1], found[0], rtol=2e-3)
