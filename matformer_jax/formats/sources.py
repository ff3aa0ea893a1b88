"""Reads dense models from disk, one array at a time: a Hugging Face directory or a GGUF file.

Whichever it is, configuration and arrays go by the names that `transformers` gives them, so
that families.py has one way to say what an architecture is.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy bfloat16, in which safetensors returns arrays
import numpy as np

from matformer_jax import storage
from matformer_jax.data.tokenizer import Tokenizer, open_tokenizer
from matformer_jax.errors import UserError, import_extra
from matformer_jax.formats import gguf_vocab

WHAT_TO_GIVE = "a Hugging Face directory or a .gguf file"


@dataclasses.dataclass(frozen=True)
class Source:
  """A dense model on disk.

  Attributes:
    path: where it is, as the user named it.
    config: as `config.json` of `transformers`.
    names: of its arrays.
    read: name -> float32 array of its own.
    tokenizer: opens its tokenizer.
  """

  path: storage.Path
  config: dict[str, Any]
  names: frozenset[str]
  read: Callable[[str], np.ndarray]
  tokenizer: Callable[[], Tokenizer]


def open_source(path: str | os.PathLike) -> Source:
  """A directory with `config.json` and `*.safetensors`, or a `.gguf` file.

  Of a bucket it is copied to this machine first: libraries read these formats from files.

  Raises:
    UserError: for anything else, or what is damaged or incomplete.
  """
  named = storage.path(path)
  if not named.exists():
    raise UserError(f"--from={named} does not exist; give {WHAT_TO_GIVE} (nothing is downloaded)")
  here = storage.local_copy(named)
  try:
    return dataclasses.replace(_open(here), path=named)
  except UserError as e:
    raise UserError(str(e).replace(os.fspath(here), os.fspath(named))) from e


def _open(path: pathlib.Path) -> Source:
  if path.is_dir():
    return _open_directory(path)
  if path.is_file() and path.suffix == ".gguf":
    return _open_gguf(path)
  raise UserError(f"--from={path} is neither a directory nor a .gguf file")


def _package(name: str) -> Any:
  return import_extra(name, "reading such a model", "import")


# ------------------------------------------------------------------ safetensors


def _open_directory(path: pathlib.Path) -> Source:
  safetensors = _package("safetensors")
  config = _read_object(path / "config.json")
  listed = path / "model.safetensors.index.json"
  weight_map = _read_object(listed).get("weight_map", {}) if listed.exists() else {}
  # Beside what is listed there may be adapters, or the same weights in another form.
  whole = path / "model.safetensors"
  if weight_map:
    files = [path / name for name in sorted(set(weight_map.values())) if (path / name).exists()]
  else:
    files = [whole] if whole.exists() else sorted(path.glob("*.safetensors"))
  if not files:
    pickled = sorted(p.name for p in path.glob("*.bin"))
    raise UserError(
      f"--from={path} has no .safetensors file"
      + (f"; {pickled[0]} is pickled, which is not read: convert it" if pickled else "")
    )
  where: dict[str, Any] = {}
  for file in files:
    try:
      opened = safetensors.safe_open(file, framework="np")
    except Exception as e:  # of the package's own kinds
      raise UserError(f"--from={path}: {file.name} cannot be read ({e})") from e
    where |= dict.fromkeys(opened.keys(), opened)
  missing = weight_map.keys() - where.keys()
  if missing:
    raise UserError(
      f"--from={path}: {listed.name} lists {len(missing)} arrays that no .safetensors file here "
      f"has, such as {min(missing)}; the download is not complete"
    )
  return Source(
    path,
    config,
    frozenset(where),
    lambda name: where[name].get_tensor(name).astype(np.float32),
    lambda: open_tokenizer(path),
  )


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file that holds an object."""
  try:
    found = json.loads(path.read_bytes())
  except (OSError, ValueError) as e:
    raise UserError(f"--from={path.parent}: {path.name} cannot be read ({e})") from e
  if not isinstance(found, dict):
    raise UserError(
      f"--from={path.parent}: {path.name} holds {type(found).__name__}, not an object"
    )
  return found


# ------------------------------------------------------------------------- GGUF

# Architecture -> (the class of transformers, are rows of q and k in interleaved order).
GGUF_ARCHITECTURES = {
  "llama": ("LlamaForCausalLM", True),
  "qwen2": ("Qwen2ForCausalLM", False),
  "qwen3": ("Qwen3ForCausalLM", False),
  "gemma": ("GemmaForCausalLM", False),
  "arcee": ("ArceeForCausalLM", True),
}
GGUF_NAMES = {
  "token_embd": "model.embed_tokens",
  "output": "lm_head",
  "output_norm": "model.norm",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_GGUF_REQUIRED = (
  "block_count",
  "embedding_length",
  "feed_forward_length",
  "context_length",
  "attention.head_count",
  "attention.layer_norm_rms_epsilon",
)
ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3: by how much each wavelength is stretched


def _open_gguf(path: pathlib.Path) -> Source:
  gguf = _package("gguf")
  try:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {_from_gguf(tensor.name): tensor for tensor in reader.tensors}
  except Exception as e:  # of the package's own kinds
    raise UserError(f"--from={path} cannot be read as GGUF ({e})") from e
  architecture = str(fields.get("general.architecture"))
  if architecture not in GGUF_ARCHITECTURES:
    raise UserError(
      f"--from={path}: architecture {architecture!r} is not one of {', '.join(GGUF_ARCHITECTURES)}"
    )
  name, interleaved = GGUF_ARCHITECTURES[architecture]
  get = lambda key, default=None: fields.get(f"{architecture}.{key}", default)
  for key in _GGUF_REQUIRED:
    if get(key) is None:
      raise UserError(f"--from={path} has no field {architecture}.{key}")
  if "model.embed_tokens.weight" not in tensors:
    raise UserError(f"--from={path} has no array 'token_embd.weight'")
  heads, width = get("attention.head_count"), get("embedding_length")
  kv_heads = get("attention.head_count_kv", heads)
  if isinstance(heads, list) or isinstance(kv_heads, list):
    raise UserError(f"--from={path}: its layers have different numbers of heads: {heads}")
  config = {
    "architectures": [name],
    "num_hidden_layers": get("block_count"),
    "hidden_size": width,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "head_dim": get("attention.key_length", width // heads),
    "intermediate_size": get("feed_forward_length"),
    "vocab_size": int(tensors["model.embed_tokens.weight"].shape[1]),
    "max_position_embeddings": get("context_length"),
    "rope_theta": get("rope.freq_base", 10_000.0),
    "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
    "tie_word_embeddings": "lm_head.weight" not in tensors,
    "sliding_window": get("attention.sliding_window"),
    "gguf_norms": True,  # Gemma's are stored as they are multiplied, 1 + w
  }
  if architecture == "arcee":
    config["hidden_act"] = "relu2"
  factor = get("rope.scaling.factor", get("rope.scale_linear", 1.0))  # the latter in old files
  scaling = get("rope.scaling.type", "none" if factor in (0.0, 1.0) else "linear")
  if scaling not in ("none", "default"):
    config["rope_scaling"] = {"rope_type": scaling}

  def read(name: str) -> np.ndarray:
    tensor = tensors[name]
    array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
      if interleaved and f".{part}." in name:
        # Rows (pair, half) of each head, for us (half, pair).
        array = array.reshape(count, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array

  def tokenizer() -> Tokenizer:
    return gguf_vocab.to_tokenizer(gguf_vocab.read_vocab(reader, str(path)))

  return Source(path, config, frozenset(tensors), read, tokenizer)


def _from_gguf(name: str) -> str:
  """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
  match = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
  if not match or match[3] not in GGUF_NAMES:
    return name
  layer = f"model.layers.{match[2]}." if match[1] else ""
  return f"{layer}{GGUF_NAMES[match[3]]}.{match[4]}"
