"""Where the wall-clock of a run went, over all its restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import time

from matformer_jax import storage, tables

# What a run's time is spent on. `step` is goodput; `lost` are steps done, but not saved,
# before a restart; `down` is the time between a process's last word and the next one's start.
PHASES = ("start-up", "compile", "data", "step", "evaluation", "checkpoint", "lost", "down")
GOODPUT_FILE = "goodput.json"


@dataclasses.dataclass(frozen=True)
class _Attempt:
  """One process's share: unix times, and seconds by phase."""

  started: float
  ended: float
  seconds: dict[str, float]


class Ledger:
  """A clock that is always in one phase, so that the phases add up to the wall-clock.

  Args:
    path: `goodput.json` of the run, with the attempts before this one; None keeps
      the account in memory only (processes other than the first).
    steps_lost_s: seconds of steps that the last attempt did and this one repeats.
    clock: unix time.
    started: by that clock, when this attempt began; None: with this process.
  """

  def __init__(
    self,
    path: storage.Path | None,
    steps_lost_s: float = 0.0,
    clock: Callable[[], float] = time.time,
    started: float | None = None,
  ):
    self._clock = clock
    self._path = path
    self._earlier = _read(path) if path else []
    if self._earlier:
      seconds = self._earlier[-1].seconds
      lost = min(steps_lost_s, seconds["step"])
      seconds["step"] -= lost
      seconds["lost"] += lost
    self._started = process_start() if started is None else started
    self._phase = "start-up"
    self._since = self._started
    self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

  def enter(self, phase: str) -> None:
    """Ends the current phase and begins another."""
    now = self._clock()
    self._seconds[self._phase] += max(0.0, now - self._since)
    self._phase, self._since = phase, now

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Spends the block in `name`, then goes back to the phase before."""
    before = self._phase
    self.enter(name)
    try:
      yield
    finally:
      self.enter(before)

  def save(self) -> None:
    """Writes the account so far; a process killed later has lost only what came after."""
    self.enter(self._phase)
    if self._path is not None:
      attempts = self._earlier + [_Attempt(self._started, self._since, self._seconds)]
      account = json.dumps([dataclasses.asdict(a) for a in attempts], indent=1)
      storage.replace_file(self._path, account.encode())

  def totals(self) -> dict[str, float]:
    """Seconds by phase since the first attempt started; their sum is the wall-clock."""
    self.enter(self._phase)
    return total_seconds(self._earlier + [_Attempt(self._started, self._since, self._seconds)])

  def report(self) -> str:
    """A table of `totals`."""
    totals = self.totals()
    wall = sum(totals.values())
    rows = [
      [name, f"{seconds:,.1f}", f"{100 * seconds / wall:.1f}%"]
      for name, seconds in totals.items()
      if seconds > 0
    ]
    rows.append(["wall-clock", f"{wall:,.1f}", "100.0%"])
    attempts = len(self._earlier) + 1
    title = f"goodput {100 * totals['step'] / wall:.1f}%"
    title += f" over {attempts} starts" if attempts > 1 else ""
    return f"{title}\n{tables.table(['phase', 'seconds', 'share'], rows)}"


def total_seconds(attempts: Sequence[_Attempt]) -> dict[str, float]:
  """Sums attempts' phases; gaps between them are `down`."""
  totals = {name: sum(a.seconds.get(name, 0.0) for a in attempts) for name in PHASES}
  totals["down"] += sum(max(0.0, b.started - a.ended) for a, b in zip(attempts, attempts[1:]))
  return totals


def _read(path: storage.Path) -> list[_Attempt]:
  try:
    return [
      _Attempt(**{**a, "seconds": dict.fromkeys(PHASES, 0.0) | a["seconds"]})
      for a in json.loads(path.read_text())
    ]
  except (OSError, ValueError, TypeError, KeyError):
    return []  # a new run, or an account that cannot be read: begin another


def process_start() -> float:
  """Unix time at which this process started; now, where the system does not tell."""
  try:
    ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
  except (OSError, ValueError, IndexError):
    return time.time()
