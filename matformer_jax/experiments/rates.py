"""Learning rates: each method of a comparison gets the best of those that it is tried with."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from matformer_jax.errors import UserError
from matformer_jax.experiments.families import INDEPENDENT, RATE_OF, Family
from matformer_jax.experiments.lab import Lab
from matformer_jax.experiments.runs import Run
from matformer_jax.training import metrics

# While a method's best is the lowest or the highest so far, one that is lower or higher by this
# factor is tried too, at most so many times.
STEP, MOST_MORE = 2.0, 3
# Losses of the first seed that differ by less than this share tell nothing: such learning rates are
# compared over all seeds.
TIE = 0.005


@dataclasses.dataclass
class _Method:
  """A method of one family, with the learning rates that it is tried with; `finalists` are those
  that all seeds decide between."""

  name: str
  family: Family
  rates: list[float]
  finalists: list[float] = dataclasses.field(default_factory=list)

  def runs(self, rate: float, seed: int) -> list[Run]:
    if self.name == INDEPENDENT:
      return list(self.family.independents(seed, rate).values())
    return [self.family.universal(self.name, seed, rate)]


class Sweep:
  """Of the methods that some runs are trained with: on the first seed, and where that does not
  decide on all.

  Attributes:
    tried: a row per method and learning rate, once `choose` has chosen.
  """

  def __init__(self, lab: Lab, planned: Sequence[Run]):
    self._lab = lab
    self._methods: list[_Method] = []
    for family in (lab.scale.text, lab.scale.images):
      mine = [run for run in planned if run.config.task == family.config.task]
      names = dict.fromkeys(RATE_OF.get(run.method, run.method) for run in mine)
      if len(family.rates) > 1:
        self._methods += [_Method(name, family, list(family.rates)) for name in names]
    self.tried: list[dict[str, Any]] = []

  @property
  def runs(self) -> list[Run]:
    """What is trained to choose, as far as is known."""
    return [
      run
      for m in self._methods
      for rate in m.rates
      for seed in self._seeds(m, rate)
      for run in m.runs(rate, seed)
    ]

  def choose(self) -> bool:
    """Gives the lab each method's best, if all are trained; says whether the sweep is complete.

    Raises:
      UserError: if a method diverged at all learning rates.
    """
    while not self._lab.pool.missing(self.runs, may_diverge=True):
      self.tried = [row for method in self._methods for row in self._compare(method)]
      if [m for m in self._methods if self._extend(m)]:
        continue
      if not [m for m in self._methods if self._find_finalists(m)]:
        return True
    return False

  def _seeds(self, method: _Method, rate: float) -> tuple[int, ...]:
    return self._lab.seeds if rate in method.finalists else self._lab.seeds[:1]

  def _compare(self, method: _Method) -> list[dict[str, Any]]:
    """Takes the best; a row for each."""
    losses = {rate: self._mean_loss(method, rate) for rate in sorted(method.rates)}
    best = min(method.finalists or losses, key=lambda rate: losses[rate])
    family = method.family
    if math.isinf(losses[best]):
      raise UserError(f"{family.name}: {method.name} diverged at all of {list(losses)}")
    self._lab.rates[family.config.task, method.name] = best
    return [
      {
        "family": family.name,
        "method": method.name,
        "learning_rate": rate,
        "seeds": len(self._seeds(method, rate)),
        "mean_loss": loss,
        "taken": rate == best,
      }
      for rate, loss in losses.items()
    ]

  def _extend(self, method: _Method) -> bool:
    """Adds a learning rate if the best is the lowest or the highest so far."""
    rates, best = method.rates, self._lab.rate(method.family, method.name)
    if method.finalists:
      return False
    if min(rates) < best < max(rates) or len(rates) >= len(method.family.rates) + MOST_MORE:
      return False
    rates.append(best * STEP if best == max(rates) else best / STEP)
    return True

  def _find_finalists(self, method: _Method) -> bool:
    """Whether the best is hardly better than others, and all seeds have not been asked yet."""
    if method.finalists or len(self._lab.seeds) < 2:
      return False
    losses = {rate: self._mean_loss(method, rate) for rate in method.rates}
    limit = (1 + TIE) * min(losses.values())
    method.finalists = [rate for rate in method.rates if losses[rate] <= limit]
    return len(method.finalists) > 1

  def _mean_loss(self, method: _Method, rate: float) -> float:
    """Over all sizes, by the evaluation at the end of training; infinite if that diverged."""
    runs = [run for seed in self._seeds(method, rate) for run in method.runs(rate, seed)]
    if any(run.divergence(self._lab.pool.root).exists() for run in runs):
      return math.inf
    ends = [metrics.read_jsonl(self._lab.directory(run) / "eval.jsonl")[-1] for run in runs]
    return float(np.mean([loss for end in ends for loss in end["loss"].values()]))
