"""What a model is (`ModelConfig`) and how it is run (`Execution`).

Both are frozen and hashable, so they can be static arguments of `jax.jit`.
`ModelConfig` is what a checkpoint's `config.json` stores; `Execution` is chosen
anew on every machine and never stored.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Mapping

from matformer_jax.errors import UserError

ACTIVATIONS = ("gelu", "relu2", "silu", "relu")
REMAT_POLICIES = ("none", "full", "dots_no_batch", "attn_out", "attn_out_ffn_pre")


@dataclasses.dataclass(frozen=True)
class Run:
  """Consecutive layers of equal width, stored as one `[num_layers, ...]` stack.

  Attributes:
    num_layers: layers in the run.
    ffn: granularity index of the FFN, 0 (narrowest) to g-1.
    heads: granularity index of the attention heads, 0 to g-1.
  """

  num_layers: int
  ffn: int
  heads: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A MatLM: decoder-only Transformer with nested FFNs (and, optionally, heads).

  Attributes:
    vocab_size: V, rows of the tied input/output embedding.
    num_layers: L.
    d_model: D, residual width.
    num_heads: N attention heads of the widest granularity, each D/N wide.
    seq_len: T, training context in tokens. RoPE has no parameters, so any
      length can be evaluated.
    ffn_ratios: FFN width / d_model per granularity, increasing; its length is g.
    activation: one of `ACTIVATIONS`; `relu2` is squared ReLU.
    gated: FFN computes `act(x W_gate) * (x W_up)` instead of `act(x W_in)`.
    nested_heads: granularity i also uses only the first `head_counts[i]` heads
      (Section 3.1, Appendix F.2).
    head_ratios: share of the heads per granularity when `nested_heads`.
    ffn_groups: G; each group holds its share of every granularity, so that a
      tensor-parallel degree dividing G never moves weights. See sharding.py.
    head_groups: the same for attention heads.
    rope_base: wavelength base of the rotary embedding.
    norm_eps: added to the mean square in RMSNorm.
    runs: layer widths actually stored. The universal model has one run of full
      width; an extracted submodel has narrower ones.
  """

  vocab_size: int
  num_layers: int
  d_model: int
  num_heads: int
  seq_len: int
  ffn_ratios: tuple[float, ...] = (0.5, 1, 2, 4)
  activation: str = "gelu"
  gated: bool = False
  nested_heads: bool = False
  head_ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 1)
  ffn_groups: int = 1
  head_groups: int = 1
  rope_base: float = 10_000.0
  norm_eps: float = 1e-6
  runs: tuple[Run, ...] | None = None

  def __post_init__(self):
    set_ = lambda name, value: object.__setattr__(self, name, value)
    set_("ffn_ratios", tuple(self.ffn_ratios))
    set_("head_ratios", tuple(self.head_ratios))
    for name in ("vocab_size", "num_layers", "d_model", "num_heads", "seq_len",
                 "ffn_groups", "head_groups"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model.{name}={value!r} must be a positive integer")
    if self.d_model % self.num_heads:
      raise UserError(
          f"model.d_model={self.d_model} is not divisible by model.num_heads="
          f"{self.num_heads}; choose num_heads among {_divisors(self.d_model)}")
    if self.head_dim % 2:
      raise UserError(
          f"model.d_model/model.num_heads = {self.head_dim} must be even for "
          "rotary position embeddings; use fewer or more heads")
    if self.activation not in ACTIVATIONS:
      raise UserError(f"model.activation={self.activation!r} is not one of {ACTIVATIONS}")
    _check_increasing("ffn_ratios", self.ffn_ratios)
    for ratio in self.ffn_ratios:
      width = ratio * self.d_model
      if width != int(width) or width < 1 or int(width) % self.ffn_groups:
        raise UserError(
            f"model.ffn_ratios entry {ratio} x d_model={self.d_model} gives FFN width "
            f"{width:g}, which must be an integer multiple of model.ffn_groups={self.ffn_groups}")
    if self.nested_heads:
      _check_increasing("head_ratios", self.head_ratios)
      if len(self.head_ratios) != len(self.ffn_ratios) or self.head_ratios[-1] != 1:
        raise UserError(
            f"model.head_ratios={self.head_ratios} must have {len(self.ffn_ratios)} entries "
            "(one per ffn_ratios entry) and end with 1")
    for ratio in self.head_ratios if self.nested_heads else (1,):
      heads = ratio * self.num_heads
      if heads != int(heads) or heads < 1 or int(heads) % self.head_groups:
        raise UserError(
            f"head ratio {ratio} x num_heads={self.num_heads} gives {heads:g} heads, which "
            f"must be an integer multiple of model.head_groups={self.head_groups}")
    top = self.num_granularities - 1
    runs = self.runs or (Run(self.num_layers, top, top),)
    runs = tuple(r if isinstance(r, Run) else Run(**r) for r in runs)
    if sum(r.num_layers for r in runs) != self.num_layers:
      raise UserError(f"model.runs={runs} do not add up to num_layers={self.num_layers}")
    set_("runs", runs)

  @property
  def num_granularities(self) -> int:
    """g, the number of explicitly trained granularities."""
    return len(self.ffn_ratios)

  @property
  def head_dim(self) -> int:
    """H, width of one attention head."""
    return self.d_model // self.num_heads

  @property
  def ffn_widths(self) -> tuple[int, ...]:
    """m_1 < ... < m_g, FFN neurons per granularity (Eq. 1)."""
    return tuple(int(r * self.d_model) for r in self.ffn_ratios)

  @property
  def head_counts(self) -> tuple[int, ...]:
    """Attention heads per granularity; all of them unless `nested_heads`."""
    if not self.nested_heads:
      return (self.num_heads,) * self.num_granularities
    return tuple(int(r * self.num_heads) for r in self.head_ratios)

  def slice_lengths(self, run: Run) -> dict[str, int]:
    """{nested axis: how much of it the widths of `run` use}, per group; see sharding.py."""
    return {"neurons": self.ffn_widths[run.ffn] // self.ffn_groups,
            "heads": self.head_counts[run.heads] // self.head_groups}

  def to_dict(self) -> dict[str, Any]:
    """JSON-ready form; `from_dict` inverts it."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
    """Builds a config from a mapping.

    Raises:
      UserError: on an unknown or missing key, or an invalid value.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
      if key not in known:
        raise UserError(f"unknown key model.{key}{did_you_mean(key, known)}")
    for name, field in known.items():
      if field.default is dataclasses.MISSING and values.get(name) is None:
        raise UserError(f"model.{name} is missing from the config")
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a model is run on the machine at hand.

  Attributes:
    mesh: `jax.sharding.Mesh` with axes (data, fsdp, tensor), or None for one
      device without any sharding constraint.
    per_device: the program is one device's share of a train step, inside a shard_map over
      the batch axes; it sees its own rows and its own fsdp shards of the parameters.
    dtype: compute dtype; parameters stay float32.
    remat: one of `REMAT_POLICIES`: what a layer saves for the backward pass.
    scan_layers: run a stack with `lax.scan` (one layer is compiled) instead of
      unrolling it (faster on CPU, slower to compile).
    flat_weights: merge (group, neuron) before the matmul: faster on CPU, a copy
      on TPU.
    attention_block: queries taken at a time by the attention, each block against
      only the keys it may see.
    flash_attention: use the TPU kernel where the number of tokens allows it.
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
  flash_attention: bool = False
  logits_bytes: int = 32 * 2**20

  @classmethod
  def for_platform(cls, platform: str, mesh=None, dtype: str = "auto", remat: str = "auto",
                   device_kind: str = "") -> Execution:
    """What measured best on `cpu`, `gpu` or `tpu`, where dtype and remat are `auto`.

    Args:
      device_kind: e.g. `TPU v5 lite`; v2 and v3 cannot run the attention kernel.

    Raises:
      UserError: for an unknown dtype or remat policy.
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
    if mesh is not None and mesh.size == 1:
      mesh = None
    return cls(mesh=mesh, dtype=dtype, remat=remat, scan_layers=not cpu or mesh is not None,
               flat_weights=cpu and mesh is None, attention_block=128 if cpu else 1024,
               flash_attention=platform == "tpu" and device_kind not in ("TPU v2", "TPU v3"),
               logits_bytes=(32 if cpu else 512) * 2**20)


def did_you_mean(key: str, known) -> str:
  """`; did you mean 'x'?` for the nearest known key, else the list of keys."""
  near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0 and (n // d) % 2 == 0]


def _check_increasing(name: str, values) -> None:
  if not values or any(b <= a for a, b in zip(values, values[1:])) or values[0] <= 0:
    raise UserError(f"model.{name}={values!r} must be positive and strictly increasing")
