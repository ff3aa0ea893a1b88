"""Writes language models as GGUF files, which llama.cpp runs.

All layers of a `llama`, `qwen2`, `qwen3`, `gemma` or `arcee` model are equally wide. `deci` has
lists of heads, key/value heads and FFN widths by layer, and computes what `llama` does: as such a
mix keeps its true size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np
import tqdm

from matformer_jax.config import MatLMConfig, rope_scale
from matformer_jax.data.tokenizer import Tokenizer
from matformer_jax.errors import UserError, import_extra
from matformer_jax.formats import families, gguf_vocab, layout, sources

# --dtype -> (GGUF's type of the matrices, GGUF's type of file).
DTYPES = {
  "f32": ("F32", "ALL_F32"),
  "f16": ("F16", "MOSTLY_F16"),
  "bf16": ("BF16", "MOSTLY_BF16"),
  "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_BLOCK = 32  # numbers of Q8_0 with one scale
_OURS = {theirs: ours for ours, theirs in sources.GGUF_NAMES.items()}


@dataclasses.dataclass(frozen=True)
class Target:
  """How a model is written.

  Attributes:
    architecture: llama.cpp's name of it.
    family: `transformers`' class of the same layout.
    interleaved: whether rows of q and k are in the order (pair, half) of each head.
  """

  architecture: str
  family: families.Family
  interleaved: bool


def target_of(config: MatLMConfig) -> Target:
  """What llama.cpp can run a model as.

  Raises:
    UserError: where it has no architecture that computes what the model does.
  """

  def refuse(what: str) -> UserError:
    return UserError(f"--format=gguf: {what}; --format=hf and --format=stablehlo hold such a model")

  name = families.architecture_of(config)
  uniform = len(set(layout.layer_sizes(config))) == 1
  act = config.activation
  if config.gated and act not in ("silu", "gelu"):
    raise refuse(f"llama.cpp has no architecture with a gated {act}")
  if not config.gated and act != "relu2":
    raise refuse(f"llama.cpp's only architecture without a gate, arcee, is relu2's, not {act}'s")
  if not uniform and (not config.gated or act != "silu"):
    kind = f"gated {act}" if config.gated else f"ungated {act}"
    raise refuse(
      f"only layers of gated silu can differ in width in llama.cpp (as deci), not of {kind}"
    )
  if config.qkv_bias or config.qk_norm:
    has = "qkv_bias" if config.qkv_bias else "qk_norm"
    if not uniform:
      raise refuse(f"layers that differ in width cannot have {has} in llama.cpp")
    if act != "silu" or (config.qkv_bias and config.qk_norm):
      raise refuse(f"llama.cpp has no architecture with {has} and what else this model has")
  architecture, (_, interleaved) = next(
    (arch, entry) for arch, entry in sources.GGUF_ARCHITECTURES.items() if entry[0] == name
  )
  if not uniform:
    architecture = "deci"
  family = dataclasses.replace(families.FAMILIES[name], norm_offset=0.0)  # as it is multiplied
  if architecture == "gemma" and families.has_own_head(config, family):
    raise refuse(
      "llama.cpp's gemma has no head beside its embedding, which is scaled by sqrt(d_model); this "
      f"model has tied_head={config.tied_head} and embedding_scale={config.embedding_scale:g}"
    )
  if config.rope_scaling and architecture not in ("llama", "deci", "arcee"):
    raise refuse(f"llama.cpp's {architecture} does not scale RoPE as Llama 3 does")
  return Target(architecture, family, interleaved)


def check_dtype(config: MatLMConfig, dtype: str) -> None:
  """Raises UserError where rows of a matrix are no whole blocks of Q8_0."""
  if dtype != "q8_0":
    return
  width = config.queries_per_kv * config.head_dim
  rows = [("d_model", config.d_model)]
  for size in layout.layer_sizes(config):
    rows += [("heads x head_dim", size.kv_heads * width), ("FFN width", size.neurons)]
  for name, value in rows:
    if value % _BLOCK:
      raise UserError(
        f"--dtype=q8_0 stores {_BLOCK} numbers at a time, and this model has {name} {value}; give "
        "--dtype=f16 or another granularity"
      )


def write(
  file: pathlib.Path,
  config: MatLMConfig,
  params: Mapping[str, Any],
  tokenizer: Tokenizer,
  dtype: str = "f32",
  name: str = "matformer",
) -> str:
  """Writes weights, hyperparameters and vocabulary.

  Args:
    file: a path that does not exist yet.
    config: what `params`, a tree of float32 arrays, is.
    dtype: of matrices, a key of DTYPES; norms, biases and RoPE's factors are float32.
    name: of the model, for people.

  Returns:
    llama.cpp's name of the architecture.

  Raises:
    UserError: for what llama.cpp cannot hold, or a missing package.
  """
  gguf = import_extra("gguf", "writing GGUF", "gguf")
  target = target_of(config)
  check_dtype(config, dtype)
  vocab = gguf_vocab.from_tokenizer(tokenizer)
  kind, file_type = DTYPES[dtype]
  kind = gguf.GGMLQuantizationType[kind]
  writer = gguf.GGUFWriter(file, target.architecture, use_temp_file=False)
  writer.add_type(gguf.GGUFType.MODEL)
  writer.add_name(name)
  writer.add_file_type(gguf.LlamaFileType[file_type])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  _add_sizes(writer, config, target.architecture)
  gguf_vocab.add_to(writer, vocab, config.vocab_size)
  arrays = tqdm.tqdm(
    gguf_arrays(config, params, target), desc="writing", unit="array", mininterval=1.0
  )
  for array_name, array in arrays:
    if array.ndim == 1:
      writer.add_tensor(array_name, array)
    else:
      writer.add_tensor(array_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return target.architecture


def _add_sizes(writer: Any, config: MatLMConfig, architecture: str) -> None:
  sizes = layout.layer_sizes(config)
  by_layer = lambda values: values if architecture == "deci" else values[0]
  writer.add_block_count(config.num_layers)
  writer.add_context_length(config.seq_len)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(by_layer([s.neurons for s in sizes]))
  writer.add_head_count(by_layer([s.kv_heads * config.queries_per_kv for s in sizes]))
  writer.add_head_count_kv(by_layer([s.kv_heads for s in sizes]))
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_vocab_size(config.vocab_size)


def gguf_arrays(
  config: MatLMConfig, params: Mapping[str, Any], target: Target
) -> Iterator[tuple[str, np.ndarray]]:
  """(GGUF's name, float32 array), one after the other."""
  if config.rope_scaling:
    yield sources.ROPE_FACTORS, _rope_factors(config)
  for name, array in families.dense_arrays(config, params, target.family):
    *layer, part = name.removeprefix("model.layers.").split(".", 1)
    of_layer = name.startswith("model.layers.")
    stem, _, kind = (part if of_layer else name).rpartition(".")
    prefix = f"blk.{layer[0]}." if of_layer else ""
    if target.interleaved and stem in ("self_attn.q_proj", "self_attn.k_proj"):
      # Rows (half, pair) of each head, for llama.cpp (pair, half).
      split = array.reshape(-1, 2, config.head_dim // 2, *array.shape[1:])
      array = np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))
    yield f"{prefix}{_OURS[stem]}.{kind}", array


def _rope_factors(config: MatLMConfig) -> np.ndarray:
  """By how much Llama 3's scaling stretches each wavelength."""
  scale = rope_scale(config.head_dim, config.rope_base, config.rope_scaling)
  return (1 / scale).astype(np.float32)


def check_arrays(
  file: pathlib.Path, expected: Iterator[tuple[str, np.ndarray]], dtype: str
) -> None:
  """Reads a file's arrays back.

  Raises:
    UserError: where one is missing, or differs by more than its type rounds.
  """
  gguf = import_extra("gguf", "reading GGUF", "gguf")
  have = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
  relative = {"f32": 0.0, "f16": 2e-3, "bf16": 8e-3, "q8_0": 1e-2}[dtype]
  for name, array in expected:
    if name not in have:
      raise UserError(f"{file} lacks the array {name} that was to be written")
    back = gguf.dequantize(have[name].data, have[name].tensor_type)
    if back.shape != array.shape or np.abs(back - array).max() > relative * np.abs(array).max():
      raise UserError(f"{file}: {name} does not read back as it was written")
