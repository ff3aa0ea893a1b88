"""Reading ahead: the next batches are on the device before the step asks for them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
import queue
import threading
from typing import Any


class Prefetcher:
  """Advances an iterator of batches in a thread of its own.

  Args:
    batches: of consecutive steps, on the device.
    depth: batches kept ready.
  """

  def __init__(self, batches: Iterator[Any], depth: int = 2):
    self._ready: queue.Queue = queue.Queue(depth)
    self._stopped = threading.Event()
    self._batches = batches
    self._thread = threading.Thread(target=self._run, daemon=True, name="prefetch")
    self._thread.start()

  def _run(self) -> None:
    while True:
      try:
        item = (next(self._batches), None)
      except StopIteration:
        return
      except BaseException as e:  # raised again where the batch is asked for
        item = (None, e)
      while not self._stopped.is_set():
        try:
          self._ready.put(item, timeout=0.1)
          break
        except queue.Full:
          continue
      if self._stopped.is_set() or item[1] is not None:
        return

  def next(self) -> Any:
    """The next step's batch. Raises what loading it raised."""
    batch, error = self._ready.get()
    if error is not None:
      raise error
    return batch

  def close(self) -> None:
    """Stops reading, and closes the batches where they are a generator."""
    self._stopped.set()
    self._thread.join()
    if isinstance(self._batches, Generator):
      self._batches.close()
