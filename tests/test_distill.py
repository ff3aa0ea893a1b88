"""Distillation: the loss against a plain one, the step of each size, and runs of the command."""

import dataclasses
import functools
import json
import shutil
import signal

import helpers
from helpers import run_program, train_args, train_until_signal
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import matformer_jax
from matformer_jax import UserError, sharding
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.models import losses, matlm
from matformer_jax.tasks.language import NextToken
from matformer_jax.tpu import hlo
from matformer_jax.training import distill, metrics
from matformer_jax.training.distill import Distillation
from matformer_jax.training.trainer import Trainer

# ------------------------------------------------------------------ the loss


def plain(hidden, head, targets, teacher_hidden, teacher_head, weight, temperature, z_loss=0.0):
  """(objective, cross-entropy, KL) from whole logits."""
  logits = jnp.einsum("btd,vd->btv", hidden, head)
  theirs = jnp.einsum("btd,vd->btv", teacher_hidden, teacher_head)
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
  ours = jax.nn.log_softmax(logits / temperature)
  theirs = jax.nn.log_softmax(theirs / temperature)
  loss, kl = -jnp.mean(picked), jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), -1))
  objective = (1 - weight) * loss + weight * temperature**2 * kl
  return objective + z_loss * jnp.mean(jax.nn.logsumexp(logits, -1) ** 2), loss, kl


def inputs(batch=4, length=12, width=8, vocab=52, teacher_width=20):
  keys = jax.random.split(jax.random.key(0), 5)
  normal = lambda i, *shape: jax.random.normal(keys[i], shape)
  return (
    normal(0, batch, length, width),
    normal(1, vocab, width),
    jax.random.randint(keys[2], (batch, length), 0, vocab),
    normal(3, batch, length, teacher_width),
    normal(4, vocab, teacher_width),
  )


def value_and_gradient(loss, x):
  """Of hidden states and head, with a cotangent other than 1."""
  scaled = lambda hidden, head: 3.0 * loss(hidden, head, *x[2:])[0]
  return loss(*x), jax.grad(scaled, (0, 1))(*x[:2])


@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize(
  "weight,temperature,z_loss",
  [(0.5, 1.0, 0.0), (0.3, 2.0, 1e-2), (1.0, 0.5, 1e-2), (1.0, 1.0, 0.0), (0.0, 3.0, 1e-2)],
)
def test_value_and_gradient(chunks, weight, temperature, z_loss):
  x = inputs()
  settings = dict(weight=weight, temperature=temperature, z_loss=z_loss)
  ours = lambda *x: losses.chunked_distillation(*x, weight, temperature, chunks, z_loss)
  have, want = (value_and_gradient(f, x) for f in (ours, functools.partial(plain, **settings)))
  np.testing.assert_allclose(have[0], want[0], rtol=1e-5)
  for a, b in zip(have[1], want[1]):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_weight_0_is_the_plain_loss():
  x = inputs()
  ours = lambda *x: losses.chunked_distillation(*x, 0.0, 2.0, 3, 1e-2)
  have = value_and_gradient(ours, x)
  want = value_and_gradient(lambda *x: losses.chunked_cross_entropy(*x[:3], 3, 1e-2), x)
  np.testing.assert_allclose(have[0][:2], want[0], rtol=1e-6)
  for a, b in zip(have[1], want[1]):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_teacher_like_the_student_diverges_by_nothing_even_far_from_zero():
  hidden, head, targets, *_ = inputs()
  for size in (1.0, 100.0):
    for temperature in (1.0, 4.0):
      _, _, kl = losses.chunked_distillation(
        size * hidden, head, targets, size * hidden, head, 1.0, temperature, 3
      )
      assert kl == 0


def test_the_teacher_has_no_gradient():
  x = inputs()
  loss = lambda *x: losses.chunked_distillation(*x, 0.5, 2.0, 3, 1e-2)[0]
  own = jax.grad(loss, (0, 1))(*x)
  theirs = jax.grad(loss, (3, 4))(*x)
  assert all(np.any(g) for g in own) and not any(np.any(g) for g in theirs)


def test_memory_is_far_below_the_plain_loss():
  x = inputs(batch=2, length=256, width=16, vocab=32_000, teacher_width=16)

  def temp(f):
    grad = jax.jit(jax.grad(lambda *x: f(*x)[0], (0, 1)))
    return grad.lower(*x).compile().memory_analysis().temp_size_in_bytes

  chunked = functools.partial(losses.chunked_distillation, weight=0.5, temperature=2.0, chunks=16)
  whole = functools.partial(plain, weight=0.5, temperature=2.0)
  assert temp(lambda *x: chunked(*x)) < 0.25 * temp(lambda *x: whole(*x))


def test_two_models_logits_take_the_memory_of_one():
  """Twice the chunks, since a chunk holds the teacher's logits too."""
  execution = Execution(logits_bytes=2**20)
  shape, vocab = (4, 64, 8), 4096
  (one, _), (two, tiles) = (
    losses.cut(shape, vocab, jnp.float32, execution, distilled) for distilled in (False, True)
  )
  assert (two, tiles) == (2 * one, None) and one > 1


# ------------------------------------------------------------------ the step

MODEL = MatLMConfig(
  vocab_size=96, num_layers=2, d_model=32, num_heads=4, seq_len=16, ffn_groups=4, head_groups=2
)
WIDE = MatLMConfig(
  vocab_size=96,
  num_layers=3,
  d_model=64,
  num_heads=4,
  seq_len=32,
  ffn_groups=2,
  head_groups=2,
  gated=True,
  tied_head=False,
)
SELF = Distillation(0.5, 2.0, "", MODEL)
PARENT = Distillation(0.5, 2.0, "somewhere", WIDE)
RATE = 0.1
# A plain gradient step, so that parameters show the gradient.
GRADIENT = {
  "optim.name": "sgd",
  "optim.momentum": 0.0,
  "optim.peak_lr": RATE,
  "optim.warmup_steps": 0,
  "optim.schedule": "constant",
  "optim.weight_decay": 0.0,
  "optim.clip_norm": 0.0,
}


def make_trainer(
  distillation: Distillation | None = None, mesh=None, model=MODEL, attend="across", **changes
) -> Trainer:
  config = helpers.get_config("tiny")
  config.batch_size = 16
  config.update_from_flattened_dict(GRADIENT | changes)
  devices = jax.devices() if mesh else jax.devices()[:1]
  task = NextToken(model, 16, z_loss=1e-2, attend=attend)
  trainer = Trainer(task, config, sharding.make_mesh(mesh or {}, devices))
  trainer.__dict__["distillation"] = distillation  # a parent's card is not read
  return trainer


def tokens(step: int) -> np.ndarray:
  return np.random.default_rng(step).integers(0, 96, (16, 17)).astype(np.int32)


def lively(params):
  """Not as initialised, where every prediction is nearly uniform."""
  return params | {"blocks": jax.tree.map(lambda x: 2 * x, params["blocks"])}


def parent_params(trainer: Trainer) -> tuple:
  """What `Trainer.load_parent` would give."""
  if trainer.stored_parent is None:
    return ()
  distillation = trainer.distillation
  assert distillation is not None
  params = lively(matlm.init_params(distillation.model, jax.random.key(7)))
  params = distill.for_compute(params, trainer.execution.dtype)
  return (jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, trainer.stored_parent),)


def steps(trainer: Trainer, sizes=(0, 3, 1)):
  """What steps of some sizes measured, and the parameters after them."""
  state, measured = trainer.init(0), []
  state = dataclasses.replace(state, params=lively(state.params))
  parent = parent_params(trainer)
  for step, index in enumerate(sizes):
    rows = tokens(step)
    batch = rows
    if trainer.task.attend == "within":
      segments = np.broadcast_to(np.arange(16) // 5, (16, 16)).astype(np.int32)
      batch = {"tokens": rows, "segments": segments}
    batch = trainer.put(lambda r: jax.tree.map(lambda x: x[r.start : r.stop], batch))
    program = trainer.lower(trainer.granularities[index]).compile()
    state, out = program(state, batch, *parent)
    assert out["finite"]
    measured.append({name: float(out[name]) for name in ("loss", "kl") if name in out})
  return measured, jax.device_get(state.params)


@functools.cache
def on_one_device(distillation: Distillation):
  return steps(make_trainer(distillation))


def assert_same(a, b):
  for have, want in zip(a[0], b[0]):
    assert have == pytest.approx(want, rel=1e-4)
  before = lively(matlm.init_params(MODEL, jax.random.key(0)))
  for old, x, y in zip(*map(jax.tree.leaves, (before, a[1], b[1]))):
    assert np.linalg.norm(x - y) <= 2e-3 * np.linalg.norm(y - old)


def by_hand(params, rows, g, teacher_logits, weight, temperature):
  """(objective, (cross-entropy, KL)) of a size, from whole logits."""
  logits = matlm.MatLM(MODEL).apply({"params": params}, rows[:, :-1], granularity=g)
  eye = jnp.eye(96)  # as if logits were hidden states
  value, *measured = plain(
    logits, eye, rows[:, 1:], teacher_logits, eye, weight, temperature, z_loss=1e-2
  )
  return value, measured


@pytest.mark.parametrize("distillation", [SELF, PARENT], ids=["self", "parent"])
@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_step_by_hand(distillation, index):
  trainer = make_trainer(distillation)
  before = lively(matlm.init_params(MODEL, jax.random.key(0)))
  ((measured,), after) = steps(trainer, [index])
  g, rows = trainer.granularities[index], tokens(0)
  teacher = before if distillation is SELF else parent_params(trainer)[0]
  forward = jax.jit(matlm.MatLM(distillation.model).apply)
  theirs = forward({"params": teacher}, rows[:, :-1])
  alone = distillation is SELF and index == 3  # its own teacher: the plain step
  weight, temperature = (0.0, 1.0) if alone else (0.5, 2.0)
  gradient_by_hand = jax.jit(jax.value_and_grad(by_hand, has_aux=True), static_argnums=2)
  (_, (loss, kl)), gradient = gradient_by_hand(before, rows, g, theirs, weight, temperature)
  want = {"loss": float(loss)} if alone else {"loss": float(loss), "kl": float(kl)}
  assert measured == pytest.approx(want, rel=1e-4)
  for old, new, g in zip(*map(jax.tree.leaves, (before, after, gradient))):
    moved = (np.asarray(old) - new) / RATE
    assert np.linalg.norm(moved - g) <= 1e-3 * np.linalg.norm(g)


def test_without_weight_the_program_is_the_plain_one():
  config = helpers.get_config("tiny")
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  assert config.distill.weight == 0 and distill.from_config(config, MODEL, mesh) is None
  del config.distill  # as runs made before
  assert distill.from_config(config, MODEL, mesh) is None
  largest = make_trainer(SELF)
  text = lambda trainer: trainer.lower(trainer.granularities[3]).as_text()
  assert text(largest) == text(make_trainer())


@pytest.mark.parametrize("distillation", [SELF, PARENT], ids=["self", "parent"])
@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_meshes_agree(distillation, mesh):
  assert_same(steps(make_trainer(distillation, mesh)), on_one_device(distillation))


@pytest.mark.parametrize(
  "mesh,changes",
  [
    (None, dict(grad_accum=4)),
    (dict(data=2, fsdp=4), dict(grad_accum=2)),
    (None, dict(remat="full", layers="scanned")),
    (None, dict(remat="attn_out", layers="unrolled", logits_gib=1e-5)),
  ],
)
def test_ways_to_run_a_step_agree(mesh, changes):
  assert_same(steps(make_trainer(PARENT, mesh, **changes)), on_one_device(PARENT))


def test_bfloat16_is_close_and_keeps_the_parent_in_half_the_memory():
  trainer = make_trainer(PARENT, dict(fsdp=8), dtype="bfloat16")
  for have, want in zip(steps(trainer)[0], on_one_device(PARENT)[0]):
    assert have == pytest.approx(want, rel=0.05)
  (parent,) = trainer.abstract_parent
  assert parent["blocks"]["0"]["ffn"]["in"].dtype == jnp.bfloat16
  assert parent["final_norm"]["scale"].dtype == jnp.float32


def test_the_teacher_too_attends_within_documents():
  """Tokens of another document change nothing of what is learned of this one."""
  found = []
  for distillation in (SELF, dataclasses.replace(PARENT, model=MODEL)):
    trainer = make_trainer(distillation, attend="within")
    found.append(steps(trainer, [0])[0][0])
  plain_run = steps(make_trainer(attend="within"), [0])[0][0]
  across = steps(make_trainer(SELF), [0])[0][0]
  for measured in found:
    assert measured["loss"] == pytest.approx(plain_run["loss"], rel=1e-5)
    assert measured["kl"] > 0
  assert found[0]["kl"] != pytest.approx(across["kl"], rel=1e-3)


def dense(index: int) -> MatLMConfig:
  return dataclasses.replace(MODEL, ffn_ratios=(), ffn_widths=(MODEL.ffn_widths[index],), spans=())


@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_nesting_causes_no_collective(mesh):
  """A size communicates what a dense model of its width does that learns from the same teacher:
  from a parent, and from XL, whose forward pass is that of a parent of its shape."""
  totals = lambda trainer: hlo.totals(trainer.lower(trainer.granularities[0]).compile().as_text())
  like_xl = dataclasses.replace(PARENT, model=MODEL)
  for ours, theirs in ((PARENT, PARENT), (SELF, like_xl)):
    nested, plain_ = totals(make_trainer(ours, mesh)), totals(make_trainer(theirs, mesh, dense(0)))
    assert nested.keys() == plain_.keys() and nested
    for kind, (count, size) in nested.items():
      assert count <= plain_[kind][0] and size <= 1.05 * plain_[kind][1], kind


def test_the_teacher_is_counted():
  forward = lambda model, g: gran.count(model, g, MODEL.num_tokens).flops
  for distillation, extra in (
    (None, [0] * 4),
    (SELF, [forward(MODEL, "XL")] * 3 + [0]),
    (PARENT, [forward(WIDE, "XL")] * 4),
  ):
    trainer = make_trainer(distillation)
    for g, more in zip(trainer.granularities, extra):
      assert trainer.model_flops(g) == 16 * 16 * (3 * forward(MODEL, g) + more)


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
  "changes,words",
  [
    (dict(teacher="parents", weight=0.5), "distill.teacher='parents' is unknown.*did you mean"),
    (dict(teacher="self", weight=1.5), "distill.weight=1.5 must be from 0 to 1"),
    (dict(teacher="self", weight=-0.1), "distill.weight=-0.1"),
    (dict(teacher="self", weight=float("nan")), "distill.weight=nan"),
    (dict(teacher="self", weight=0.5, temperature=0.0), "distill.temperature=0.0 must be"),
    (dict(weight=0.5), "distill.weight=0.5 needs a teacher"),
    (dict(teacher="self"), "distill.teacher='self' has no effect"),
    (dict(teacher="parent", weight=0.5), "needs the directory"),
    (dict(teacher="self", weight=0.5, parent="runs/a"), "distill.parent='runs/a' is not used"),
    (dict(teacher="parent", weight=0.5, parent="/nowhere"), "distill.parent='/nowhere'.*not a run"),
  ],
)
def test_mistakes(changes, words):
  config = helpers.get_config("tiny")
  config.distill.update(changes)
  with pytest.raises(UserError, match=words):
    distill.from_config(config, MODEL, sharding.make_mesh({}, jax.devices()[:1]))


def distilling_from(path, **changes):
  """A config whose sizes learn from the model in a directory."""
  config = helpers.get_config("tiny")
  config.distill.update(dict(teacher="parent", weight=0.5, parent=str(path)))
  config.update_from_flattened_dict(changes)
  return config


def test_a_parent_that_does_not_fit(tiny_run, digits_run, tmp_path):
  def raises(words, mesh=None, path=tiny_run, **changes):
    config = distilling_from(path, **changes)
    model = MatLMConfig.from_dict(config.model)
    with pytest.raises(UserError, match=words):
      distill.from_config(config, model, sharding.make_mesh(mesh or dict(fsdp=-1)))

  raises("vocabulary of 512 and this model one of 1,024", **{"model.vocab_size": 1024})
  raises("is of task 'matvit'", path=digits_run)
  raises("cannot be sharded over this mesh.*head_groups", dict(fsdp=4, tensor=2))
  # What `init_from` names is the default.
  config = distilling_from("", init_from=str(tiny_run))
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  found = distill.from_config(config, MatLMConfig.from_dict(config.model), mesh)
  assert found and found.parent == str(tiny_run) and found.model.d_model == 32


# ------------------------------------------------------------- the real command


def trajectory(workdir):
  """What was measured at each step, but for times."""
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  return [
    {k: row.get(k) for k in ("step", "granularity", "loss", "kl", "grad_norm")} for row in rows
  ]


def final_bytes(workdir):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(matformer_jax.load(workdir).params)]


def test_distilling_from_a_parent_resumes_bit_exactly(tiny_run, tmp_path):
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  parent = tmp_path / "parent"
  shutil.copytree(tiny_run, parent)
  options = dict(
    distill__teacher="parent",
    distill__weight=0.5,
    distill__temperature=2.0,
    distill__parent=parent,
    model__d_model=16,  # of another width than the parent's
    steps=8,
    log_every=1,
    **helpers.TWO_WIDTHS,
  )
  result = run_program("train", *train_args(whole, **options))
  assert result.returncode == 0 and f"distilling from {parent}" in result.stdout, result.stderr
  result = train_until_signal(3, signal.SIGTERM, *train_args(stopped, **options))
  assert result.returncode == 143, result.stderr
  result = run_program("train", *train_args(stopped, **options))
  assert result.returncode == 0 and "resuming" in result.stdout, result.stderr
  rows = trajectory(whole)
  assert len(rows) == 8 and all(row["kl"] > 0 for row in rows)  # XL learns from it too
  assert trajectory(stopped) == rows and final_bytes(stopped) == final_bytes(whole)
  # A checkpoint holds the model alone.
  meta = checkpoint.read_meta(whole, 8)
  assert len(meta["manifest"]["params"]) == len(jax.tree.leaves(matformer_jax.load(whole).params))

  # Another run is refused: another weight, a parent that trained on; a moved one is the same.
  result = run_program("train", *train_args(whole, **options | dict(distill__weight=0.4)))
  assert result.returncode == 1 and "distill.weight is 0.5 there and 0.4 here" in result.stderr
  moved = tmp_path / "moved"
  parent.rename(moved)
  result = run_program("train", *train_args(whole, **options | dict(distill__parent=moved)))
  assert result.returncode == 0 and "nothing to do" in result.stdout, result.stderr
  shutil.rmtree(moved / "checkpoints" / "40")
  result = run_program("train", *train_args(whole, **options | dict(distill__parent=moved)))
  assert result.returncode == 1 and "distill.parent is" in result.stderr


def test_distilling_from_xl_of_the_same_weights_resumes_bit_exactly(tmp_path):
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  options = dict(
    distill__teacher="self", distill__weight=0.5, steps=8, log_every=1, **helpers.TWO_WIDTHS
  )
  result = run_program("train", *train_args(whole, **options))
  assert result.returncode == 0 and "distilling from G2 of the same" in result.stdout, result.stderr
  result = train_until_signal(3, signal.SIGTERM, *train_args(stopped, **options))
  assert result.returncode == 143, result.stderr
  result = run_program("train", *train_args(stopped, **options))
  assert result.returncode == 0 and "resuming" in result.stdout, result.stderr
  rows = trajectory(whole)
  assert {row["granularity"]: row["kl"] is None for row in rows} == {"G1": False, "G2": True}
  assert trajectory(stopped) == rows and final_bytes(stopped) == final_bytes(whole)


def test_a_run_made_before_there_was_distillation_resumes(tiny_run, tmp_path):
  """Its card lacks the key; to begin distilling would be another run."""
  run = tmp_path / "run"
  shutil.copytree(tiny_run, run)
  card = json.loads((run / "config.json").read_text())
  assert "distill" not in card  # as cards of plain runs still are
  del card["config"]["distill"]
  (run / "config.json").write_text(json.dumps(card))
  result = run_program("train", *train_args(run))
  assert result.returncode == 0 and "nothing to do" in result.stdout, result.stderr
  options = dict(distill__teacher="self", distill__weight=0.5)
  result = run_program("train", *train_args(run, **options))
  assert result.returncode == 1 and "distill is None there" in result.stderr


def test_a_parent_with_another_tokenizer(tiny_run, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(tiny_run, other)
  card = json.loads((other / "config.json").read_text())
  card["identity"]["tokenizer"] = "0" * 64
  (other / "config.json").write_text(json.dumps(card))
  options = dict(distill__teacher="parent", distill__weight=0.5, distill__parent=other)
  result = run_program("train", *train_args(tmp_path / "run", **options))
  assert result.returncode == 1 and "another tokenizer (000000000000)" in result.stderr
