"""What each granularity's parts cost on this device, and what a mix of them will.

Two workloads are timed: `latency`, a forward pass over a batch with all its logits,
and `decode`, one token of a batch with an attention cache. For each: the model without
layers (embedding, final norm, head), with the attention half of its layers, and whole at
every trained size. What a layer adds is the difference over the number of layers, so a
mix is predicted as the sum of its parts. The profile is stored as profile.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import numpy as np
import tqdm

from matformer_jax import granularity as gran
from matformer_jax import runtime, storage, tables
from matformer_jax.config import Execution, MatLMConfig, ModelConfig
from matformer_jax.decoding.decode import Decoder
from matformer_jax.errors import UserError
from matformer_jax.models import cache as kv
from matformer_jax.models import layers

PROFILE_FILE = "profile.json"
WORKLOADS = tuple(gran.LATENCIES)
TOKENS_PER_CALL = 32  # of the decode workload: a call's fixed cost is spread over them


@dataclasses.dataclass(frozen=True)
class Costs:
  """Seconds of one workload's parts; layer indices are granularity indices.

  Attributes:
    fixed: embedding, final norm, output head and whatever a call costs.
    attention: the attention half of one layer, per head granularity.
    ffn: the FFN half of one layer, per FFN granularity.
    batch: sequences.
    tokens: of the forward pass, or of the cache.
  """

  fixed: float
  attention: tuple[float, ...]
  ffn: tuple[float, ...]
  batch: int
  tokens: int


@dataclasses.dataclass(frozen=True)
class Profile:
  """Measured costs of a model on a device.

  Attributes:
    device: what it was measured on.
    costs: workload -> Costs.
  """

  device: str
  costs: Mapping[str, Costs]

  def predict(self, granularity: gran.Granularity, workload: str = "latency") -> float:
    """Seconds of a workload at any granularity."""
    c = self.costs[workload]
    return c.fixed + sum(
      c.attention[h] + c.ffn[f] for f, h in zip(granularity.ffn, granularity.heads)
    )

  def to_json(self) -> dict[str, Any]:
    """JSON-ready form; `from_json` inverts it."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> Profile:
    costs = {
      name: Costs(**c | {"attention": tuple(c["attention"]), "ffn": tuple(c["ffn"])})
      for name, c in values["costs"].items()
    }
    return cls(values["device"], costs)


def read(workdir, config: ModelConfig) -> Profile | None:
  """The profile stored with a model, or None; warns if another device made it.

  Raises:
    UserError: if the file does not fit the model or cannot be read.
  """
  path = storage.path(workdir) / PROFILE_FILE
  if not path.exists():
    return None
  try:
    profile = Profile.from_json(json.loads(path.read_text()))
    sizes = {len(c.ffn) for c in profile.costs.values()}
    if sizes != {config.num_granularities} or set(profile.costs) != set(WORKLOADS):
      raise ValueError("it is of another model")
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(
      f"{path} is not a profile of this model ({e}); measure again: python -m "
      f"matformer_jax.latency --workdir={workdir}"
    ) from e
  if profile.device != device_name():
    runtime.warn(
      f"{path} was measured on {profile.device}, this is {device_name()}; measure again "
      f"with python -m matformer_jax.latency --workdir={workdir}"
    )
  return profile


def device_name() -> str:
  """The device's kind; for a CPU its model and number of threads."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  return f"{runtime.cpu_model()}, {runtime.cpu_count()} threads"


# ----------------------------------------------------------------- measuring


class _AttentionBlock(layers.Block):
  """The attention half of a block."""

  def feed_forward(self, x_BxTxD, layer, seeds_B):
    return x_BxTxD


class _AttentionOnly(Decoder):
  """A decoder whose layers have no FFN."""

  block_class = _AttentionBlock


class _NoLayers(Decoder):
  """A decoder without layers."""

  def run_layers(self, weights, x, cache, start, origin):
    return x, cache


def make_program(
  decoder: Decoder, weights, workload: str, batch: int, tokens: int
) -> Callable[[], float]:
  """A function that runs one call of a workload and returns its seconds."""
  if workload == "latency":
    ids = jax.device_put(np.zeros((batch, tokens), np.int32), weights["embedding"].sharding)
    start, run, per_call = lambda: None, lambda _: _forward(decoder, weights, ids), 1
  else:
    room = max(tokens - 2, 2 * TOKENS_PER_CALL)  # with the prompt: a cache of `tokens`
    start = lambda: decoder.prefill(weights, [[0]] * batch, room, range(batch))
    run = lambda state: decoder.advance(weights, state, TOKENS_PER_CALL)
    per_call = TOKENS_PER_CALL

  def timed() -> float:
    # Twice, and the second counts: the first finds other programs' weights in the CPU's caches.
    state = jax.block_until_ready(run(start()))
    started = time.perf_counter()
    jax.block_until_ready(run(state))
    return (time.perf_counter() - started) / per_call

  timed()  # compiles
  return timed


@functools.partial(jax.jit, static_argnums=0)
def _forward(decoder: Decoder, weights, ids):
  weights = decoder.submodel(weights)
  cache = kv.init_cache(decoder.config, decoder.execution, *ids.shape)  # not returned: not made
  return decoder.logits(weights, decoder.extend(weights, ids, cache, None)[0])


def fastest(programs: Sequence[Callable[[], float]], rounds: int, label: str) -> list[float]:
  """Each program's fastest call, programs taken in turn: noise only ever adds time."""
  best = [float("inf")] * len(programs)
  for _ in tqdm.trange(rounds, desc=label, mininterval=1.0):
    for i, program in enumerate(programs):
      best[i] = min(best[i], program())
  return best


def parts(config: MatLMConfig, execution: Execution) -> list[Decoder]:
  """What is timed: no layers; attention halves, per head granularity; whole sizes."""
  sizes = gran.trained(config)
  halves = [_AttentionOnly(config, execution, size) for size in sizes]
  if not config.nested_heads:
    halves = halves[-1:]
  return [
    _NoLayers(config, execution, sizes[-1]),
    *halves,
    *(Decoder(config, execution, size) for size in sizes),
  ]


def solve(config: MatLMConfig, times: Sequence[float], batch: int, tokens: int) -> Costs:
  """Costs of the parts from the seconds of `parts`: differences per layer."""
  sizes = len(gran.trained(config))
  fixed, *times = times
  per_layer = [(t - fixed) / config.num_layers for t in times]
  attention, layer = per_layer[:-sizes], per_layer[-sizes:]
  attention = attention * (sizes if len(attention) == 1 else 1)
  ffn = [b - a for a, b in zip(attention, layer)]
  # Sizes that an extracted model lacks repeat its last.
  pad = lambda x: tuple(x + x[-1:] * (config.num_granularities - len(x)))
  return Costs(fixed, pad(attention), pad(ffn), batch, tokens)


def measure(
  config: MatLMConfig,
  execution: Execution,
  params,
  workload: str,
  batch: int,
  tokens: int,
  rounds: int,
) -> Costs:
  """Times the parts of a model.

  Args:
    params: the stored parameters.
    workload: one of WORKLOADS.
    batch, tokens: shape of the forward pass; for decode, tokens of cache.
    rounds: calls of each program; the fastest counts.
  """
  decoders = parts(config, execution)
  weights = decoders[-1].lay_out(params)
  programs = [make_program(d, weights, workload, batch, tokens) for d in decoders]
  return solve(config, fastest(programs, rounds, f"timing {workload}"), batch, tokens)


def table(config: MatLMConfig, profile: Profile) -> str:
  """The table a person reads."""
  blocks = [profile.device]
  for workload, c in profile.costs.items():
    ms = lambda seconds: f"{1e3 * seconds:.3f}"
    rows = [
      (
        gran.to_text(g, config),
        ms(c.fixed),
        ms(c.attention[g.heads[-1]]),
        ms(c.ffn[g.ffn[-1]]),
        ms(profile.predict(g, workload)),
      )
      for g in gran.trained(config)
    ]
    shape = f"{c.batch} x {c.tokens} tokens" + (" of cache" if workload == "decode" else "")
    header = ("granularity", "embedding, head", "attention/layer", "FFN/layer", "whole model")
    what = f"{workload}, milli{gran.LATENCIES[workload]}, {shape}"
    blocks.append(f"{what}\n{tables.table(header, rows)}")
  return "\n\n".join(blocks)
