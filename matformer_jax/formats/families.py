"""The dense architectures that become a MatLM, and that a MatLM can be written as."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
import tqdm

from matformer_jax.config import MatLMConfig, ModelConfig, rope_scale
from matformer_jax.errors import UserError
from matformer_jax.formats import layout, sources
from matformer_jax.formats.sources import Source

ACTIVATIONS = {
  "silu": "silu",
  "gelu_pytorch_tanh": "gelu",
  "gelu_new": "gelu",
  "relu2": "relu2",
  "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Family:
  """What a class of `transformers` does that its config does not say.

  Attributes:
    defaults: of its config, where they are its own: values that are equal to them are not saved.
    gated: its FFN has a gate.
    qkv_bias: queries, keys and values have biases.
    qk_norm: queries and keys are normalised.
    scaled_embedding: the embedding is multiplied by sqrt(D).
    norm_offset: what is added to stored scales of norms.
    activation: where the config's is not what is run.
  """

  defaults: Mapping[str, Any]
  gated: bool = True
  qkv_bias: bool = False
  qk_norm: bool = False
  scaled_embedding: bool = False
  norm_offset: float = 0.0
  activation: str = ""


_REQUIRED = (
  "num_hidden_layers",
  "hidden_size",
  "num_attention_heads",
  "intermediate_size",
  "vocab_size",
  "max_position_embeddings",
  "rms_norm_eps",
)
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_QWEN = dict(
  max_position_embeddings=32768,
  num_key_value_heads=32,
  sliding_window=4096,
  use_sliding_window=False,
)
FAMILIES = {
  # Llama 2 and 3, SmolLM2
  "LlamaForCausalLM": Family(dict(max_position_embeddings=2048)),
  "MistralForCausalLM": Family(
    dict(max_position_embeddings=131_072, num_key_value_heads=8, sliding_window=4096)
  ),
  "Qwen2ForCausalLM": Family(_QWEN, qkv_bias=True),
  "Qwen3ForCausalLM": Family(_QWEN | dict(head_dim=128), qk_norm=True),
  "GemmaForCausalLM": Family(
    dict(
      max_position_embeddings=8192, num_key_value_heads=16, head_dim=256, tie_word_embeddings=True
    ),
    scaled_embedding=True,
    norm_offset=1.0,
    activation="gelu_pytorch_tanh",  # whatever its config says
  ),
  "ArceeForCausalLM": Family(
    dict(max_position_embeddings=4096, hidden_act="relu2", rms_norm_eps=1e-5), gated=False
  ),
}


def family_of(source: Source) -> Family:
  """Raises UserError for an architecture that is not in FAMILIES."""
  name = architecture(source)
  if name not in FAMILIES:
    raise UserError(
      f"--from={source.path}: architecture {name!r} is not one of {', '.join(FAMILIES)}"
    )
  return FAMILIES[name]


def architecture(source: Source) -> str:
  """Its class in `transformers`."""
  names = source.config.get("architectures") or [source.config.get("model_type")]
  return str(names[0])


def model_config(source: Source, widths: Sequence[int] = (), **changes) -> MatLMConfig:
  """The model that a source is, as its widest granularity.

  Args:
    widths: FFN neurons per granularity; the last one is the source's, which is the default.
    **changes: more fields of MatLMConfig, e.g. seq_len.

  Raises:
    UserError: for what a MatLM cannot hold.
  """
  family = family_of(source)
  told: dict[str, Any] = {**_DEFAULTS, **family.defaults, **source.config}
  get: Callable[..., Any] = told.get

  def refuse(what: str):
    raise UserError(f"--from={source.path}: {what} is not supported")

  if get("attention_bias") or get("mlp_bias"):
    refuse("a bias of the output projection or the FFN (attention_bias, mlp_bias)")
  for key in _REQUIRED:
    if get(key) is None:
      raise UserError(f"--from={source.path}: its config has no {key}")
  window, longest = get("sliding_window"), get("max_position_embeddings")
  if window and window < longest and get("use_sliding_window", True):
    refuse(f"sliding_window={window}")
  activation = family.activation or get("hidden_act")
  if activation not in ACTIVATIONS:
    refuse(f"hidden_act={activation!r}")
  width = get("intermediate_size")
  if not isinstance(width, int):
    refuse(f"intermediate_size={width}")
  widths = tuple(widths) or (width,)
  if widths[-1] != width:
    raise UserError(f"the last of the FFN widths {widths} must be the source's, {width}")
  base, scaling = _rope(source, refuse)
  fields: dict[str, Any] = dict(
    num_layers=get("num_hidden_layers"),
    d_model=get("hidden_size"),
    num_heads=get("num_attention_heads"),
    num_kv_heads=get("num_key_value_heads") or 0,
    head_dim=get("head_dim") or 0,
    ffn_widths=widths,
    activation=ACTIVATIONS[activation],
    gated=family.gated,
    norm_eps=get("rms_norm_eps"),
    vocab_size=get("vocab_size"),
    seq_len=longest,
    rope_base=base,
    rope_scaling=scaling,
    tied_head=bool(get("tie_word_embeddings")),
    embedding_scale=0.0 if family.scaled_embedding else 1.0,
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
  )
  return MatLMConfig(**fields | changes)


def _rope(source: Source, refuse: Callable[[str], Any]) -> tuple[float, tuple[float, ...]]:
  """(base, scaling as in MatLMConfig)."""
  # One dictionary since transformers 5, two keys before.
  rope = dict(source.config.get("rope_parameters") or source.config.get("rope_scaling") or {})
  base = float(rope.get("rope_theta") or source.config.get("rope_theta") or 10_000.0)
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    refuse(f"partial_rotary_factor={rope['partial_rotary_factor']}")
  if kind == "llama3":
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if key not in rope]
    if missing:
      refuse(f"RoPE of type 'llama3' without {', '.join(missing)}")
    return base, tuple(float(rope[key]) for key in keys)
  if kind != "default":
    refuse(f"RoPE of type {kind!r}")
  if sources.ROPE_FACTORS in source.names:
    return base, _from_factors(source, base, refuse)
  return base, ()


def _from_factors(source: Source, base: float, refuse) -> tuple[float, ...]:
  """Llama 3's scaling, of which GGUF stores what it comes to."""
  have = source.read(sources.ROPE_FACTORS)
  for original in (8192.0, 4096.0, 2048.0, 16384.0):
    scaling = float(have.max()), 1.0, 4.0, original
    if np.allclose(1 / rope_scale(2 * have.size, base, scaling), have, rtol=1e-3):
      return scaling
  return refuse(f"{sources.ROPE_FACTORS} that is not Llama 3's")


def read_params(source: Source, config: MatLMConfig) -> dict[str, Any]:
  """The parameter tree of `model_config`, float32; one array is in memory twice at a time.

  Raises:
    UserError: for arrays that are missing, of another shape, or for which a MatLM has no place.
  """
  used: set[str] = set()

  def read(name: str, shape: Sequence[int]) -> np.ndarray:
    used.add(name)
    if name not in source.names:
      raise UserError(f"--from={source.path} has no array {name!r}")
    array = source.read(name)
    bar.update()
    if array.shape != tuple(shape):
      raise UserError(
        f"--from={source.path}: {name} is {list(array.shape)}, and its config says {list(shape)}"
      )
    return array

  with tqdm.tqdm(total=len(source.names), desc="reading", unit="array", mininterval=1.0) as bar:
    params = layout.read_tree(config, read, _norm_offset(source))
  rest = {
    name
    for name in source.names - used
    if "inv_freq" not in name and name not in (sources.ROPE_FACTORS, "lm_head.weight")
  }
  if rest:
    raise UserError(
      f"--from={source.path} has {len(rest)} arrays that this architecture does not, such as "
      f"{min(rest)}"
    )
  return params


def _norm_offset(source: Source) -> float:
  return 0.0 if source.config.get("gguf_norms") else family_of(source).norm_offset


def architecture_of(config: MatLMConfig) -> str:
  """The class in `transformers` as which a model is written.

  Raises:
    UserError: where FAMILIES has none that computes what the model does.
  """
  if config.qk_norm:
    if not config.gated:
      raise UserError(
        "model.qk_norm=True without a gate is in none of the architectures "
        f"{', '.join(FAMILIES)}; --format=stablehlo holds every model"
      )
    return "Qwen3ForCausalLM"
  if not config.gated:
    return "ArceeForCausalLM"
  if config.qkv_bias:
    return "Qwen2ForCausalLM"
  return "GemmaForCausalLM" if config.activation == "gelu" else "LlamaForCausalLM"


def written_activation(config: ModelConfig) -> str:
  """`transformers`' name of a model's activation."""
  return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)


def dense_arrays(
  config: MatLMConfig,
  params: Mapping[str, Any],
  family: Family,
  size: layout.LayerSize | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
  """The arrays of a model by the names of `transformers`, float32, one after the other.

  The inverse of `read_params`, for a submodel as well.

  Args:
    config: of the tree `params`, whose leaves are float32 arrays.
    family: as which it is written. Where that does not scale embeddings as the model does, the
      rows are scaled, and there is a head beside them: see `has_own_head`.
    size: to which layers are padded with zeros; None leaves each as wide as it is.
  """
  factor = np.float32(_embedding_factor(config, family))
  embedding = np.asarray(params["embedding"], np.float32)
  yield "model.embed_tokens.weight", embedding * factor
  if has_own_head(config, family):
    yield "lm_head.weight", np.asarray(params.get("head", embedding), np.float32)
  yield "model.norm.weight", np.asarray(params["final_norm"]["scale"]) - family.norm_offset
  for i, layer in enumerate(layout.dense_layers(config, params, size)):
    for name, array in layer.items():
      part, _, kind = name.partition(".")
      offset = family.norm_offset if part in ("attention_norm", "ffn_norm") else 0.0
      yield f"model.layers.{i}.{layout.DECODER_LAYER[part]}.{kind}", array - np.float32(offset)


def has_own_head(config: MatLMConfig, family: Family) -> bool:
  """Whether a model has a head beside its embedding, written as `family`."""
  return not config.tied_head or _embedding_factor(config, family) != 1


def _embedding_factor(config: MatLMConfig, family: Family) -> float:
  """By which rows are multiplied, so that with the family's own scale they come out as ours."""
  root = config.d_model**0.5
  return (config.embedding_scale or root) / (root if family.scaled_embedding else 1.0)
