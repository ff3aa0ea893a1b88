"""How much of a month a job trains when machines fail, by simulation.

Chips fail independently, at a constant rate. A failure stops the whole job; what was done since the
newest whole checkpoint is done again. An elastic job of several slices goes on with those that are
left, until the lost one is back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from matformer_jax import tables

# Of one accelerator, hours: 419 unexpected interruptions in 54 days of 16,384 GPUs (Llama 3, Table
# 5). Nobody has published such a figure for TPUs.
CHIP_HOURS = 16_384 * 54 * 24 / 419
MONTH_S = 30 * 86_400.0
CHIPS = (256, 512, 1024, 2048, 4096, 8192)
INTERVALS_S = tuple(60.0 * 2 ** (i / 4) for i in range(29))  # a minute to two hours
_FAILURES, _MONTHS = 4_000, 2_000  # that a figure is the mean of, about and at most


@dataclasses.dataclass(frozen=True)
class Job:
  """A job, and the machines that it runs on.

  Attributes:
    chips: of all slices.
    slices: equal ones; a failure takes one of them.
    chip_hours: mean time between failures of one chip.
    save_s: seconds for which a checkpoint stops the steps.
    write_s: seconds after that until it is whole.
    restart_s: seconds from a start to the first step: processes, data, restoring, compiling.
    replace_s: seconds until a failed machine is there again.
  """

  chips: int
  slices: int = 1
  chip_hours: float = CHIP_HOURS
  save_s: float = 5.0
  write_s: float = 60.0
  restart_s: float = 300.0
  replace_s: float = 600.0

  @property
  def failure_s(self) -> float:
    """Mean seconds between two failures of the whole job."""
    return 3600 * self.chip_hours / self.chips

  def daly_s(self) -> float:
    """The best time between two checkpoints: to first order (Young 1974, Daly 2006)."""
    return math.sqrt(2 * self.save_s * self.failure_s) - self.save_s


def goodput(job: Job, interval_s: float, elastic: bool = False, seed: int = 0) -> float:
  """The share of a month that went into steps which counted; those of fewer slices count less.

  Args:
    interval_s: seconds of steps between two checkpoints.
    elastic: go on with the slices that are left.
    seed: of the failures.
  """
  rng = np.random.default_rng(seed)
  months = min(math.ceil(_FAILURES * job.failure_s / MONTH_S), _MONTHS)
  return float(np.mean([_month(job, interval_s, elastic, rng) for _ in range(months)]))


def _month(job: Job, interval_s: float, elastic: bool, rng: np.random.Generator) -> float:
  time, work = 0.0, 0.0  # seconds, and seconds of work of the whole job
  up, back = job.slices, math.inf  # slices that run, and when the lost ones are there again
  cycle = interval_s + job.save_s
  while time < MONTH_S:
    share = up / job.slices
    failure = time + rng.exponential(job.failure_s / share)
    until = min(failure, max(back, time), MONTH_S)
    ran = until - time
    if until < failure:  # a stop that is asked for saves first
      work += share * ran * interval_s / cycle
      time = until + job.save_s + job.restart_s
      up, back = job.slices, math.inf
      continue
    work += share * interval_s * (max(ran - job.write_s, 0.0) // cycle)
    if elastic and up > 1:
      up, back = up - 1, min(back, until + job.replace_s)
      time = until + job.restart_s
    else:
      up, back = job.slices, math.inf
      time = until + job.replace_s + job.restart_s
  return work / MONTH_S


def best_interval(job: Job) -> float:
  """Of INTERVALS_S, in seconds."""
  return max(INTERVALS_S, key=lambda interval: goodput(job, interval))


def rows(job: Job, interval_s: float) -> list[dict[str, Any]]:
  """For the job, and for jobs of other numbers of chips.

  Args:
    job: as planned; the others' slices are as large as its own, if it has several.
    interval_s: between two checkpoints, as configured; 0 for none.
  """
  found = []
  for chips in sorted({job.chips, *CHIPS}):
    slices = max(chips * job.slices // job.chips, 1) if job.slices > 1 else 1
    other = dataclasses.replace(job, chips=chips, slices=slices)
    best = best_interval(other)
    found.append(
      {
        "chips": chips,
        "slices": slices,
        "failures": MONTH_S / other.failure_s,
        "best_interval_s": best,
        "daly_interval_s": other.daly_s(),
        "goodput": goodput(other, best),
        "elastic": goodput(other, best, elastic=True) if slices > 1 else None,
        "as_configured": goodput(other, interval_s) if interval_s else None,
      }
    )
  return found


def table(found: list[dict[str, Any]], job: Job) -> str:
  """The same for people."""
  percent = lambda value: "" if value is None else f"{100 * value:.1f}%"
  text = tables.table(
    [
      *("chips", "slices", "failures", "best interval, min", "Young/Daly, min"),
      *("goodput", "if elastic", "as configured"),
    ],
    [
      [
        f"{row['chips']:,}",
        str(row["slices"]),
        f"{row['failures']:.1f}",
        f"{row['best_interval_s'] / 60:.1f}",
        f"{row['daly_interval_s'] / 60:.1f}",
        *(percent(row[key]) for key in ("goodput", "elastic", "as_configured")),
      ]
      for row in found
    ],
  )
  return (
    "Goodput over a month, simulated: the share of the time that went into steps which counted\n\n"
    f"{text}\n\nA chip fails once in {job.chip_hours:,.0f} hours, and is replaced after "
    f"{job.replace_s:g} s; a start takes {job.restart_s:g} s; a checkpoint stops the steps for "
    f"{job.save_s:g} s and is whole {job.write_s:g} s later."
  )
