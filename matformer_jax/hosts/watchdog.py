"""Leaves a run that hangs, with the stacks that say where."""

from __future__ import annotations

from collections.abc import Callable
import threading
import time

from matformer_jax.hosts.multihost import Hosts, Rounds


class Watchdog:
  """As a context manager, watches for `alive` calls, and gives up without them.

  Args:
    timeout_s: longest time between two calls; 0 never gives up.
    hosts: gives up with EXIT_RETRY, and takes the other processes along.
    clock: seconds.
  """

  def __init__(self, timeout_s: float, hosts: Hosts, clock: Callable[[], float] = time.monotonic):
    self._timeout_s, self._hosts, self._clock = timeout_s, hosts, clock
    self._rounds = Rounds(timeout_s / 2, clock)
    self._stopped = threading.Event()

  def __enter__(self):
    self.alive("the start of training")
    if self._timeout_s:
      threading.Thread(target=self._run, daemon=True, name="watchdog").start()
    return self

  def __exit__(self, *_):
    self._stopped.set()

  def alive(self, what: str) -> None:
    """Tells that `what` has just been done."""
    self._what, self._when = what, self._clock()

  def _run(self) -> None:
    self._rounds.suspended()
    while not self._stopped.wait(min(self._timeout_s / 4, 5.0)):
      self.check()

  def check(self) -> None:
    """Gives up if the last `alive` is too long ago; called several times per timeout."""
    if self._rounds.suspended():
      self.alive(self._what)
    silent = self._clock() - self._when
    if silent > self._timeout_s:
      self._hosts.give_up(
        f"nothing finished for {silent:.0f} s after {self._what} "
        f"(hang_timeout_s={self._timeout_s:g})"
      )
