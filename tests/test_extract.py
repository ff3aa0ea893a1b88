"""Submodels cut out of checkpoints."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import matformer_jax
from matformer_jax import UserError
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import checkpoint, manifest
from matformer_jax.config import MatLMConfig
from matformer_jax.extract import extract
from matformer_jax.models import matlm, slicing


@pytest.mark.parametrize("granularity", ["S", "M*1+L*1", "XL"])
def test_an_extracted_model_is_the_slice(tiny_run, tmp_path, granularity):
  extract(tiny_run, granularity, tmp_path / "out")
  universal, own = matformer_jax.load(tiny_run), matformer_jax.load(tmp_path / "out")
  tokens = np.arange(60).reshape(2, 30)
  np.testing.assert_array_equal(own.logits(tokens), universal.logits(tokens, granularity))
  np.testing.assert_array_equal(own.logits(tokens, "S"), universal.logits(tokens, "S"))
  assert own.step == universal.step and own.tokenizer.sha256 == universal.tokenizer.sha256
  wanted = gran.count(universal.config, granularity).params
  assert sum(x.size for x in jax.tree.leaves(own.params)) == wanted
  assert own.card["extracted"]["granularity"] == granularity
  assert not list(tmp_path.glob("out.tmp*"))


def test_extracting_twice_is_extracting_once(tiny_run, tmp_path):
  extract(tiny_run, "M*1+L*1", tmp_path / "ml")
  extract(tmp_path / "ml", "S*1+M*1", tmp_path / "twice")
  extract(tiny_run, "S*1+M*1", tmp_path / "once")
  a, b = (matformer_jax.load(tmp_path / name).params for name in ("twice", "once"))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_extraction_of_other_trees(small, tmp_path):
  """Gated, grouped, nested heads: every kind of leaf and slice, through the disk."""
  grouped = helpers.GROUPED | dict(ffn_groups=2)
  config = dataclasses.replace(small, nested_heads=True, **grouped)
  save(tmp_path / "u", config)
  params = matlm.init_params(config, jax.random.key(0))
  for text in ("S*1+L*3", "M*2+L*2/S*1+XL*3"):
    g = gran.parse(text, config)
    out = tmp_path / text.replace("/", "-")
    sub = extract(tmp_path / "u", text, out)
    want = slicing.slice_params(params, config, g)
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
      ),
      want,
    )
    have, _, _ = checkpoint.restore(out, 1, {"params": shapes})
    jax.tree.map(np.testing.assert_array_equal, have["params"], want)
    assert sub == gran.submodel_config(config, g)


def save(path: pathlib.Path, config: MatLMConfig, params=None, step: int = 1) -> None:
  """A model directory without training; its tokenizer is a placeholder."""
  path.mkdir(parents=True, exist_ok=True)
  card = {
    "task": "matlm",
    "model": config.to_dict(),
    "identity": {"tokenizer": "", "tokens": ""},
    "config": {},
  }
  (path / "config.json").write_text(json.dumps(card))
  (path / "tokenizer.model").write_bytes(b"")
  writer = checkpoint.Writer(path, 3, 0, card)
  params = matlm.init_params(config, jax.random.key(0)) if params is None else params
  writer.save(step, params, None, {"step": step})
  writer.close()


def disk_bytes(path: pathlib.Path) -> int:
  return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def test_size_on_disk_follows_the_parameters(tmp_path):
  config = MatLMConfig(vocab_size=64, num_layers=4, d_model=256, num_heads=4, seq_len=16)
  save(tmp_path / "u", config)
  for name in ("S", "M*2+L*2"):
    extract(tmp_path / "u", name, tmp_path / name)
    ratio = disk_bytes(tmp_path / name / "checkpoints") / disk_bytes(tmp_path / "u" / "checkpoints")
    wanted = gran.count(config, name).params / gran.count(config, "XL").params
    assert ratio == pytest.approx(wanted, abs=0.03)


def damage(step: pathlib.Path) -> None:
  """Flips a bit in the middle of every data file of the parameters."""
  for path in (step / "params").rglob("*"):
    if path.is_file() and path.parent.name == "d":
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)


def test_a_damaged_slice_is_never_extracted(tiny_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(tiny_run, workdir)
  newest = checkpoint.steps(workdir)[-1]
  damage(workdir / checkpoint.STEPS_DIR / str(newest))
  with pytest.raises(checkpoint.DamagedCheckpoint, match=f"{newest}.*leaf"):
    extract(workdir, "XL", tmp_path / "a", step=newest)
  assert not (tmp_path / "a").exists()
  with pytest.warns(UserWarning, match="trying the step before"):
    extract(workdir, "XL", tmp_path / "b")
  assert matformer_jax.load(tmp_path / "b").step == checkpoint.steps(workdir)[-2]


def test_a_checkpoint_without_slice_checksums_says_so(tiny_run, tmp_path, monkeypatch):
  real = checkpoint.read_meta
  monkeypatch.setattr(
    checkpoint, "read_meta", lambda *a: {k: v for k, v in real(*a).items() if k != "slices"}
  )
  with pytest.raises(checkpoint.DamagedCheckpoint, match="earlier version.*resume its training"):
    extract(tiny_run, "S", tmp_path / "out", step=40)


def test_slice_checksums_add_up(small, small_params):
  """Each leaf's table sums to the leaf's own checksum."""
  whole = manifest.of(small_params)
  for name, table in manifest.of_segments(small_params, small).items():
    for half in (0, 8):
      total = sum(int(text[half : half + 8], 16) for row in table for text in row) % 2**32
      assert total == int(whole[name]["checksum"][half : half + 8], 16)


def test_mistakes(tiny_run, tmp_path):
  (tmp_path / "taken").mkdir()
  (tmp_path / "taken" / "file").write_text("mine")
  for args, words in [
    (("M*3", tmp_path / "x"), "3 layers"),
    (("S", tmp_path / "taken"), "not empty"),
    (("S", tmp_path / "x", 7), "no checkpoint of step 7"),
  ]:
    with pytest.raises(UserError, match=words):
      extract(tiny_run, *args)
  assert (tmp_path / "taken" / "file").read_text() == "mine"
  with pytest.raises(UserError, match="is not a run"):
    extract(tmp_path / "nowhere", "S", tmp_path / "x")


@pytest.mark.slow
def test_memory_follows_the_submodel(tmp_path):
  """310M's shape with a small vocabulary: peak memory above an idle process's."""
  row = helpers.get_config("310M").model
  row.vocab_size = 1024
  config = MatLMConfig.from_dict(row)
  shapes = jax.eval_shape(lambda: matlm.init_params(config, jax.random.key(0)))
  save(
    tmp_path / "u",
    config,
    jax.tree.map(
      lambda s: jax.random.bits(jax.random.key(s.size), s.shape, jnp.uint32).view(jnp.float32),
      shapes,
    ),
  )
  program = """
import re, sys
import jax, orbax.checkpoint
from matformer_jax.extract import extract
jax.numpy.zeros(1).block_until_ready()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
extract(*sys.argv[1:])
print(peak() - before)
"""
  used = {}
  for name in ("S", "XL"):
    result = subprocess.run(
      [sys.executable, "-c", program, tmp_path / "u", name, tmp_path / name],
      env=helpers.PROGRAM_ENV,
      capture_output=True,
      text=True,
    )
    assert result.returncode == 0, result.stderr
    used[name] = 1024 * int(result.stdout) / (4 * gran.count(config, name).params)
    shutil.rmtree(tmp_path / name)
  assert used["S"] < 1.25 * used["XL"], used  # bytes of memory per byte of submodel
  assert used["S"] < 4, used
