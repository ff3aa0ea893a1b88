"""Dense models of others: read, sorted, and used like any other model."""

import dataclasses
import json

import flax.linen as nn
from helpers import run_program
import jax
from llama_files import HF, arrays, write_directory, write_gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import matformer_jax
from matformer_jax import UserError
from matformer_jax import granularity as gran
from matformer_jax.config import Execution
from matformer_jax.evals import importance
from matformer_jax.formats import families, sources
from matformer_jax.loading import open_task
from matformer_jax.models import matlm

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)


def logits(config, params, granularity=None):
  g = gran.parse(granularity, config) if granularity else gran.full(config)
  return np.asarray(
    matlm.MatLM(config, Execution()).apply({"params": params}, TOKENS, granularity=g)
  )


def read(source, widths=(12, 24, 36, 48), **changes):
  config = families.model_config(source, widths, **changes)
  return config, families.read_params(source, config)


def test_gguf_and_safetensors_are_the_same_model(tmp_path):
  weights = arrays()
  directory = sources.open_source(write_directory(tmp_path / "hf", weights))
  file = sources.open_source(write_gguf(tmp_path / "model.gguf", weights))
  (config, params), (same, own) = read(directory), read(file)
  assert config == same
  jax.tree.map(np.testing.assert_array_equal, params, own)
  assert np.ptp(logits(config, params)) > 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_types_are_read_as_float32(tmp_path, dtype):
  narrow = {name: array.astype(dtype) for name, array in arrays().items()}
  _, params = read(sources.open_source(write_directory(tmp_path / "hf", narrow)))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
  np.testing.assert_array_equal(
    params["embedding"], narrow["model.embed_tokens.weight"].astype(np.float32)
  )


@pytest.mark.parametrize(
  "changes,words",
  [
    ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not one of"),
    ({"attention_bias": True}, "attention_bias"),
    ({"sliding_window": 32}, "sliding_window=32"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "RoPE of type 'yarn'"),
    ({"num_hidden_layers": 4}, "no array 'model.layers.3"),
    ({"num_hidden_layers": 2}, "9 arrays that this architecture does not"),
    ({"vocab_size": 65}, r"embed_tokens.weight is \[64, 32\]"),
    ({"rms_norm_eps": None}, "no rms_norm_eps"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "without low_freq_factor"),
  ],
)
def test_what_is_refused(tmp_path, changes, words):
  path = write_directory(tmp_path / "hf", arrays(), HF | changes)
  with pytest.raises(UserError, match=words):
    read(sources.open_source(path))


def test_what_is_no_model(tmp_path):
  for make, words in [
    (lambda p: None, "does not exist"),
    (lambda p: p.mkdir(), "config.json cannot be read"),
    (lambda p: p.write_text("x"), "neither a directory nor a .gguf file"),
  ]:
    path = tmp_path / words[:4]
    make(path)
    with pytest.raises(UserError, match=words):
      sources.open_source(path)
  path = tmp_path / "bad.gguf"
  path.write_bytes(b"GGUF" + bytes(40))
  with pytest.raises(UserError, match="cannot be read as GGUF"):
    sources.open_source(path)
  for broken, words in [
    (dict(norm_eps=None), "no field llama.attention.layer_norm_rms_epsilon"),
    (dict(rope_scale=4.0), "RoPE of type 'linear'"),
  ]:
    with pytest.raises(UserError, match=words):
      read(sources.open_source(write_gguf(path, arrays(), **broken)))
  untied = {name: array for name, array in arrays().items() if name != "lm_head.weight"}
  with pytest.raises(UserError, match="no array 'lm_head.weight'"):
    read(sources.open_source(write_directory(tmp_path / "headless", untied)))
  path = write_directory(tmp_path / "part", arrays())
  (path / "model-2.safetensors").unlink()
  with pytest.raises(UserError, match="download is not complete"):
    sources.open_source(path)
  (path / "model-1.safetensors").rename(path / "pytorch_model.bin")
  with pytest.raises(UserError, match="pickled"):
    sources.open_source(path)


def test_other_weights_beside_the_listed_ones_are_not_read(tmp_path):
  path = write_directory(tmp_path / "hf", arrays())
  save_file({"layers.0.attention.wq.weight": np.zeros(2)}, path / "consolidated.safetensors")
  read(sources.open_source(path))


@pytest.mark.parametrize("groups", [1, 2])
def test_sorting_leaves_the_function_and_puts_the_best_first(tmp_path, groups):
  source = sources.open_source(write_directory(tmp_path / "hf", arrays()))
  nested = dict(nested_heads=True, head_ratios=(0.5, 1), ffn_groups=groups)
  if groups == 2:
    nested = dict(ffn_groups=2, head_groups=2)
  config, params = read(source, (24, 48), **nested)
  before = logits(config, params)
  scores = importance.measure(params, config, Execution(), [TOKENS[:1], TOKENS[1:]])
  unsorted = jax.tree.map(np.copy, params)
  params = importance.sort(params, scores)
  np.testing.assert_allclose(logits(config, params), before, atol=1e-5 * np.abs(before).max())
  again = importance.measure(params, config, Execution(), [TOKENS])
  for name, score in again.items():
    flat = np.moveaxis(score, 1, 2).reshape(len(score), -1)  # the order in which slices grow
    assert np.all(np.diff(flat, axis=1) <= 1e-5 * flat.max()), name
    np.testing.assert_allclose(
      np.sort(flat), np.sort(scores[name].reshape(len(score), -1)), rtol=1e-4
    )
  error = lambda p: np.abs(logits(config, p, "G1") - before).mean()
  assert error(params) < error(unsorted)


def test_importance_is_what_a_part_adds(tmp_path):
  """Against the model itself: how much a layer's output moves without one neuron, or head."""
  source = sources.open_source(write_directory(tmp_path / "hf", arrays()))
  config, params = read(source, (48,), nested_heads=True, head_ratios=(1,))
  scores = importance.measure(params, config, Execution(), [TOKENS])
  model = matlm.MatLM(dataclasses.replace(config, num_layers=1, spans=()), Execution())
  first = jax.tree.map(lambda x: x[:1], params["blocks"])
  run = lambda blocks: np.asarray(_residual(model, {**params, "blocks": blocks}))
  whole = run(first)
  for neuron in (0, 7, 31):
    less = jax.tree.map(np.copy, first)
    less["0"]["ffn"]["out"][0, 0, neuron] = 0
    moved = np.mean(np.sum((run(less) - whole) ** 2, -1))
    np.testing.assert_allclose(moved, scores["neurons"][0, 0, neuron], rtol=1e-4)


def _residual(model, params):
  """The hidden state before the last norm."""
  captured = {}

  def intercept(next_fun, args, kwargs, context):
    if context.module.name == "final_norm":
      captured["x"] = args[0]
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(intercept):
    model.apply({"params": params}, TOKENS)
  return captured["x"]


def test_a_dense_model_becomes_elastic_and_is_used_like_any_other(dense_llama, tmp_path):
  out, text = tmp_path / "elastic", f"text:{dense_llama}/text/*.txt"
  flags = [f"--from={dense_llama}", f"--out={out}"]
  result = run_program("import_model", *flags, f"--calibration={text}", "--calibration_tokens=256")
  assert result.returncode == 0, result.stderr
  assert "wrote LlamaForCausalLM" in result.stdout
  tokens = TOKENS[:, :16]
  config, params = read(sources.open_source(dense_llama))
  want = np.asarray(matlm.MatLM(config, Execution()).apply({"params": params}, tokens))
  model = matformer_jax.load(out)
  np.testing.assert_allclose(model.logits(tokens), want, atol=1e-5 * np.abs(want).max())
  moved = [np.asarray(p["blocks"]["0"]["ffn"]["out"]) for p in (model.params, params)]
  assert not np.allclose(*moved) and np.allclose(*(np.sort(x, axis=2) for x in moved))
  assert model.tokenizer.decode(model.tokenizer.encode("def f(x):\r\n")) == "def f(x):\r\n"

  result = run_program("describe", "--config=elastify", f"--config.init_from={out}")
  assert f"{gran.count(model.config, 'XL').params:,}" in result.stdout

  train = ["--config=configs/elastify.py", f"--workdir={tmp_path / 'run'}"]
  train += [f"--config.init_from={out}", f"--config.data.source={text}"]
  values = {"steps": 4, "batch_size": 2, "model.seq_len": 32, "eval.batches": 1, "log_every": 1}
  train += [f"--config.{k}={v}" for k, v in values.items()]
  train += ["--config.distill.teacher=parent", "--config.distill.weight=0.5"]
  result = run_program("train", *train)
  assert result.returncode == 0, result.stderr
  other = f"--source={text}"
  found = f"--out={tmp_path / 'search'}"
  for workdir, program, *more in (
    (out, "evaluate", other, f"--json={tmp_path / 'evaluation.json'}"),
    (out, "search", other, found, "--budgets=0.9x", "--random=2", "--rungs=2", "--batches=2"),
    (tmp_path / "run", "evaluate"),
    (tmp_path / "run", "describe", "--budget=0.9x"),
    (tmp_path / "run", "generate", "--prompt=def", "--granularity=S", "--max_tokens=4"),
    (tmp_path / "run", "extract", "--granularity=M", f"--out={tmp_path / 'small'}"),
  ):
    result = run_program(program, f"--workdir={workdir}", *more)
    assert result.returncode == 0, (program, workdir, result.stderr)
  for file in ("evaluation.json", "search/search.json"):
    assert json.loads((tmp_path / file).read_text())["source"] == text
  assert "--out" in run_program("search", f"--workdir={out}", other).stderr


def test_text_is_measured_with_the_models_own_tokenizer(tiny_run, dense_llama):
  result = run_program("evaluate", f"--workdir={tiny_run}", "--source=tokens:/nowhere")
  assert result.returncode == 1 and "/nowhere" in result.stderr
  text = f"text:{dense_llama}/text/*.txt"
  losses = [
    open_task(matformer_jax.load(tiny_run), source).store.fingerprint for source in (None, text)
  ]
  assert losses[0] != losses[1]
