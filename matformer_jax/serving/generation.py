"""The continuations that one HTTP request asks for, from the engine's thread to its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
import contextlib
import dataclasses
import functools
import time
from typing import Literal

from matformer_jax.data.tokenizer import Tokenizer
from matformer_jax.serving.engine import Engine, Job, Request, Update
from matformer_jax.serving.refusals import Refusal, stopping, timed_out
from matformer_jax.serving.text import TextStream

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Piece:
  """News of one continuation.

  Attributes:
    index: which.
    text: what is added; may be empty.
    finish: "stop", "length", or None: more to come.
  """

  index: int
  text: str
  finish: Finish | None


class Generation:
  """Continuations under way. Made and used on an event loop.

  Args:
    requests: one for each continuation.
    stop: see TextStream.
    seconds: from now, after which `pieces` raises.

  Raises:
    Overloaded, UserError: as `Engine.submit`; none of the requests is left with the engine then.

  Attributes:
    tokens: generated so far.
    first_at: `time.perf_counter()` of the first news; None before.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    stop: Sequence[str],
    seconds: float,
  ):
    self.tokens, self.first_at = 0, None
    self._seconds = seconds
    self._loop = asyncio.get_running_loop()
    self._deadline = self._loop.time() + seconds
    self._news: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
    self._texts = [TextStream(tokenizer, r.prompt, stop) for r in requests]
    self.jobs: list[Job] = []
    try:
      for i, request in enumerate(requests):
        lead = self.jobs[0] if self.jobs else None
        self.jobs.append(engine.submit(request, functools.partial(self._hear, i), lead))
    except Exception:
      self.cancel()
      raise

  def _hear(self, index: int, update: Update) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
      self._loop.call_soon_threadsafe(self._news.put_nowait, (index, update))

  def cancel(self) -> None:
    """Frees the slots; nothing happens to what is finished."""
    for job in self.jobs:
      job.cancel()

  async def pieces(self) -> AsyncIterator[Piece]:
    """The news of all continuations as they come, until each is finished.

    Raises:
      Refusal: if the engine fails or stops, or time is up.
    """
    unfinished = set(range(len(self.jobs)))
    while unfinished:
      try:
        left = self._deadline - self._loop.time()
        index, update = await asyncio.wait_for(self._news.get(), max(left, 0))
      except TimeoutError:
        raise timed_out(self._seconds) from None
      if index not in unfinished:
        continue  # cancelled at a stop string
      self.first_at = self.first_at or time.perf_counter()
      if update.finish == "error":
        raise Refusal(500, "the model failed; the server's log says how", code="engine_error")
      if update.finish == "cancelled":
        raise stopping()
      self.tokens += len(update.tokens)
      stream, finish = self._texts[index], update.finish
      text = stream.push(update.tokens)
      if finish:
        text += stream.close()
      if stream.stopped:
        self.jobs[index].cancel()
        finish = "stop"
      if finish:
        unfinished.remove(index)
      yield Piece(index, text, finish)
