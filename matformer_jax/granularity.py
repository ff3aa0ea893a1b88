"""Granularities: names, parsing, widths, sampling, Mix'n'Match, counts. NumPy only.

A granularity says how wide every layer is. People write it as text:

  `"M"`            every layer at M
  `"M*8+L*8"`      8 layers at M, then 8 at L
  `"M/XL"`         FFNs at M, attention heads at XL (nested_heads configs only)

Code passes it around as a `Granularity`, a hashable value that is a static
argument of every jitted function. It is never a global or a module's state.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import difflib
import itertools
import operator
import re

import numpy as np

from matformer_jax.config import ModelConfig, Span
from matformer_jax.errors import UserError

# The rows of Table 6, p_S/p_M/p_L/p_XL. The third is the paper's default.
SAMPLING_PRESETS = {
  "uniform": (0.25, 0.25, 0.25, 0.25),
  "table6_1": (0.44, 0.31, 0.15, 0.10),
  "table6_2": (0.31, 0.27, 0.22, 0.20),
  "table6_3": (0.25, 0.25, 0.25, 0.25),
  "table6_4": (0.20, 0.22, 0.24, 0.34),
  "table6_5": (0.17, 0.20, 0.22, 0.41),
}


@dataclasses.dataclass(frozen=True)
class Granularity:
  """Granularity index of every layer, 0 (narrowest) to g-1.

  Attributes:
    ffn: FFN index per layer, length L.
    heads: attention-head index per layer, length L; all g-1 where heads are
      not nested.
  """

  ffn: tuple[int, ...]
  heads: tuple[int, ...]


GranularityLike = str | int | Sequence[int] | Granularity


def names(config: ModelConfig) -> tuple[str, ...]:
  """The g names, narrowest first: S M L XL for g = 4, else G1..Gg."""
  g = config.num_granularities
  return ("S", "M", "L", "XL") if g == 4 else tuple(f"G{i + 1}" for i in range(g))


def parse(value: GranularityLike, config: ModelConfig) -> Granularity:
  """Reads a granularity from text, an index, or one index per layer.

  Args:
    value: `"M"`, `"M*8+L*8"`, `"M/XL"`, an int index, a sequence of L ints, or
      a `Granularity` (checked and returned).
    config: gives the names, the number of layers and the stored widths.

  Raises:
    UserError: for an unknown name, a wrong number of layers, or a layer wider
      than the model stores.
  """
  if isinstance(value, Granularity):
    ffn, heads = value.ffn, value.heads
  elif isinstance(value, str):
    ffn_text, slash, heads_text = value.partition("/")
    if slash and not config.nested_heads:
      raise UserError(
        f"granularity {value!r} names attention heads, but the model has "
        "nested_heads=False; write only the FFN part"
      )
    ffn = _parse_runs(ffn_text, value, config)
    heads = _parse_runs(heads_text, value, config) if slash else ffn
  elif isinstance(value, (int, np.integer)):
    ffn = heads = (int(value),) * config.num_layers
  else:
    try:
      ffn = heads = tuple(operator.index(i) for i in value)
    except TypeError:
      raise UserError(
        f"granularity {value!r} is neither text such as 'M*8+L*8', an index, nor a sequence of "
        "them, one per layer"
      ) from None
  if not config.nested_heads:
    heads = (config.num_granularities - 1,) * config.num_layers
  result = Granularity(ffn, heads)
  _check(result, value, config)
  return result


def _example(config: ModelConfig) -> str:
  """A mix that the model has."""
  name = names(config)
  small, large = name[max(len(name) // 2 - 1, 0)], name[len(name) // 2]
  half = config.num_layers // 2
  return f"{small}*{config.num_layers - half}+{large}*{half}"


def to_text(granularity: Granularity, config: ModelConfig) -> str:
  """Canonical text; `parse` inverts it."""
  text = _runs_text(granularity.ffn, config)
  if config.nested_heads and granularity.heads != granularity.ffn:
    text += "/" + _runs_text(granularity.heads, config)
  return text


def trained(config: ModelConfig) -> list[Granularity]:
  """The trained granularities, cut to the stored widths, narrowest first.

  A universal model has g; an extracted one ends with everything it stores:
  `M*2+L*2` has S, M and M*2+L*2.
  """
  stored = full(config)
  cut = lambda i, part: tuple(min(i, top) for top in part)
  sizes = [
    Granularity(cut(i, stored.ffn), cut(i, stored.heads) if config.nested_heads else stored.heads)
    for i in range(config.num_granularities)
  ]
  return list(dict.fromkeys(sizes))


def full(config: ModelConfig) -> Granularity:
  """Every layer as wide as stored: XL for a universal model."""
  ffn = tuple(r.ffn for r in config.spans for _ in range(r.num_layers))
  heads = tuple(r.heads for r in config.spans for _ in range(r.num_layers))
  return parse(Granularity(ffn, heads), config)


@dataclasses.dataclass(frozen=True)
class Slice:
  """Where one span of a granularity lies: layers [start, stop) of stored span `source`."""

  source: int
  start: int
  stop: int
  span: Span


def slices(config: ModelConfig, granularity: Granularity) -> list[Slice]:
  """The longest stretches of layers with equal widths, within each stored span."""
  result = []
  first = 0
  for source, stored in enumerate(config.spans):
    layers = range(first, first + stored.num_layers)
    key = lambda layer: (granularity.ffn[layer], granularity.heads[layer])
    for (ffn, heads), group in itertools.groupby(layers, key):
      group = list(group)
      result.append(
        Slice(source, group[0] - first, group[-1] + 1 - first, Span(len(group), ffn, heads))
      )
    first += stored.num_layers
  return result


def submodel_config(config: ModelConfig, granularity: Granularity) -> ModelConfig:
  """The config of the submodel as a model of its own, with narrower stored spans."""
  return dataclasses.replace(config, spans=tuple(s.span for s in slices(config, granularity)))


# ---------------------------------------------------------------- sampling


def sampling_probabilities(value: str | Sequence[float], config: ModelConfig) -> tuple[float, ...]:
  """Sampling distribution over the g granularities, narrowest first.

  Args:
    value: a preset (`uniform`, `table6_1` .. `table6_5`), numbers as text
      (`"0.2/0.22/0.24/0.34"`), or a sequence of g numbers.

  Raises:
    UserError: if it is not a distribution over g granularities.
  """
  g = config.num_granularities
  if value == "uniform":
    return (1.0 / g,) * g
  if isinstance(value, str) and value in SAMPLING_PRESETS:
    value = SAMPLING_PRESETS[value]
  elif isinstance(value, str):
    try:
      value = tuple(float(p) for p in value.split("/"))
    except ValueError:
      raise UserError(
        f"sampling={value!r} is neither a preset ({', '.join(SAMPLING_PRESETS)}) "
        "nor probabilities like '0.2/0.22/0.24/0.34'"
      ) from None
  value = tuple(float(p) for p in value)
  if len(value) != g or not min(value) >= 0 or not abs(sum(value) - 1) <= 1e-6:  # NaN is neither
    raise UserError(
      f"sampling={value} must be {g} non-negative probabilities "
      f"({'/'.join(names(config))}) that add up to 1; they add up to {sum(value):g}"
    )
  return value


def sample_index(seed: int, step: int, probabilities: Sequence[float]) -> int:
  """Index of the granularity of one step (Eq. 2): a pure function of (seed, step).

  Every host computes the same value, and a resumed run repeats it.
  """
  return int(_sample(seed, step, probabilities, 1)[0])


def sample_layers(
  seed: int, step: int, probabilities: Sequence[float], num_layers: int
) -> np.ndarray:
  """[L] int32: the same for every layer of a step that draws each by itself."""
  return _sample(seed, step, probabilities, num_layers)


def _sample(seed: int, step: int, probabilities: Sequence[float], number: int) -> np.ndarray:
  bits = np.random.SeedSequence((seed, step)).generate_state(number, np.uint64)
  u = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
  last = max(i for i, p in enumerate(probabilities) if p > 0)
  indices = np.searchsorted(np.cumsum(probabilities), u, side="right")
  return np.minimum(indices, last).astype(np.int32)


# ------------------------------------------------------------ Mix'n'Match

# The shapes of Appendix D.1; the first is the one the paper recommends.
SHAPES = ("increasing", "decreasing", "increasing-decreasing", "decreasing-increasing")


def mix_n_match_ladder(config: ModelConfig, shape: str = "increasing") -> list[Granularity]:
  """All least-slope granularities of a shape, smallest first (Section 3.3).

  Adjacent entries differ in one layer; each mixes at most two neighbouring
  sizes. `increasing` has the larger one in the deeper layers, `decreasing` in the
  first, `increasing-decreasing` in the middle, `decreasing-increasing` at both
  ends. Length (g-1) * L + 1 for a universal model.

  Raises:
    UserError: for an unknown shape.
  """
  if shape not in SHAPES:
    raise UserError(f"shape={shape!r} is not one of {', '.join(SHAPES)}")
  layers, sizes = config.num_layers, trained(config)
  # Layers in the order in which they are given the larger size.
  order = {
    "increasing": range(layers - 1, -1, -1),
    "decreasing": range(layers),
    "increasing-decreasing": sorted(range(layers), key=lambda i: abs(2 * i - layers + 1)),
    "decreasing-increasing": sorted(range(layers), key=lambda i: -abs(2 * i - layers + 1)),
  }[shape]
  ladder = []
  for low, high in zip(sizes, sizes[1:]):
    for count_high in range(layers):
      larger = set(list(order)[:count_high])
      pick = lambda part: tuple(
        getattr(high if i in larger else low, part)[i] for i in range(layers)
      )
      ladder.append(Granularity(pick("ffn"), pick("heads")))
  return list(dict.fromkeys(ladder + sizes[-1:]))


def ladder_points(config: ModelConfig, points: int) -> list[Granularity]:
  """About `points` granularities spread over the Mix'n'Match ladder, S and XL included."""
  rungs = mix_n_match_ladder(config)
  picks = sorted({round(i) for i in np.linspace(0, len(rungs) - 1, max(points, 2))})
  return [rungs[i] for i in picks]


# What a budget can bound -> (its unit, cost of (config, granularity)).
COSTS = {
  "params": ("parameters", lambda c, g: count(c, g).params),
  "nonembedding": ("non-embedding parameters", lambda c, g: count(c, g).non_embedding_params),
  "ffn": ("FFN parameters", lambda c, g: count(c, g).ffn_params),
  "flops": ("FLOPs", lambda c, g: count(c, g).flops),
}
LATENCIES = {
  "latency": "seconds for a forward pass",
  "decode": "seconds per decoded token",
}
_UNITS = {
  "": 1,
  "k": 1e3,
  "K": 1e3,
  "M": 1e6,
  "G": 1e9,
  "B": 1e9,
  "T": 1e12,
  "s": 1,
  "ms": 1e-3,
  "us": 1e-6,
}
_BUDGET = re.compile(
  r"(?:(?P<kind>[a-z_]+):)?(?P<number>[0-9.]+(?:[eE][+-]?[0-9]+)?)"
  r"(?P<unit>x|k|K|M|G|B|T|s|ms|us|)(?P<flop>FLOPs?)?"
)


def mix_n_match(
  config: ModelConfig,
  budget: str | None = None,
  *,
  profile=None,
  shape: str = "increasing",
  **bound: float | str,
) -> Granularity:
  """The largest Mix'n'Match granularity within a budget (Section 3.3).

  Args:
    budget: text, such as "0.6x" (of XL's parameters), "620M", "ffn:94M", "ffn:0.5x",
      "nonembedding:245.5M", "1.2GFLOP", "flops:1.2G", "15ms" or "latency:15ms" (one
      forward pass as profiled), "decode:0.4ms" (one token).
    profile: a `profile.Profile` of this device, which latencies need.
    shape: one of SHAPES.
    **bound: instead of `budget`, one of params, nonembedding, ffn, flops, latency,
      decode: a number, or text such as "0.6x" and "620M".

  Raises:
    UserError: for a budget that does not parse, or is below the smallest or above
      the largest granularity.
  """
  if (budget is None) == (len(bound) != 1) or len(bound) > 1:
    raise UserError(
      f"give one budget: mix_n_match(config, '0.6x') or one of "
      f"{', '.join([*COSTS, *LATENCIES])}=...; got {budget!r} and {bound}"
    )
  if budget is None:
    kind, value = next(iter(bound.items()))
    budget = f"{kind}:{value}"
  kind, number, relative = _parse_budget(budget)
  if kind in LATENCIES:
    if profile is None:
      raise UserError(
        f"budget {budget!r} bounds a latency, which needs a measured profile: run "
        "python -m matformer_jax.latency --workdir=DIR on this device"
      )
    unit, cost = LATENCIES[kind], lambda c, g: profile.predict(g, kind)
  else:
    unit, cost = COSTS[kind]
  ladder = mix_n_match_ladder(config, shape)
  costs = [cost(config, g) for g in ladder]
  limit = number * costs[-1] if relative else number
  if not costs[0] <= limit <= costs[-1] * (1 + 1e-9):
    ends = " to ".join(
      f"{1e3 * c:,.4g}ms ({to_text(g, config)})"
      if kind in LATENCIES
      else f"{c:,} ({to_text(g, config)})"
      for c, g in ((costs[0], ladder[0]), (costs[-1], ladder[-1]))
    )
    side = "below the smallest" if limit < costs[0] else "above the largest"
    amount = f"{1e3 * limit:,.6g} milli{unit}" if kind in LATENCIES else f"{limit:,.6g} {unit}"
    raise UserError(f"budget {budget!r} = {amount} is {side} granularity; give {ends}")
  return max(
    (g for g, c in zip(ladder, costs) if c <= limit * (1 + 1e-9)), key=lambda g: cost(config, g)
  )


def _parse_budget(text: str) -> tuple[str, float, bool]:
  """(kind, number, whether it is a share of the largest) of a budget's text."""
  match = _BUDGET.fullmatch(text.strip())
  parts = match.groupdict() if match else {}
  kinds = [*COSTS, *LATENCIES]
  try:
    number = float(parts["number"])
  except (KeyError, ValueError):
    raise UserError(
      f"budget {text!r} does not parse; write 0.6x, 620M, 1.2GFLOP or 15ms, or one "
      f"of {', '.join(k + ':' for k in kinds)} and a number"
    ) from None
  unit = parts["unit"]
  timed = unit in ("s", "ms", "us")
  kind = parts["kind"] or ("flops" if parts["flop"] else "latency" if timed else "params")
  if kind not in kinds:
    raise UserError(f"budget {text!r}: {kind!r} is not one of {', '.join(kinds)}")
  if (
    (timed and kind not in LATENCIES)
    or (parts["flop"] and kind != "flops")
    or (kind in LATENCIES and unit not in ("", "x", "s", "ms", "us"))
  ):
    raise UserError(f"budget {text!r}: the unit does not fit {kind!r}")
  return kind, number * _UNITS.get(unit, 1), unit == "x"


# ----------------------------------------------------------------- counts


@dataclasses.dataclass(frozen=True)
class Counts:
  """Sizes of one granularity.

  Attributes:
    params: all parameters, a tied embedding once.
    non_embedding_params: of the blocks and the last norm (Table 4's second column; the
      encoder sizes of Table 8).
    ffn_params: FFN matrices only (Table 4's third column).
    flops: forward FLOPs of a token at the training context, or of an image: see
      `config.unit`.
  """

  params: int
  non_embedding_params: int
  ffn_params: int
  flops: int

  @property
  def train_flops(self) -> int:
    """Forward and backward: three times the forward."""
    return 3 * self.flops


def count(
  config: ModelConfig, granularity: GranularityLike, num_tokens: int | None = None
) -> Counts:
  """Exact parameter counts, and FLOPs by PaLM's convention (its Appendix B).

  Forward FLOPs per token = 2 x matmul parameters + 4 x L x N x H x T: the
  attention's two T x T products are counted in full, without a causal discount.
  An image costs T tokens, and its patches and head.

  Args:
    num_tokens: T; default the model's own.
  """
  granularity = parse(granularity, config)
  num_tokens = num_tokens or config.num_tokens
  d, h = config.d_model, config.head_dim
  projections = 2 if config.gated else 1  # into the FFN
  heads = [config.head_counts[i] for i in granularity.heads]
  widths = [config.ffn_widths[i] for i in granularity.ffn]
  ffn = sum((projections + 1) * d * width for width in widths)
  kv_heads = [n // config.queries_per_kv for n in heads]
  attention = sum(2 * d * h * (n + m) for n, m in zip(heads, kv_heads))
  vectors = (2 * config.num_layers + 1) * d * (2 if config.layer_norm else 1)
  if config.qkv_bias:
    vectors += sum(h * (n + 2 * m) for n, m in zip(heads, kv_heads))
  if config.qk_norm:
    vectors += 2 * config.num_layers * h
  if config.biases:
    vectors += sum(d for _ in heads) + sum(projections * m + d for m in widths)
  blocks = ffn + attention + vectors
  per_token = 2 * (ffn + attention) + sum(4 * n * h * num_tokens for n in heads)
  return Counts(
    params=config.end_params + blocks,
    non_embedding_params=blocks,
    ffn_params=ffn,
    flops=per_token * config.tokens_per_example + config.end_flops,
  )


# ---------------------------------------------------------------- helpers


def _parse_runs(text: str, whole: str, config: ModelConfig) -> tuple[int, ...]:
  known = names(config)
  runs: list[tuple[int, int]] = []
  parts = text.split("+")
  for part in parts:
    name, star, repeat = (s.strip() for s in part.partition("*"))
    if name not in known:
      near = difflib.get_close_matches(name.upper(), known, n=1)
      raise UserError(
        f"granularity {whole!r}: {name!r} is not a size; use one of "
        f"{', '.join(known)}"
        + (f" (did you mean {near[0]}?)" if near else "")
        + f", or runs such as {_example(config)!r}"
      )
    if star and not (repeat.isdecimal() and len(repeat) < 7 and int(repeat) > 0):
      raise UserError(
        f"granularity {whole!r}: {repeat!r} is not a number of layers; write runs such as "
        f"{_example(config)!r}"
      )
    if len(parts) == 1 and not star:
      repeat = config.num_layers
    runs.append((known.index(name), int(repeat or 1)))
  total = sum(repeat for _, repeat in runs)
  if total > config.num_layers:  # before a list of so many is made
    raise UserError(
      f"granularity {whole!r} has {total} layers; the model has num_layers={config.num_layers}"
    )
  return tuple(index for index, repeat in runs for _ in range(repeat))


def _runs_text(indices: tuple[int, ...], config: ModelConfig) -> str:
  runs = [(names(config)[i], len(list(group))) for i, group in itertools.groupby(indices)]
  if len(runs) == 1:
    return runs[0][0]
  return "+".join(f"{name}*{length}" for name, length in runs)


def _check(granularity: Granularity, value: GranularityLike, config: ModelConfig) -> None:
  stored_ffn = [r.ffn for r in config.spans for _ in range(r.num_layers)]
  stored_heads = [r.heads for r in config.spans for _ in range(r.num_layers)]
  for part, stored in ((granularity.ffn, stored_ffn), (granularity.heads, stored_heads)):
    if len(part) != config.num_layers:
      raise UserError(
        f"granularity {value!r} has {len(part)} layers; the model has "
        f"num_layers={config.num_layers}"
      )
    for layer, (index, top) in enumerate(zip(part, stored)):
      if not 0 <= index < config.num_granularities:
        raise UserError(
          f"granularity {value!r}: index {index} at layer {layer} is not in "
          f"0..{config.num_granularities - 1}"
        )
      if index > top:
        raise UserError(
          f"granularity {value!r}: layer {layer} is stored only up to "
          f"{names(config)[top]}; ask for {names(config)[top]} or less"
        )
