"""Dense models as other frameworks write them, small enough for tests."""

import json
import pathlib

import gguf
from helpers import byte_level_library
import numpy as np
from safetensors.numpy import save_file

from matformer_jax.formats import sources

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


def arrays(seed: int = 0, vocab_size: int = 64, scale: float = 0.3) -> dict[str, np.ndarray]:
  """A random Llama's, by the names of transformers."""
  d, m, h, kv = 32, 48, 40, 20
  shapes = {"model.embed_tokens": (vocab_size, d), "lm_head": (vocab_size, d), "model.norm": (d,)}
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
    f"{name}.weight": rng.normal(0.5 if len(shape) == 1 else 0, scale, shape).astype(np.float32)
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


def write_gguf(path: pathlib.Path, weights, norm_eps=1e-5, rope_scale=None) -> pathlib.Path:
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
  if norm_eps:
    writer.add_layer_norm_rms_eps(norm_eps)
  if rope_scale:
    writer.add_float32("llama.rope.scale_linear", rope_scale)
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


def write_readable(path: pathlib.Path) -> pathlib.Path:
  """A directory with a tokenizer too, and a text of three documents beside it (path/text)."""
  text = path / "text"
  text.mkdir(parents=True)
  documents = [pathlib.Path(f.__file__).read_text()[:40_000] for f in (json, pathlib, np.testing)]
  for i, document in enumerate(documents):
    (text / f"{i}.txt").write_text(document)
  byte_level_library(documents, 400).save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
  return write_directory(path, arrays(vocab_size=400, scale=0.15), HF | {"vocab_size": 400})
