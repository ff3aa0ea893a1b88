"""Writes language models as `transformers` reads them: a directory with safetensors.

A uniform size has its true size. `transformers`' own classes make all layers one width, so a mix
is padded with zeros to its widest layer, or is kept at its true size by a class that is copied
beside the weights (remote_code/).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import json
import pathlib
import shutil
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy bfloat16, which safetensors writes
import numpy as np
import tqdm

from matformer_jax.config import MatLMConfig, ModelConfig
from matformer_jax.data.tokenizer import Tokenizer
from matformer_jax.errors import UserError, import_extra
from matformer_jax.formats import families, hf_tokenizer, layout

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SHARD_BYTES = 5 * 10**9  # as large as `transformers` makes a file
REMOTE_CODE = pathlib.Path(__file__).parent / "remote_code" / "modeling_matformer.py"
_MODEL_TYPES = {
  "LlamaForCausalLM": "llama",
  "Qwen2ForCausalLM": "qwen2",
  "Qwen3ForCausalLM": "qwen3",
  "GemmaForCausalLM": "gemma",
  "ArceeForCausalLM": "arcee",
}


def is_mix(config: ModelConfig) -> bool:
  """Whether the layers that a model stores differ in width."""
  return len(set(layout.layer_sizes(config))) > 1


def common_size(config: MatLMConfig) -> layout.LayerSize:
  """To which `transformers`' own classes need all layers padded: the widest, or a few heads more.

  Raises:
    UserError: where no number of heads divides d_model, as LlamaConfig wants.
  """
  widest, ratio = layout.widest(layout.layer_sizes(config)), config.queries_per_kv
  for kv_heads in range(widest.kv_heads, config.num_kv_heads + 1):
    if config.d_model % (kv_heads * ratio) == 0:
      return layout.LayerSize(widest.neurons, kv_heads)
  raise UserError(
    f"model.d_model={config.d_model} is not divisible by the {widest.kv_heads * ratio} attention "
    "heads, which transformers demands; --mixed=remote_code has no such rule"
  )


def padding_bytes(config: MatLMConfig, dtype: str) -> int:
  """By how much `common_size` makes the weights larger than the model's own widths do."""
  sizes, widest = layout.layer_sizes(config), common_size(config)
  neuron = config.d_model * (3 if config.gated else 2)
  rows = config.head_dim * (config.queries_per_kv + 2)  # of a key/value head with its queries
  head = config.d_model * config.head_dim * (2 * config.queries_per_kv + 2)
  head += rows if config.qkv_bias else 0
  elements = sum(
    neuron * (widest.neurons - size.neurons) + head * (widest.kv_heads - size.kv_heads)
    for size in sizes
  )
  return elements * np.dtype(DTYPES[dtype]).itemsize


def write(
  out: pathlib.Path,
  config: MatLMConfig,
  params: Mapping[str, Any],
  tokenizer: Tokenizer,
  dtype: str = "f32",
  remote_code: bool = False,
) -> str:
  """Writes weights, config, generation config and tokenizer.

  Args:
    out: an existing directory.
    config: what `params`, a tree of float32 arrays, is.
    dtype: of the weights, a key of DTYPES.
    remote_code: write a mix at its true size, for `trust_remote_code=True`.

  Returns:
    The class that `transformers` loads it as.

  Raises:
    UserError: for a model that no class of `transformers` computes, or a missing package.
  """
  architecture = families.architecture_of(config)
  described = hf_config(config, tokenizer, architecture, dtype)
  family = families.FAMILIES[architecture]
  if remote_code:
    # It is Llama with layers of its own, whatever the family.
    family = families.FAMILIES["LlamaForCausalLM"]
    architecture = "MatFormerForCausalLM"
    described |= _remote_config(config, family)
    shutil.copyfile(REMOTE_CODE, out / REMOTE_CODE.name)
  arrays = families.dense_arrays(
    config, params, family, None if remote_code else common_size(config)
  )
  write_safetensors(out, _with_output_bias(arrays, config, described), DTYPES[dtype])
  write_json(out / "config.json", described)
  ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
  write_json(out / "generation_config.json", {"_from_model_config": True, **ends})
  for name, content in hf_tokenizer.files(tokenizer).items():
    (out / name).write_bytes(content)
  return architecture


def hf_config(
  config: MatLMConfig, tokenizer: Tokenizer, architecture: str, dtype: str
) -> dict[str, Any]:
  """The `config.json` of a model padded to its widest layer."""
  family = families.FAMILIES[architecture]
  size = common_size(config)
  activation = families.written_activation(config)
  rope: dict[str, Any] = {"rope_type": "default"}
  if config.rope_scaling:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope = {"rope_type": "llama3", **dict(zip(keys, config.rope_scaling))}
    if rope[keys[-1]] != int(rope[keys[-1]]):
      raise UserError(f"rope_scaling={config.rope_scaling}: its last number must be whole there")
    rope[keys[-1]] = int(rope[keys[-1]])
  return {
    "architectures": [architecture],
    "model_type": _MODEL_TYPES[architecture],
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "intermediate_size": size.neurons,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": size.kv_heads * config.queries_per_kv,
    "num_key_value_heads": size.kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": activation,
    "hidden_activation": activation,  # where Gemma's is
    "max_position_embeddings": config.seq_len,
    "rms_norm_eps": config.norm_eps,
    "rope_parameters": {**rope, "rope_theta": config.rope_base},
    # As versions before 5 name them.
    "rope_theta": config.rope_base,
    "rope_scaling": rope if config.rope_scaling else None,
    "tie_word_embeddings": not families.has_own_head(config, family),
    "attention_bias": config.qkv_bias and not family.qkv_bias,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id,
    "pad_token_id": None,
    "dtype": DTYPES[dtype],
  }


def _remote_config(config: MatLMConfig, family: families.Family) -> dict[str, Any]:
  """What config.json says besides of a mix at its true size."""
  sizes = layout.layer_sizes(config)
  module = REMOTE_CODE.stem
  return {
    "architectures": ["MatFormerForCausalLM"],
    "model_type": "matformer",
    "auto_map": {
      "AutoConfig": f"{module}.MatFormerConfig",
      "AutoModelForCausalLM": f"{module}.MatFormerForCausalLM",
    },
    "intermediate_sizes": [size.neurons for size in sizes],
    "attention_heads": [size.kv_heads * config.queries_per_kv for size in sizes],
    "key_value_heads": [size.kv_heads for size in sizes],
    "gated": config.gated,
    "qk_norm": config.qk_norm,
    "attention_bias": config.qkv_bias,
    "tie_word_embeddings": not families.has_own_head(config, family),
  }


def _with_output_bias(
  arrays: Iterable[tuple[str, np.ndarray]], config: MatLMConfig, described: Mapping[str, Any]
):
  """Where `attention_bias` gives the output projection a bias too, it is zero."""
  for name, array in arrays:
    yield name, array
    if described["attention_bias"] and name.endswith("o_proj.weight"):
      yield name.replace("weight", "bias"), np.zeros(config.d_model, np.float32)


# ------------------------------------------------------------------------ files


def write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(
  out: pathlib.Path,
  arrays: Iterable[tuple[str, np.ndarray]],
  dtype: str,
  shard_bytes: float = SHARD_BYTES,
) -> None:
  """Writes arrays as `model.safetensors`; in several files with an index, if they are large.

  Args:
    arrays: (name, float32 array); one file's are in memory at a time.
    dtype: as NumPy names it.
    shard_bytes: of one file, at most.
  """
  save = import_extra("safetensors.numpy", "writing safetensors", "export").save_file
  parts: list[list[str]] = []
  part: dict[str, np.ndarray] = {}
  total = size = 0

  def flush() -> None:
    file = out / f"model-{len(parts) + 1:05d}.safetensors"
    save(part, file, metadata={"format": "pt"})
    parts.append(list(part))
    part.clear()

  for name, array in tqdm.tqdm(arrays, desc="writing", unit="array", mininterval=1.0):
    cast = np.ascontiguousarray(array.astype(dtype))
    if part and size + cast.nbytes > shard_bytes:
      flush()
      size = 0
    part[name] = cast
    size += cast.nbytes
    total += cast.nbytes
  flush()
  if len(parts) == 1:
    (out / "model-00001.safetensors").rename(out / "model.safetensors")
    return
  weight_map = {}
  for i, names in enumerate(parts, 1):
    file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
    (out / f"model-{i:05d}.safetensors").rename(out / file)
    weight_map |= dict.fromkeys(names, file)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_json(out / "model.safetensors.index.json", index)


def refuse_dtype(dtype: str, target: str, known: Iterable[str]) -> None:
  """Raises UserError for a dtype that a target does not have."""
  if dtype not in known:
    raise UserError(f"--dtype={dtype} is not for --format={target}; give one of {', '.join(known)}")
