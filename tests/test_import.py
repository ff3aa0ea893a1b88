"""Dense models of others: read, sorted, and used like any other model."""

import dataclasses
import json
import pathlib

import flax.linen as nn
import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from matformer_jax import UserError
from matformer_jax import granularity as gran
from matformer_jax.config import Execution
from matformer_jax.evals import importance
from matformer_jax.formats import families, sources
from matformer_jax.models import matlm

HF = dict(
  architectures=["LlamaForCausalLM"],
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=10,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  rope_theta=20_000.0,
  tie_word_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
  """A random Llama's, by the names of transformers."""
  d, m, h, kv = 32, 48, 40, 20
  shapes = {"model.embed_tokens": (64, d), "lm_head": (64, d), "model.norm": (d,)}
  for i in range(3):
    layer = {
      "input_layernorm": (d,),
      "post_attention_layernorm": (d,),
      "self_attn.q_proj": (h, d),
      "self_attn.k_proj": (kv, d),
      "self_attn.v_proj": (kv, d),
      "self_attn.o_proj": (d, h),
      "mlp.gate_proj": (m, d),
      "mlp.up_proj": (m, d),
      "mlp.down_proj": (d, m),
    }
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  rng = np.random.default_rng(seed)
  return {
    f"{name}.weight": rng.normal(0.5 if len(shape) == 1 else 0, 0.3, shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def write_directory(path: pathlib.Path, weights, config=HF) -> pathlib.Path:
  """In two files, as large models are."""
  path.mkdir(exist_ok=True)
  names = sorted(weights)
  parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
  for file, part in parts.items():
    save_file({n: weights[n] for n in part}, path / file)
  index = {n: file for file, part in parts.items() for n in part}
  (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  (path / "config.json").write_text(json.dumps(config))
  return path


def write_gguf(path: pathlib.Path, weights) -> pathlib.Path:
  """As llama.cpp's converter does: rows of q and k in interleaved order."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(3)
  writer.add_context_length(64)
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(48)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_key_length(10)
  writer.add_value_length(10)
  writer.add_rope_freq_base(20_000.0)
  writer.add_layer_norm_rms_eps(1e-5)
  names = {theirs: ours for ours, theirs in sources.GGUF_NAMES.items()}
  for name, array in weights.items():
    *layer, part = name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)
    prefix = f"blk.{layer[0]}." if name.startswith("model.layers.") else ""
    part = part if prefix else name.removesuffix(".weight")
    for projection, heads in (("q_proj", 4), ("k_proj", 2)):
      if projection in name:
        array = array.reshape(heads, 2, 5, 32).swapaxes(1, 2).reshape(array.shape)
    writer.add_tensor(f"{prefix}{names[part]}.weight", np.ascontiguousarray(array))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


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
  path = write_directory(tmp_path / "part", arrays())
  (path / "model-2.safetensors").unlink()
  with pytest.raises(UserError, match="download is not complete"):
    sources.open_source(path)
  (path / "model-1.safetensors").rename(path / "pytorch_model.bin")
  with pytest.raises(UserError, match="pickled"):
    sources.open_source(path)


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
