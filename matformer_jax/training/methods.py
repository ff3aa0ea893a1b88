"""Which sizes a step trains: `config.method`.

  sampled    one, drawn by `sampling` (Section 3.2); the paper's method
  joint      all g, each on its share of the batch (DynaBERT, Appendix B.3)
  sandwich   XL, S and one drawn of those between (Yu and Huang 2019), each on its share
  layerwise  one drawn for every layer (OFA, Appendix B.3): the same program whatever is drawn

A step with several sizes divides its batch among them, so that `batch_size` examples cost one
pass each whatever the method: DynaBERT's g batches a step are a batch g times as large.
"""

from __future__ import annotations

import dataclasses
import statistics

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import MatLMConfig, ModelConfig
from matformer_jax.config_keys import Config
from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.training import optim

METHODS = ("sampled", "joint", "sandwich", "layerwise")


@dataclasses.dataclass(frozen=True)
class StepKind:
  """What a compiled step trains.

  Attributes:
    name: as progress lines and metrics.jsonl have it.
    granularities: one per part of the batch; of a layerwise step none, since it is told them.
    probability: with which a step is of this kind.
  """

  name: str
  granularities: tuple[gran.Granularity, ...]
  probability: float

  @property
  def layerwise(self) -> bool:
    """Whether the step is told the size of every layer."""
    return not self.granularities


def of(config: Config) -> str:
  """The method of a run; runs made before there was a choice sampled."""
  return getattr(config, "method", "sampled")


def step_kinds(config: Config, model: ModelConfig) -> tuple[StepKind, ...]:
  """The kinds of steps of a run, whose probabilities add up to 1.

  Raises:
    UserError: for an unknown method, bad probabilities, or a method that this model cannot be
      trained with.
  """
  method = of(config)
  if method not in METHODS:
    raise UserError(f"method={method!r} is unknown{did_you_mean(str(method), METHODS)}")
  if optim.updates_slice(config.optim) and method != "sampled":
    raise UserError(
      f"optim.scope='sliced' needs steps of one size: method='sampled', not {method!r}"
    )
  sizes = gran.trained(model)
  probabilities = size_probabilities(config, model)
  if method == "layerwise":
    if not isinstance(model, MatLMConfig):
      raise UserError(
        "method='layerwise' needs a language model; a vision model takes 'sampled', 'joint' or "
        "'sandwich'"
      )
    return (StepKind(method, (), 1.0),)
  text = lambda *chosen: ",".join(gran.to_text(g, model) for g in chosen)
  if method == "joint":
    return (StepKind(text(*sizes), tuple(sizes), 1.0),)
  if method == "sampled":
    return tuple(StepKind(text(g), (g,), p) for g, p in zip(sizes, probabilities))
  if len(sizes) < 2:
    raise UserError("method='sandwich' needs at least two sizes")
  small, *between, large = sizes
  if not between:
    return (StepKind(text(small, large), (small, large), 1.0),)
  shares = probabilities[1:-1]
  if not sum(shares):
    raise UserError(
      f"method='sandwich' draws one of {text(*between)}, and sampling={config.sampling!r} gives "
      "them no probability"
    )
  return tuple(
    StepKind(text(small, g, large), (small, g, large), p / sum(shares))
    for g, p in zip(between, shares)
  )


def size_probabilities(config: Config, model: ModelConfig) -> tuple[float, ...]:
  """`config.sampling`, one per trained size; a model that stores fewer than g gives its last
  the rest."""
  p = gran.sampling_probabilities(config.sampling, model)
  last = len(gran.trained(model)) - 1
  return p[:last] + (sum(p[last:]),)


def check_batch(config: Config, model: ModelConfig, mesh) -> None:
  """Raises UserError where the batch does not divide over mesh, parts and micro-batches."""
  parts = max(1, *(len(kind.granularities) for kind in step_kinds(config, model)))
  sharding.check_batch(config.batch_size, config.grad_accum, mesh, parts=parts)


def mean_cost(kind: StepKind, sizes, probabilities, cost) -> float:
  """The mean over a step's examples of `cost` of the size that each goes through.

  Of a layerwise step it is expected, and right for a cost that adds up over layers.
  """
  if kind.layerwise:
    return sum(p * cost(g) for g, p in zip(sizes, probabilities))
  return statistics.fmean(cost(g) for g in kind.granularities)
