"""Continuations as OpenAI's responses: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
import contextlib
import dataclasses
import time
from typing import Any
import uuid

from starlette.requests import Request  # pyright: ignore[reportMissingImports]
from starlette.responses import (  # pyright: ignore[reportMissingImports]
  JSONResponse,
  Response,
  StreamingResponse,
)

from matformer_jax.serving import schemas
from matformer_jax.serving.generation import Finish, Generation, Piece
from matformer_jax.serving.refusals import Refusal
from matformer_jax.serving.service import Service

_SLOW_READER = 5.0  # seconds after the time limit, after which a client that does not read is left
GONE = 499  # nobody was left to answer


class Reply:
  """The answer to one request, in OpenAI's shapes.

  Args:
    chat: of /v1/chat/completions; else of /v1/completions.
    prompt_tokens: in all prompts.
    echo: what each continuation begins with.
  """

  def __init__(
    self,
    service: Service,
    generation: Generation,
    chat: bool,
    prompt_tokens: int,
    echo: Sequence[str] = (),
  ):
    self._service, self.generation, self._chat = service, generation, chat
    self._prompt_tokens = prompt_tokens
    self._echo = list(echo) or [""] * len(generation.jobs)
    self._begun: set[int] = set()
    self._started = time.perf_counter()
    self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"

  def headers(self, index: int) -> dict[str, str]:
    """Of the response; `index` names a continuation whose size is known."""
    return {"x-request-id": self.id, "x-matformer-granularity": self._size(index).granularity}

  async def whole(self) -> schemas.Completion | schemas.ChatCompletion:
    """The answer when it is complete."""
    texts, finish = list(self._echo), {}
    async for piece in self.generation.pieces():
      texts[piece.index] += piece.text
      finish[piece.index] = piece.finish
    self._measure()
    if not self._chat:
      choices = [self._choice(Piece(i, text, finish[i])) for i, text in enumerate(texts)]
      return schemas.Completion(choices=choices, usage=self._usage(), **self._top(0))
    choices = [
      schemas.ChatChoice(
        index=i,
        message=schemas.AnsweredMessage(content=text),
        finish_reason=finish[i],
        matformer=self._size(i),
      )
      for i, text in enumerate(texts)
    ]
    return schemas.ChatCompletion(choices=choices, usage=self._usage(), **self._top(0))

  async def events(
    self, first: Piece, rest: AsyncIterator[Piece], options: schemas.StreamOptions
  ) -> AsyncIterator[str]:
    """The answer as server-sent events, as it comes."""
    try:
      for chunk in self._chunks(first, options.continuous_usage_stats):
        yield _event(chunk)
      async for piece in rest:
        for chunk in self._chunks(piece, options.continuous_usage_stats):
          yield _event(chunk)
    except Refusal as e:
      yield _event(schemas.Error(**e.body()))
      return
    self._measure()
    if options.include_usage:
      kind = schemas.ChatChunk if self._chat else schemas.Completion
      yield _event(kind(choices=[], usage=self._usage(), **self._top(first.index)))
    yield "data: [DONE]\n\n"

  def _chunks(
    self, piece: Piece, with_usage: bool
  ) -> Iterator[schemas.Completion | schemas.ChatChunk]:
    usage = self._usage() if with_usage else None
    index, begins = piece.index, piece.index not in self._begun
    self._begun.add(index)
    if not self._chat:
      piece = dataclasses.replace(piece, text=self._echo[index] * begins + piece.text)
      if piece.text or piece.finish:
        yield schemas.Completion(choices=[self._choice(piece)], usage=usage, **self._top(index))
      return
    deltas: list[tuple[schemas.Delta, Finish | None]] = []
    if begins:
      deltas.append((schemas.Delta(role="assistant", content=""), None))
    if piece.text:
      deltas.append((schemas.Delta(content=piece.text), None))
    if piece.finish:
      deltas.append((schemas.Delta(), piece.finish))
    for delta, finish in deltas:
      choice = schemas.ChunkChoice(
        index=index, delta=delta, finish_reason=finish, matformer=self._size(index)
      )
      yield schemas.ChatChunk(choices=[choice], usage=usage, **self._top(index))

  def _choice(self, piece: Piece) -> schemas.CompletionChoice:
    return schemas.CompletionChoice(
      index=piece.index,
      text=piece.text,
      finish_reason=piece.finish,
      matformer=self._size(piece.index),
    )

  def _size(self, index: int) -> schemas.Size:
    granularity = self.generation.jobs[index].granularity
    assert granularity is not None  # set before the first news
    return self._service.size(granularity)

  def _top(self, index: int) -> dict[str, Any]:
    """What a response says of itself; its size is the one of a continuation."""
    size = self._size(index)
    return {
      "id": self.id,
      "created": int(time.time()),
      "model": f"{self._service.settings.name}:{size.granularity}",
      "matformer": size,
    }

  def _usage(self) -> schemas.Usage:
    new = self.generation.tokens
    return schemas.Usage(
      prompt_tokens=self._prompt_tokens,
      completion_tokens=new,
      total_tokens=self._prompt_tokens + new,
    )

  def _measure(self) -> None:
    metrics, now = self._service.metrics, time.perf_counter()
    metrics.seconds.observe(now - self._started)
    metrics.first_token_seconds.observe((self.generation.first_at or now) - self._started)


class _EventStream(StreamingResponse):
  """A stream that frees its slots however it ends."""

  media_type = "text/event-stream"

  def __init__(self, events, reply: Reply, index: int, seconds: float):
    super().__init__(events, headers={"cache-control": "no-store", **reply.headers(index)})
    self._generation, self._seconds = reply.generation, seconds

  async def __call__(self, scope, receive, send) -> None:
    try:
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(self._seconds):
          await super().__call__(scope, receive, send)
    finally:
      self._generation.cancel()


async def answer(service: Service, http: Request, body: Any, reply: Reply) -> Response:
  """Waits for the answer, or for the first of it; gives up when the client does."""
  generation = reply.generation
  pieces = generation.pieces()
  streaming = False
  try:
    if not body.stream:
      whole = await _unless_gone(http, reply.whole())
      if whole is None:
        return Response(status_code=GONE)
      return JSONResponse(whole.model_dump(mode="json"), headers=reply.headers(0))
    first = await _unless_gone(http, anext(pieces))
    if first is None:
      return Response(status_code=GONE)
    events = reply.events(first, pieces, body.stream_options or schemas.StreamOptions())
    streaming = True
    return _EventStream(events, reply, first.index, service.settings.timeout + _SLOW_READER)
  finally:
    if not streaming:
      generation.cancel()


async def _unless_gone(http: Request, work) -> Any:
  """What `work` gives; None if the client leaves before."""

  async def gone():
    while (await http.receive())["type"] != "http.disconnect":
      pass

  tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return tasks[0].result() if tasks[0].done() else None
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.wait(tasks)


def _event(content) -> str:
  return f"data: {content.model_dump_json()}\n\n"
