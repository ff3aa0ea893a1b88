"""What a model is (`ModelConfig`), the kinds there are (`KINDS`), how one is run (`Execution`).

Configs are frozen and hashable, so they can be static arguments of `jax.jit`.
A `ModelConfig` is what a checkpoint's `config.json` stores; `Execution` is chosen
on every machine and never stored. A new kind of model is one `Kind` record at the end of
the first part of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import importlib
import math
import numbers
from typing import Any, ClassVar

import numpy as np

from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.tpu import chips

ACTIVATIONS = ("gelu", "relu2", "silu", "relu")
LAYERS = ("auto", "scanned", "unrolled")
REMAT_POLICIES = ("none", "full", "dots_no_batch", "attn_out", "attn_out_ffn_pre", "products")


@dataclasses.dataclass(frozen=True)
class Span:
  """Consecutive layers of equal width, stored as one `[num_layers, ...]` stack.

  Attributes:
    num_layers: layers in the span.
    ffn: granularity index of the FFN, 0 (narrowest) to g-1.
    heads: granularity index of the attention heads, 0 to g-1.
  """

  num_layers: int
  ffn: int
  heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The stack of nested blocks that every MatFormer is made of; its subclasses add the ends.

  Attributes:
    num_layers: L.
    d_model: D, residual width.
    num_heads: N attention heads of the widest granularity.
    num_kv_heads: heads of their keys and values, each shared by N / num_kv_heads query heads
      (grouped-query attention, Ainslie et al. 2023); 0: N.
    head_dim: H, width of a head; 0: D / N.
    ffn_ratios: FFN width / d_model per granularity, increasing; its length is g. With
      `nested_heads` they may be equal: then only the heads are nested.
    ffn_widths: m_1 < ... < m_g, FFN neurons per granularity (Eq. 1), instead of the ratios;
      an empty one of the two follows from the other.
    activation: one of `ACTIVATIONS`; `relu2` is squared ReLU.
    gated: FFN computes `act(x W_gate) * (x W_up)` instead of `act(x W_in)`.
    nested_heads: granularity i also uses only the first `head_counts[i]` heads, with their
      keys and values (Section 3.1, Appendix F.2).
    head_ratios: share of the heads per granularity when `nested_heads`.
    ffn_groups: G; each group holds its share of every granularity, so that a
      tensor-parallel degree dividing G never moves weights. See sharding.py.
    head_groups: the same for attention heads.
    norm_eps: added to the mean square (the variance, in LayerNorm).
    spans: layer widths actually stored. The universal model has one span of full
      width; an extracted submodel has narrower ones.
  """

  num_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int = 0
  head_dim: int = 0
  ffn_ratios: tuple[float, ...] = ()
  ffn_widths: tuple[int, ...] = ()
  activation: str = "gelu"
  gated: bool = False
  nested_heads: bool = False
  head_ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 1)
  ffn_groups: int = 1
  head_groups: int = 1
  norm_eps: float = 1e-6
  spans: tuple[Span, ...] = ()  # () is the universal model's

  # What a kind of model fixes.
  causal: ClassVar[bool]  # a token attends to those before it only
  layer_norm: ClassVar[bool]  # LayerNorm, or RMSNorm
  biases: ClassVar[bool]  # projections have them
  glorot: ClassVar[bool]  # weights start Glorot-uniform, or normal and scaled by depth
  name: ClassVar[str]
  unit: ClassVar[str]  # what FLOPs are counted for: a token or an image
  blocks_name: ClassVar[str]  # what the paper calls the parameters of all but the ends
  adaptable: ClassVar[tuple[str, ...]] = ()  # what further training may change
  adaptable_with_head: ClassVar[tuple[str, ...]] = ()  # and where it starts a new output head
  _sizes: ClassVar[tuple[str, ...]] = (
    "num_layers",
    "d_model",
    "num_heads",
    "ffn_groups",
    "head_groups",
  )

  def __post_init__(self):
    self._check_sizes()
    self._complete_heads()
    self._complete_widths()
    if self.activation not in ACTIVATIONS:
      raise UserError(f"model.activation={self.activation!r} is not one of {ACTIVATIONS}")
    self._check_nested_heads()
    self._complete_spans()

  def _check_sizes(self) -> None:
    for name in self._sizes:
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model.{name}={value!r} must be a positive integer")
    for name in ("num_kv_heads", "head_dim"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"model.{name}={value!r} must be a positive integer, or 0 for the default")

  def _complete_heads(self) -> None:
    if not self.num_kv_heads:
      self._set("num_kv_heads", self.num_heads)
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"model.num_heads={self.num_heads} is not divisible by "
        f"model.num_kv_heads={self.num_kv_heads}: each key/value head serves as many query heads"
      )
    if not self.head_dim:
      if self.d_model % self.num_heads:
        raise UserError(
          f"model.d_model={self.d_model} is not divisible by model.num_heads={self.num_heads}; "
          f"choose num_heads among {_divisors(self.d_model)}, or set model.head_dim"
        )
      self._set("head_dim", self.d_model // self.num_heads)
    if self.rope_base and self.head_dim % 2:
      raise UserError(
        f"model.head_dim = {self.head_dim} (d_model / num_heads unless it is set) must be even "
        "for rotary position embeddings; use fewer or more heads"
      )

  def _complete_widths(self) -> None:
    ratios, widths = tuple(self.ffn_ratios), tuple(self.ffn_widths)
    _check_numbers("ffn_ratios", ratios)
    _check_numbers("ffn_widths", widths)
    same = len(widths) == len(ratios) and all(map(math.isclose, widths, self._times_d(ratios)))
    if widths and ratios and not same:
      raise UserError(
        f"model.ffn_widths={widths} and model.ffn_ratios={ratios} x d_model={self.d_model} are "
        "not the same; set one of them, and the other to ()"
      )
    if not widths:
      ratios = ratios or (0.5, 1, 2, 4)
      _check_increasing("ffn_ratios", ratios, equal=self.nested_heads)
      widths = self._times_d(ratios)
    _check_increasing("ffn_widths", widths, equal=self.nested_heads)
    for i, width in enumerate(widths):
      if width != int(width) or width < 1 or int(width) % self.ffn_groups:
        source = "model.ffn_widths has"
        if ratios:
          source = f"model.ffn_ratios entry {ratios[i]} x d_model={self.d_model} gives"
        raise UserError(
          f"{source} FFN width {width:g}, which must be an integer multiple of "
          f"model.ffn_groups={self.ffn_groups}"
        )
    self._set("ffn_widths", tuple(int(width) for width in widths))
    self._set("ffn_ratios", ratios or tuple(width / self.d_model for width in widths))

  def _times_d(self, ratios: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(ratio * self.d_model for ratio in ratios)

  def _check_nested_heads(self) -> None:
    self._set("head_ratios", tuple(self.head_ratios))
    if self.nested_heads:
      _check_numbers("head_ratios", self.head_ratios)
      _check_increasing("head_ratios", self.head_ratios)
      if len(self.head_ratios) != self.num_granularities or self.head_ratios[-1] != 1:
        raise UserError(
          f"model.head_ratios={self.head_ratios} must have {self.num_granularities} entries "
          "(one per FFN width) and end with 1"
        )
    # What nests is a key/value head with its queries.
    what = "num_kv_heads" if self.num_kv_heads < self.num_heads else "num_heads"
    for ratio in self.head_ratios if self.nested_heads else (1,):
      heads = ratio * self.num_kv_heads
      if heads != int(heads) or heads < 1 or int(heads) % self.head_groups:
        raise UserError(
          f"head ratio {ratio} x {what}={self.num_kv_heads} gives {heads:g} heads, which "
          f"must be an integer multiple of model.head_groups={self.head_groups}"
        )

  def _complete_spans(self) -> None:
    top = self.num_granularities - 1
    spans = self.spans or (Span(self.num_layers, top, top),)
    spans = tuple(s if isinstance(s, Span) else Span(**s) for s in spans)
    if sum(s.num_layers for s in spans) != self.num_layers:
      raise UserError(f"model.spans={spans} do not add up to num_layers={self.num_layers}")
    self._set("spans", spans)

  def _set(self, name: str, value: Any) -> None:
    object.__setattr__(self, name, value)

  @property
  def num_granularities(self) -> int:
    """g, the number of explicitly trained granularities."""
    return len(self.ffn_widths)

  @property
  def queries_per_kv(self) -> int:
    """R, query heads that share a head of keys and values."""
    return self.num_heads // self.num_kv_heads

  @property
  def head_counts(self) -> tuple[int, ...]:
    """Attention (query) heads per granularity; all of them unless `nested_heads`."""
    if not self.nested_heads:
      return (self.num_heads,) * self.num_granularities
    return tuple(int(r * self.num_kv_heads) * self.queries_per_kv for r in self.head_ratios)

  def slice_lengths(self, span: Span) -> dict[str, int]:
    """{nested axis: how much of it the widths of `span` use}, per group; see sharding.py."""
    return {
      "neurons": self.ffn_widths[span.ffn] // self.ffn_groups,
      "heads": self.head_counts[span.heads] // self.queries_per_kv // self.head_groups,
    }

  # What kinds without these features have; the others make them fields.

  @property
  def rope_base(self) -> float | None:
    """Wavelength base of the rotary embedding; None where positions are learned."""
    return None

  @property
  def rope_scaling(self) -> tuple[float, ...]:
    """How its wavelengths are stretched; () where they are not."""
    return ()

  @property
  def qkv_bias(self) -> bool:
    """Whether queries, keys and values have biases."""
    return self.biases

  @property
  def qk_norm(self) -> bool:
    """Whether queries and keys are normalised, each head for itself."""
    return False

  @property
  def dropout(self) -> float:
    """In training, of a block's hidden neurons and of what its sub-layers add."""
    return 0.0

  @property
  def stochastic_depth(self) -> float:
    """In training, probability of skipping a sub-layer of the last block."""
    return 0.0

  @property
  def num_tokens(self) -> int:
    """T, tokens that attend to each other."""
    raise NotImplementedError

  @property
  def tokens_per_example(self) -> int:
    """Tokens of one `unit`, for which FLOPs are counted."""
    raise NotImplementedError

  @property
  def summary(self) -> str:
    """Its measures, for people."""
    text = f"{self.num_layers} layers, d_model {self.d_model}, {self.num_heads} heads"
    if self.nested_heads:
      text += f" ({'/'.join(map(str, self.head_counts))})"
    if self.num_kv_heads < self.num_heads:
      text += f" of {self.num_kv_heads} for keys and values"
    return text

  @property
  def end_params(self) -> int:
    """Parameters outside the blocks and the last norm: what makes x of the input, and the
    output of x."""
    raise NotImplementedError

  @property
  def end_flops(self) -> int:
    """Forward FLOPs of their matmuls, per `unit`."""
    raise NotImplementedError

  @property
  def axis_fields(self) -> dict[str, str]:
    """{field: the logical axis of that length}, of axes that a mesh may shard; see sharding.py."""
    return {"ffn_groups": "ffn_groups", "head_groups": "head_groups", "d_model": "embed"}

  def to_dict(self) -> dict[str, Any]:
    """JSON-ready form; `from_dict` inverts it."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]):
    """Builds a config from a mapping.

    Raises:
      UserError: on an unknown or missing key, or an invalid value.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    if "runs" in values:  # what versions before 0.2 called them
      values = {"spans" if key == "runs" else key: value for key, value in values.items()}
    for key in values:
      if key not in known:
        raise UserError(f"unknown key model.{key}{did_you_mean(key, known)}")
    for name, field in known.items():
      if field.default is dataclasses.MISSING and values.get(name) is None:
        raise UserError(f"model.{name} is missing from the config")
    return cls(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatLMConfig(ModelConfig):
  """A MatLM: decoder-only language model with rotary positions (Section 4.1).

  Attributes:
    vocab_size: V, rows of the embedding.
    seq_len: T, training context in tokens. RoPE has no parameters, so any
      length can be evaluated.
    rope_base: wavelength base of the rotary embedding.
    rope_scaling: (factor, low, high, T0) as in Llama 3: wavelengths above T0 / low are
      stretched by factor, those under T0 / high are not, those between by degrees. (): none.
    tied_head: the output head is the input embedding; else it has a matrix of its own.
    embedding_scale: by which rows of the embedding are multiplied; 0: sqrt(D).
    qkv_bias: queries, keys and values have biases, as in Qwen2.
    qk_norm: RMSNorm of each head's query and key before rotation, as in Qwen3.
  """

  vocab_size: int
  seq_len: int
  rope_base: float = 10_000.0  # pyright: ignore[reportIncompatibleMethodOverride]
  rope_scaling: tuple[float, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]
  tied_head: bool = True
  embedding_scale: float = 0.0
  qkv_bias: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]
  qk_norm: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]

  causal = True
  layer_norm = False
  biases = False
  glorot = False
  adaptable = ("seq_len",)
  adaptable_with_head = ("vocab_size",)
  name = "MatLM"
  unit = "token"
  blocks_name = "non-embedding"
  _sizes = ModelConfig._sizes + ("vocab_size", "seq_len")

  def __post_init__(self):
    super().__post_init__()
    self._set("rope_scaling", tuple(self.rope_scaling))
    if self.rope_scaling:
      scaling = self.rope_scaling
      if len(scaling) != 4 or min(scaling) <= 0 or scaling[1] >= scaling[2]:
        raise UserError(
          f"model.rope_scaling={scaling} must be (factor, low, high, original length), positive "
          "and low below high, e.g. (8, 1, 4, 8192)"
        )
    if self.embedding_scale < 0:
      raise UserError(
        f"model.embedding_scale={self.embedding_scale!r} must be positive, or 0 for sqrt(d_model)"
      )

  @property
  def num_tokens(self):
    return self.seq_len

  @property
  def tokens_per_example(self):
    return 1

  @property
  def summary(self):
    return f"{super().summary}, vocabulary {self.vocab_size:,}, context {self.seq_len:,}"

  @property
  def end_params(self):
    return self.vocab_size * self.d_model * (1 if self.tied_head else 2)

  @property
  def end_flops(self):
    return 2 * self.vocab_size * self.d_model  # the output head; looking up a row is no matmul

  @property
  def axis_fields(self):
    return super().axis_fields | {"vocab_size": "vocab"}


POOLING = ("cls", "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatViTConfig(ModelConfig):
  """A MatViT: Vision Transformer encoder and classifier (Section 4.2).

  Attributes:
    image_size: side of the square input, pixels; a multiple of patch_size.
    patch_size: side of a patch, pixels.
    channels: of the input image.
    num_classes: outputs of the head.
    pooling: what represents an image: the [CLS] token, or the mean of all tokens.
    representation_size: width of a tanh layer before the head; 0 has none.
    head_bias: initial bias of the head, e.g. -6.9 with a sigmoid loss over 1,000 classes.
    dropout: in training, of embeddings and in both sub-layers of a block.
    stochastic_depth: in training, probability of skipping a sub-layer of the last block;
      lower in earlier ones, linearly from 0 (Huang et al. 2016).
  """

  image_size: int
  patch_size: int
  num_classes: int
  channels: int = 3
  pooling: str = "cls"
  representation_size: int = 0
  head_bias: float = 0.0
  dropout: float = 0.0  # pyright: ignore[reportIncompatibleMethodOverride]
  stochastic_depth: float = 0.0  # pyright: ignore[reportIncompatibleMethodOverride]

  causal = False
  layer_norm = True
  biases = True
  glorot = True
  adaptable = (
    "image_size",
    "num_classes",
    "representation_size",
    "head_bias",
    "dropout",
    "stochastic_depth",
  )
  name = "MatViT"
  unit = "image"
  blocks_name = "encoder"
  _sizes = ModelConfig._sizes + ("image_size", "patch_size", "num_classes", "channels")

  def __post_init__(self):
    super().__post_init__()
    if self.image_size % self.patch_size:
      raise UserError(
        f"model.image_size={self.image_size} is not a multiple of "
        f"model.patch_size={self.patch_size}"
      )
    if self.pooling not in POOLING:
      raise UserError(f"model.pooling={self.pooling!r} is not one of {POOLING}")
    if not isinstance(self.representation_size, int) or self.representation_size < 0:
      raise UserError(
        f"model.representation_size={self.representation_size!r} must be a non-negative integer"
      )
    for name in ("dropout", "stochastic_depth"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f"model.{name}={getattr(self, name)!r} must be in [0, 1)")

  @property
  def summary(self):
    channels = "grey" if self.channels == 1 else "RGB"
    return (
      f"{super().summary}, {self.image_size} x {self.image_size} {channels} pixels in patches "
      f"of {self.patch_size} x {self.patch_size}, {self.num_classes:,} classes"
    )

  @property
  def grid(self) -> int:
    """Patches along a side of the image."""
    return self.image_size // self.patch_size

  @property
  def num_tokens(self):
    return self.grid**2 + (self.pooling == "cls")

  @property
  def tokens_per_example(self):
    return self.num_tokens

  @property
  def axis_fields(self):
    return super().axis_fields | {"features": "embed"}

  @property
  def patch_pixels(self) -> int:
    """Numbers in a patch."""
    return self.patch_size**2 * self.channels

  @property
  def features(self) -> int:
    """Width of an image's representation."""
    return self.representation_size or self.d_model

  @property
  def end_params(self):
    d, r = self.d_model, self.representation_size
    tokens = d * (self.num_tokens + (self.pooling == "cls"))  # positions, [CLS]
    return (
      (self.patch_pixels + 1) * d + tokens + (d + 1) * r + (self.features + 1) * self.num_classes
    )

  @property
  def end_flops(self):
    return 2 * (
      self.grid**2 * self.patch_pixels * self.d_model
      + self.d_model * self.representation_size
      + self.features * self.num_classes
    )


# --------------------------------------------------------------- kinds of model


@dataclasses.dataclass(frozen=True)
class Kind:
  """All that the package needs to know of a kind of model; `KINDS` is where one is registered.

  What lives in higher layers of the package is named by import path, `module:attribute`, and
  imported when it is first asked for.

  Attributes:
    name: what `task` says in configs and in config.json.
    config: what such a model is.
    axes: the leaves outside the blocks -> their logical axes, see sharding.py.
    module: has `init_params` and `adapt_params`.
    objective: model and loss, without data; see tasks/.
    task: the same with its data.
    loaded: what `load` returns.
  """

  name: str
  config: type[ModelConfig]
  axes: Mapping[str, tuple[str, ...]]
  module: str
  objective: str
  task: str
  loaded: str

  def resolve(self, what: str) -> Any:
    """The module or class that a field names, e.g. `kind.resolve("task")`."""
    module, _, attribute = getattr(self, what).partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


KINDS = {
  kind.name: kind
  for kind in (
    Kind(
      name="matlm",
      config=MatLMConfig,
      axes={"embedding": ("vocab", "embed"), "head": ("vocab", "embed")},
      module="matformer_jax.models.matlm",
      objective="matformer_jax.tasks.language:NextToken",
      task="matformer_jax.tasks.language:LanguageModeling",
      loaded="matformer_jax.loading:LanguageModel",
    ),
    Kind(
      name="matvit",
      config=MatViTConfig,
      axes={
        "patches/kernel": ("embed", "pixels"),
        "patches/bias": ("d",),
        "cls": ("d",),
        "positions": ("length", "d"),
        "representation/kernel": ("features", "embed"),
        "representation/bias": ("features",),
        "head/kernel": ("classes", "embed"),
        "head/bias": ("classes",),
      },
      module="matformer_jax.models.matvit",
      objective="matformer_jax.tasks.classification:Classification",
      task="matformer_jax.tasks.classification:ImageClassification",
      loaded="matformer_jax.loading:VisionModel",
    ),
  )
}


def rope_scale(head_dim: int, base: float, scaling: tuple[float, ...]) -> np.ndarray:
  """[H/2] by which Llama 3 multiplies the frequencies of rotary positions.

  Args:
    scaling: as MatLMConfig.rope_scaling, not empty.
  """
  factor, low, high, original = scaling
  frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
  turns = original * frequency / (2 * np.pi)  # in the original length
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return kept + (1 - kept) / factor


def kind_of(source: Mapping[str, Any] | ModelConfig) -> Kind:
  """The kind of a model, or of what the `task` of a config file or a model card names.

  Raises:
    UserError: for an unknown task.
  """
  if isinstance(source, ModelConfig):
    return next(kind for kind in KINDS.values() if isinstance(source, kind.config))
  if source["task"] not in KINDS:
    raise UserError(f"task={source['task']!r} is unknown{did_you_mean(str(source['task']), KINDS)}")
  return KINDS[source["task"]]


def model_config(source: Mapping[str, Any]) -> ModelConfig:
  """The model of a config file or a model card: its `model`, of the kind its `task` names.

  Raises:
    UserError: for an unknown task, or as `from_dict`.
  """
  return kind_of(source).config.from_dict(source["model"])


# --------------------------------------------------------------------- execution


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a model is run on the machine at hand.

  Attributes:
    mesh: `jax.sharding.Mesh` with axes (slices, data, fsdp, tensor), or None for one
      device without any sharding constraint.
    per_device: the program is one device's share of a train step, inside a shard_map over
      the batch axes; it sees its own rows and its own fsdp shards of the parameters.
    dtype: compute dtype; parameters stay float32.
    remat: one of `REMAT_POLICIES`: what a layer saves for the backward pass.
    scan_layers: run a stack with `lax.scan` (one layer is compiled) instead of
      unrolling it (a faster step, slower to compile).
    flat_weights: merge (group, neuron) before the matmul: faster on CPU, a copy
      on TPU.
    attention_block: queries taken at a time by the attention, each block against
      only the keys it may see.
    kernels: the TPU whose Pallas kernels are used, for attention and the loss, where the sizes
      allow it; None uses none.
    slice_grad_dtype: in which gradients are summed across slices; "" is their own.
    logits_bytes: float32 logits that the loss and evaluation hold at a time, per device.
      What fits a cache is fastest on CPU; elsewhere every chunk reads the whole embedding
      and adds to its whole gradient, so that chunks should be few.
  """

  mesh: Any = None
  per_device: bool = False
  dtype: str = "float32"
  remat: str = "none"
  scan_layers: bool = False
  flat_weights: bool = True
  attention_block: int = 128
  kernels: chips.Tpu | None = None
  slice_grad_dtype: str = ""
  logits_bytes: int = 32 * 2**20

  @classmethod
  def for_platform(
    cls,
    platform: str,
    mesh=None,
    dtype: str = "auto",
    remat: str = "auto",
    device_kind: str = "",
    layers: str = "auto",
    logits_gib: float = 0.0,
  ) -> Execution:
    """What measured best on `cpu`, `gpu` or `tpu`, where dtype, remat and layers are `auto`.

    How a train step is run depends on its model too: see training/auto.py.

    Args:
      device_kind: e.g. `TPU v5 lite`; v2 and v3 cannot run the kernels.
      layers: `scanned` or `unrolled`; auto scans on accelerators and meshes.
      logits_gib: `logits_bytes` in GiB; 0 takes what suits the device.

    Raises:
      UserError: for an unknown dtype, remat policy or way to run layers, or negative memory.
    """
    cpu = platform == "cpu"
    if dtype == "auto":
      dtype = "float32" if cpu else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
      raise UserError(f"dtype={dtype!r} must be auto, float32 or bfloat16")
    if remat == "auto":
      remat = "none" if cpu else "attn_out"
    if remat not in REMAT_POLICIES:
      raise UserError(f"remat={remat!r} is not one of {('auto',) + REMAT_POLICIES}")
    if layers not in LAYERS:
      raise UserError(f"layers={layers!r} is not one of {LAYERS}")
    if not isinstance(logits_gib, (int, float)) or logits_gib < 0:
      raise UserError(f"logits_gib={logits_gib!r} must be a number of GiB, or 0 to choose")
    if mesh is not None and mesh.size == 1:
      mesh = None
    tpu = chips.find(device_kind)
    kernels = None
    if platform == "tpu" and device_kind != "TPU v2":
      kernels = tpu or chips.TPUS["v5p"]  # as which a chip that came later is taken
    return cls(
      mesh=mesh,
      dtype=dtype,
      remat=remat,
      scan_layers=layers == "scanned" if layers != "auto" else not cpu or mesh is not None,
      flat_weights=cpu and mesh is None,
      attention_block=128 if cpu else 1024,
      kernels=kernels if kernels and kernels.runs_kernels else None,
      logits_bytes=int(logits_gib * 2**30) or (32 * 2**20 if cpu else _logits_bytes(tpu)),
    )


def _logits_bytes(tpu: chips.Tpu | None) -> int:
  """A sixth of a TPU's memory; 512 MiB where that is not known.

  Every chunk of logits reads the whole embedding and adds to its whole gradient: of 850M on a
  v5p, one chunk instead of 32 takes 12% off the step.
  """
  return tpu.core_hbm_bytes // 6 if tpu else 512 * 2**20


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0 and (n // d) % 2 == 0]


def _check_numbers(name: str, values) -> None:
  if not all(isinstance(value, numbers.Real) for value in values):
    raise UserError(f"model.{name}={values!r} must be numbers, such as (0.5, 1, 2, 4)")


def _check_increasing(name: str, values, equal: bool = False) -> None:
  """Raises UserError unless values increase; `equal` ones may follow each other."""
  steps = [b - a for a, b in zip(values, values[1:])]
  if not values or any(s < 0 or s == 0 and not equal for s in steps) or values[0] <= 0:
    how = "not decreasing" if equal else "strictly increasing"
    raise UserError(f"model.{name}={values!r} must be positive and {how}")
