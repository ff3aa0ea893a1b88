"""Checkpoints: nothing damaged is ever used silently, nothing is ever deleted."""

import json
import math
import os
import pathlib
import shutil
import tarfile
import warnings

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import MODEL, make_trainer

import matformer_jax
from matformer_jax import UserError, sharding
from matformer_jax.checkpoints import checkpoint, checksums, manifest
from matformer_jax.extract import extract

# Where a step is damaged, Orbax leaves its other reads unfinished.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with steps 1 to 4 of a run, keeping 3, and the states they hold."""
  workdir = tmp_path_factory.mktemp("saved")
  trainer = make_trainer()
  step = trainer.lower(trainer.granularities[2]).compile()
  writer = checkpoint.Writer(workdir, keep_last=2, keep_best=1, card=CARD)
  state, states = trainer.init(0), {}
  for i, metric in ((1, 0.5), (2, 3.0), (3, 2.0), (4, None)):
    state, _ = step(state, trainer.batch(i))
    states[i] = jax.tree.map(np.array, state)
    if metric is not None:
      writer.record(i, metric)
    writer.save(i, state.params, state.opt_state, {"step": i}, {"skipped": 0})
  writer.close()
  return workdir, trainer, states


CARD = {"task": "matlm", "model": MODEL.to_dict(), "identity": {}, "config": {}}


def items(trainer):
  return {"params": trainer.abstract_state.params, "opt_state": trainer.abstract_state.opt_state}


def same(a, b) -> bool:
  return all(
    jax.tree.leaves(
      jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    )
  )


def files_of(step_dir: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in step_dir.rglob("*") if p.is_file())


def test_keeps_the_last_and_the_best(saved):
  assert checkpoint.steps(saved[0]) == [1, 3, 4]  # 1 is best, 3 and 4 are last


def test_the_best_survives_a_restart(saved, tmp_path):
  workdir, trainer, states = saved
  shutil.copytree(workdir, tmp_path / "run")
  writer = checkpoint.Writer(tmp_path / "run", 1, 1, CARD)
  writer.save(5, states[4].params, states[4].opt_state, {"step": 5}, {"skipped": 0})
  writer.close()
  assert checkpoint.steps(tmp_path / "run") == [1, 5]


def test_a_loss_that_is_not_finite_ranks_nothing(saved, tmp_path):
  shutil.copytree(saved[0], tmp_path / "run")
  best = tmp_path / "run" / checkpoint.BEST_FILE
  known = json.loads(best.read_text())
  best.write_text(json.dumps({**known, "0": math.nan}))  # as earlier versions wrote
  writer = checkpoint.Writer(tmp_path / "run", 1, 1, CARD)
  writer.record(5, math.nan)
  writer.record(6, 4.0)
  writer.close()
  assert json.loads(best.read_text()) == {**known, "6": 4.0}


@pytest.mark.parametrize("step", [1, 4])
def test_restores_every_bit(saved, step):
  workdir, trainer, states = saved
  restored, meta, data = checkpoint.restore(workdir, step, items(trainer))
  assert same(restored["params"], states[step].params)
  assert same(restored["opt_state"], states[step].opt_state)
  assert meta["step"] == step and data == {"step": step}


@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_restores_onto_another_mesh(saved, mesh):
  workdir, _, states = saved
  other = make_trainer(mesh)
  restored, _, _ = checkpoint.restore(workdir, 4, items(other))
  assert same(restored["params"], states[4].params)
  leaf = restored["params"]["blocks"]["0"]["ffn"]["in"]
  assert leaf.sharding.mesh.shape == other.mesh.shape and len(leaf.addressable_shards) == 8


def test_checksums_do_not_depend_on_the_mesh(saved):
  _, _, states = saved
  plain = manifest.of(states[4].params)
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  placed = jax.device_put(states[4].params, sharding.param_shardings(states[4].params, mesh))
  assert manifest.of(placed) == plain
  assert manifest.of_segments(placed, MODEL) == manifest.of_segments(states[4].params, MODEL)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_every_single_bit_flip_changes_the_checksum(dtype):
  x = np.asarray(jnp.arange(60).reshape(3, 20).astype(dtype))
  sums = lambda a: tuple(map(int, checksums.whole(jnp.asarray(a.view(dtype)))))
  base, raw = sums(x), x.tobytes()
  flips = set()
  for bit in range(8 * len(raw)):
    damaged = bytearray(raw)
    damaged[bit // 8] ^= 1 << bit % 8
    flips.add(sums(np.frombuffer(bytes(damaged), x.dtype).reshape(x.shape)))
  assert base not in flips
  swapped = x.copy()
  swapped[0, 1], swapped[2, 7] = x[2, 7], x[0, 1]
  assert sums(swapped) != base


@pytest.mark.parametrize("bit", [29, 30, 31])
def test_two_flips_of_one_bit_do_not_cancel(bit):
  """In formats 1 and 2 any two elements that change sign did."""
  x = np.arange(60, dtype=np.uint32).reshape(3, 20)
  base = checksums.to_hex(checksums.whole(jnp.asarray(x)))
  for a, b in np.random.default_rng(0).choice(60, (100, 2)):
    damaged = x.copy()
    damaged.flat[a] ^= np.uint32(1 << bit)
    damaged.flat[b] ^= np.uint32(1 << bit)
    assert a == b or checksums.to_hex(checksums.whole(jnp.asarray(damaged))) != base


def test_restores_what_earlier_versions_wrote(saved, tmp_path):
  workdir, trainer, states = saved
  shutil.copytree(workdir, tmp_path / "run")
  meta = checkpoint.read_meta(workdir, 4)
  trees = {"params": states[4].params, "opt_state": states[4].opt_state}
  meta["format"], meta["manifest"] = 2, {n: manifest.of(tree, 2) for n, tree in trees.items()}
  meta["seal"] = checkpoint._seal(meta)
  path = tmp_path / "run" / checkpoint.STEPS_DIR / "4" / "meta" / "metadata"
  path.write_text(json.dumps(meta))
  restored, _, _ = checkpoint.restore(tmp_path / "run", 4, items(trainer))
  assert same(restored["params"], states[4].params)
  part = checksums.part(jnp.ones((2, 3)), (4, 3), (2, 0), 2)
  rest = checksums.part(jnp.ones((2, 3)), (4, 3), (0, 0), 2)
  assert [int(x) for x in part + rest] == [int(x) for x in checksums.whole(jnp.ones((4, 3)), 2)]


# ----------------------------------------------------------- what does not fit


def expect(saved, change, words):
  workdir, trainer, _ = saved
  abstract = jax.tree.map(lambda x: x, items(trainer))  # a copy with the same leaves
  change(abstract["params"])
  with pytest.raises(checkpoint.OtherCheckpoint, match=words):
    checkpoint.restore(workdir, 4, abstract)


def test_missing_extra_and_reshaped_leaves_are_named(saved):
  leaf = jax.ShapeDtypeStruct((3,), jnp.float32)
  expect(saved, lambda p: p.pop("embedding"), "leaf embedding is not part of this model")
  expect(saved, lambda p: p.update(extra=leaf), "leaf extra is missing")
  expect(saved, lambda p: p["final_norm"].update(scale=leaf), r"final_norm/scale has shape \[32\]")


def test_a_changed_value_is_named(saved, tmp_path):
  """A leaf rewritten by Orbax itself, so that only our manifest can tell."""
  import orbax.checkpoint as ocp

  workdir, trainer, states = saved
  shutil.copytree(workdir, tmp_path / "run")
  params = jax.tree.map(jnp.asarray, states[4].params)
  params["blocks"]["0"]["ffn"]["out"] = params["blocks"]["0"]["ffn"]["out"].at[1, 2, 3, 4].add(1e-6)
  target = tmp_path / "run" / checkpoint.STEPS_DIR / "4" / "params"
  shutil.rmtree(target)
  with ocp.StandardCheckpointer() as writer:
    writer.save(target, params)
  with pytest.raises(checkpoint.DamagedCheckpoint, match="blocks/0/ffn/out has checksum"):
    checkpoint.restore(tmp_path / "run", 4, items(trainer))


# ------------------------------------------------------------------- damage


def damage(path: pathlib.Path, kind: str, rng) -> None:
  content = bytearray(path.read_bytes())
  if kind == "delete":
    path.unlink()
  elif kind == "truncate":
    path.write_bytes(content[: rng.integers(0, max(len(content), 1))])
  else:
    for at in rng.integers(0, len(content), rng.integers(1, 4)):
      content[at] ^= 1 << rng.integers(0, 8) if kind == "flip" else rng.integers(1, 256)
    path.write_bytes(content)


@pytest.mark.slow
def test_200_random_damages_are_never_silent_and_always_resumable(saved, tmp_path):
  workdir, trainer, states = saved
  rng = np.random.default_rng(0)
  outcomes = {"harmless": 0, "set aside": 0}
  for trial in range(200):
    copy = tmp_path / str(trial)
    shutil.copytree(workdir, copy)
    step_dir = copy / checkpoint.STEPS_DIR / "4"
    targets = [p for p in files_of(step_dir) if p.stat().st_size > 0]
    # By size, so that data files, where Orbax alone notices nothing, are hit most.
    weights = np.sqrt([p.stat().st_size for p in targets])
    target = targets[rng.choice(len(targets), p=weights / weights.sum())]
    damage(target, ["flip", "overwrite", "truncate", "delete"][trial % 4], rng)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      restored, meta, _ = checkpoint.restore_newest(copy, items(trainer), repair=True)
    step = meta["step"]
    assert same(restored["params"], states[step].params), (trial, target)
    assert same(restored["opt_state"], states[step].opt_state), (trial, target)
    outcomes["harmless" if step == 4 else "set aside"] += 1
    if step != 4:
      assert step == 3 and (copy / checkpoint.DAMAGED_DIR / "4").is_dir()
      # The same number can be saved again, and is.
      if trial % 10 == 0:
        writer = checkpoint.Writer(copy, 2, 1, CARD)
        writer.save(4, states[4].params, states[4].opt_state, {"step": 4}, {"skipped": 0})
        writer.close()
        again, meta, _ = checkpoint.restore_newest(copy, items(trainer), repair=True)
        assert meta["step"] == 4 and same(again["params"], states[4].params)
    shutil.rmtree(copy)
  assert outcomes["set aside"] > 100, outcomes


def test_damage_everywhere_moves_nothing_and_is_an_error(saved, tmp_path):
  workdir, trainer, _ = saved
  shutil.copytree(workdir, tmp_path / "run")
  for step in (1, 3, 4):
    (tmp_path / "run" / checkpoint.STEPS_DIR / str(step) / "meta" / "metadata").write_text("{")
  with pytest.raises(checkpoint.NothingRestored, match="none of the 3 checkpoints.*/4: meta"):
    checkpoint.restore_newest(tmp_path / "run", items(trainer), repair=True)
  assert checkpoint.steps(tmp_path / "run") == [1, 3, 4]
  assert not (tmp_path / "run" / checkpoint.DAMAGED_DIR).exists()


def test_a_healthy_checkpoint_of_another_structure_is_not_called_damaged(saved, tmp_path):
  workdir, trainer, _ = saved
  shutil.copytree(workdir, tmp_path / "run")
  wanted = items(trainer)
  wanted["opt_state"] = wanted["opt_state"][1:]  # without clipping, say
  with pytest.raises(checkpoint.OtherCheckpoint, match="opt_state: leaf"):
    checkpoint.restore_newest(tmp_path / "run", wanted, repair=True)
  assert checkpoint.steps(tmp_path / "run") == checkpoint.steps(workdir)


@pytest.mark.parametrize(
  "error,words",
  [
    (ValueError("PERMISSION_DENIED: Permission denied"), "cannot be read.*Permission denied"),
    (OSError(24, "Too many open files"), "cannot be read.*Too many open files"),
    (MemoryError("no memory"), "no memory"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "Out of memory"),
  ],
)
def test_an_environment_that_fails_is_no_damage(saved, tmp_path, monkeypatch, error, words):
  workdir, trainer, _ = saved
  shutil.copytree(workdir, tmp_path / "run")

  def restore(*args, **kwargs):
    raise error

  monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", restore)
  with pytest.raises((UserError, MemoryError, jax.errors.JaxRuntimeError), match=words) as caught:
    checkpoint.restore_newest(tmp_path / "run", items(trainer), repair=True)
  assert not isinstance(caught.value, checkpoint.DamagedCheckpoint)
  assert checkpoint.steps(tmp_path / "run") == checkpoint.steps(workdir)


def test_a_damaged_newest_step_is_not_used(saved, tmp_path):
  """One whose meta has been altered, and is still JSON of the right step."""
  workdir, trainer, states = saved
  shutil.copytree(workdir, tmp_path / "run")
  path = tmp_path / "run" / checkpoint.STEPS_DIR / "4" / "meta" / "metadata"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"skipped": 7}))
  with pytest.warns(UserWarning, match="does not match its seal.*set aside"):
    restored, meta, _ = checkpoint.restore_newest(tmp_path / "run", items(trainer), repair=True)
  assert meta["step"] == 3 and same(restored["params"], states[3].params)


def test_an_empty_step_directory_does_not_block(saved, tmp_path):
  workdir, trainer, states = saved
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "run" / checkpoint.STEPS_DIR / "9").mkdir()
  (tmp_path / "run" / checkpoint.STEPS_DIR / "7.orbax-checkpoint-tmp-1").mkdir()
  with pytest.warns(UserWarning, match="set aside"):
    _, meta, _ = checkpoint.restore_newest(tmp_path / "run", items(trainer), repair=True)
  assert meta["step"] == 4
  writer = checkpoint.Writer(tmp_path / "run", 3, 1, CARD)
  writer.save(5, states[4].params, states[4].opt_state, {"step": 5}, {"skipped": 0})
  writer.close()
  assert 5 in checkpoint.steps(tmp_path / "run")


def test_a_full_disk_is_one_clear_error(saved, tmp_path, monkeypatch):
  _, trainer, states = saved
  writer = checkpoint.Writer(tmp_path, 1, 1, CARD)

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(writer._manager, "save", full)
  with pytest.raises(UserError, match="No space left on device.*free space.*intact"):
    writer.save(1, states[1].params, states[1].opt_state, {"step": 1})


@pytest.mark.parametrize(
  "error,words",
  [
    (OSError(122, "Disk quota exceeded"), "Disk quota exceeded"),
    (OSError(30, "Read-only file system"), "Read-only file system"),
    (ValueError("PERMISSION_DENIED: Error opening x [OS error 13: Permission denied]"), "denied"),
    (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed"), None),
    (jax.errors.JaxRuntimeError("ABORTED: peer said No space left on device"), None),
    (ConnectionResetError(104, "Connection reset by peer"), None),
    (TypeError("a bug"), None),
  ],
)
@pytest.mark.parametrize("method", ["save", "wait_until_finished", "check_for_errors"])
def test_only_the_file_system_is_blamed_for_a_failed_save(
  error, words, method, saved, tmp_path, monkeypatch
):
  _, _, states = saved
  writer = checkpoint.Writer(tmp_path, 1, 1, CARD)

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(writer._manager, method, fail)
  with pytest.raises(UserError if words else type(error), match=words) as raised:
    if method == "save":
      writer.save(1, states[1].params, states[1].opt_state, {"step": 1})
    else:
      writer.wait()
  assert words or raised.value is error


# ------------------------------------------------------------------- loading


def test_load(tiny_run):
  model = matformer_jax.load(tiny_run)
  assert model.step == 40 and model.config.num_layers == 2
  ids = model.tokenizer.encode("def main():\n    return 1\n")
  for g in ("S", "M*1+L*1", None):
    assert model.logits(ids, g).shape == (len(ids), 512)
  assert model.logits([ids, ids], "L").shape == (2, len(ids), 512)
  logp = jax.nn.log_softmax(model.logits(ids, "M"))[:-1]
  by_hand = -float(np.mean([logp[i, t] for i, t in enumerate(ids[1:])]))
  assert model.loss("def main():\n    return 1\n", "M") == pytest.approx(by_hand, rel=1e-4)
  shown = repr(model)
  for words in ("2 layers", "d_model 32", "XL", "41,120", "Mix'n'Match"):
    assert words in shown


def test_load_an_older_step(tiny_run):
  assert matformer_jax.load(tiny_run, step=30).step == 30
  with pytest.raises(UserError, match="no checkpoint of step 5; it has .*40"):
    matformer_jax.load(tiny_run, step=5)


@pytest.mark.parametrize(
  "tokens,words",
  [([600], "0..511"), ([-1], "0..511"), ([0.5], "integers"), ([], "shape"), ([[[1]]], "shape")],
)
def test_load_checks_tokens(tiny_run, tokens, words):
  with pytest.raises(UserError, match=words):
    matformer_jax.load(tiny_run).logits(tokens)


def test_load_skips_a_damaged_step_without_touching_it(tiny_run, tmp_path):
  shutil.copytree(tiny_run, tmp_path / "run")
  data = max(
    (tmp_path / "run" / checkpoint.STEPS_DIR / "40" / "params").rglob("*"),
    key=lambda p: p.stat().st_size if p.is_file() else 0,
  )
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 4
  data.write_bytes(content)
  with pytest.warns(UserWarning, match="skipped"):
    assert matformer_jax.load(tmp_path / "run").step == 30
  assert (tmp_path / "run" / checkpoint.STEPS_DIR / "40").is_dir()
  with pytest.raises(checkpoint.DamagedCheckpoint):
    matformer_jax.load(tmp_path / "run", step=40)


def test_load_survives_a_damaged_card(tiny_run, tmp_path):
  shutil.copytree(tiny_run, tmp_path / "run")
  (tmp_path / "run" / "config.json").write_text("{oops")
  with pytest.warns(UserWarning, match="using the copy in checkpoint 40"):
    assert matformer_jax.load(tmp_path / "run").step == 40


def test_load_refuses_another_tokenizer(tiny_run, tmp_path):
  shutil.copytree(tiny_run, tmp_path / "run")
  (tmp_path / "run" / "tokenizer.model").write_bytes(b"")
  with pytest.raises(UserError, match="tokenizer"):
    matformer_jax.load(tmp_path / "run")


def test_load_of_nothing(tmp_path):
  with pytest.raises(UserError, match="is not a run"):
    matformer_jax.load(tmp_path)


def test_card_holds_everything(tiny_run):
  card = json.loads((tiny_run / "config.json").read_text())
  assert card["versions"]["jax"] == jax.__version__
  assert card["config"]["optim"]["peak_lr"] == helpers.get_config("tiny").optim.peak_lr
  assert matformer_jax.model_config(card) == matformer_jax.load(tiny_run).config
  assert os.path.exists(tiny_run / "tokenizer.model")


def test_a_run_that_an_old_orbax_saved(tmp_path):
  """0.11.25 wrote no commit markers. The run is loaded, extracted from, and saved to again.

  The files are those of two steps of `tiny` with d_model=8, num_heads=2, ffn_ratios=(2.0,4.0) and
  head_ratios=(0.5,1.0).
  """
  with tarfile.open(helpers.ROOT / "tests" / "data" / "orbax_0.11.25.tar.gz") as archive:
    archive.extractall(tmp_path, filter="data")
  workdir = tmp_path / "run"
  model = matformer_jax.load(workdir)
  assert model.step == 2 and set(model.card["model"]["ffn_ratios"]) == {2.0, 4.0}
  extract(workdir, "G1", tmp_path / "small")
  small = matformer_jax.load(tmp_path / "small")
  tokens = np.arange(16)
  np.testing.assert_allclose(small.logits(tokens), model.logits(tokens, "G1"), rtol=1e-4, atol=1e-5)
  writer = checkpoint.Writer(workdir, keep_last=2, keep_best=0, card=model.card)
  writer.save(4, model.params, None, {"step": 4})
  writer.close()
  assert checkpoint.steps(workdir) == [2, 4]
  again = matformer_jax.load(workdir)
  assert again.step == 4
  for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
    np.testing.assert_array_equal(a, b)
