"""What becomes of a claim: means over seeds with confidence intervals, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math

import numpy as np
import scipy.stats

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over seeds, and half the width of its confidence interval (Student's t); of one seed
  infinite."""

  mean: float
  half: float

  def fixed(self, digits: int) -> str:
    """With so many digits after the point."""
    half = f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else ""
    return f"{self.mean:.{digits}f}{half}"

  def __str__(self) -> str:
    return f"{self.mean:.4g}" + (f" ± {self.half:.2g}" if math.isfinite(self.half) else "")


def interval(values: Sequence[float]) -> Interval:
  """Of one value per seed."""
  mean, n = float(np.mean(values)), len(values)
  if n < 2:
    return Interval(mean, math.inf)
  error = float(np.std(values, ddof=1)) / math.sqrt(n)
  return Interval(mean, error * float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)))


def mean_by_seed(values: Mapping[str, Sequence[float]]) -> list[float]:
  """The mean over sizes, or mixes, for each seed."""
  return [float(np.mean(seed)) for seed in zip(*values.values())]


def below(differences: Sequence[float], margin: float = 0.0) -> str:
  """Whether paired differences, one per seed, are below a margin: a verdict."""
  found = interval(differences)
  if found.mean + found.half < margin:
    return HOLDS
  return FAILS if found.mean - found.half >= margin else UNDECIDED


def above(differences: Sequence[float], margin: float = 0.0) -> str:
  """Whether they are above it."""
  return below([-d for d in differences], -margin)


def all_of(verdicts: Sequence[str]) -> str:
  """Of a claim that says several things."""
  if FAILS in verdicts:
    return FAILS
  return HOLDS if all(v == HOLDS for v in verdicts) else UNDECIDED


@dataclasses.dataclass(frozen=True)
class Claim:
  """A row of the report.

  Attributes:
    says: the claim.
    paper: its number there.
    ours: the number here.
    verdict: HOLDS, FAILS or UNDECIDED.
  """

  says: str
  paper: str
  ours: str
  verdict: str


def at_every_size(
  says: str,
  paper: str,
  differences: Mapping[str, Sequence[float]],
  judge: Callable[[Sequence[float]], str],
) -> Claim:
  """A claim about each of several sizes; `differences` are by size, then by seed."""
  verdicts = {size: judge(values) for size, values in differences.items()}
  show = lambda size, values: (
    f"{size} {interval(values)}"
    + (f" ({verdicts[size]})" if len(set(verdicts.values())) > 1 else "")
  )
  ours = ", ".join(show(size, values) for size, values in differences.items())
  return Claim(says, paper, ours, all_of(list(verdicts.values())))
