"""The HTTP API: OpenAI's completions, chat and models, metrics, health and a page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
import contextlib
import dataclasses
import importlib.resources
import secrets
import time
from typing import Any
import uuid

import fastapi  # pyright: ignore[reportMissingImports]
from fastapi.concurrency import run_in_threadpool  # pyright: ignore[reportMissingImports]
from fastapi.exceptions import RequestValidationError  # pyright: ignore[reportMissingImports]
from fastapi.responses import (  # pyright: ignore[reportMissingImports]
  HTMLResponse,
  JSONResponse,
  Response,
  StreamingResponse,
)
from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]

import matformer_jax
from matformer_jax import granularity as gran
from matformer_jax import loading
from matformer_jax.decoding.decode import Sampling
from matformer_jax.errors import SEED_LIMIT, UserError
from matformer_jax.evals import latency
from matformer_jax.serving import chat, names, refusals, schemas
from matformer_jax.serving.engine import Engine, Overloaded, Request
from matformer_jax.serving.gate import Gate
from matformer_jax.serving.generation import Generation, Piece
from matformer_jax.serving.metrics import CONTENT_TYPE, Metrics
from matformer_jax.serving.refusals import Refusal

DEFAULT_TOKENS = 16  # of a completion, as OpenAI's
_TOO_LONG = "context_length_exceeded"
_SLOW_READER = 5.0  # seconds after the time limit, after which a client that does not read is left


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the API answers.

  Attributes:
    name: of the model.
    api_key: what clients must send; empty: nothing.
    local_only: the address is a loopback one: without a key, only a local host name is answered.
    max_body: of a request, bytes.
    timeout: of an answer, seconds.
  """

  name: str
  api_key: str = ""
  local_only: bool = True
  max_body: int = 2**20
  timeout: float = 300.0

  def __post_init__(self):
    names.check(self.name)


class Service:
  """What the handlers share.

  Attributes:
    stopping: no new requests are taken.
    in_flight: requests for text that are being answered.
  """

  def __init__(self, engine: Engine, model: loading.LanguageModel, settings: Settings):
    self.engine, self.model, self.settings = engine, model, settings
    self.profile = latency.read(model.workdir, model.config)
    self.chat_template = chat.open_template(model.tokenizer)
    self.sizes = names.sizes(settings.name, model.config)
    trained = [gran.to_text(g, model.config) for g in gran.trained(model.config)]
    self.metrics = Metrics(engine, trained)
    self.created = int(time.time())
    self.stopping, self.in_flight = False, 0
    self.paths: frozenset[str] = frozenset()

  def known_path(self, path: str) -> str:
    """A path as a label of metrics, of which there are few."""
    return path if path in self.paths else "other"

  def granularity(self, model: str) -> gran.Granularity | None:
    """Of a request's `model`. Raises Refusal where there is none such."""
    try:
      return names.resolve(model, self.settings.name, self.model.config, self.profile)
    except UserError as e:
      raise Refusal(
        404,
        f"{e}; choose from {', '.join(self.sizes)}, a mix or a budget such as "
        f"{self.settings.name}:0.6x",
        code="model_not_found",
        param="model",
      ) from None

  def size(self, granularity: gran.Granularity) -> schemas.Size:
    config = self.model.config
    return schemas.Size(
      granularity=gran.to_text(granularity, config),
      parameters=gran.count(config, granularity).params,
    )

  def record(self, name: str) -> schemas.ModelRecord:
    """Of a name that resolves."""
    g = self.granularity(name)
    return schemas.ModelRecord(
      id=name, created=self.created, matformer=None if g is None else self.size(g)
    )

  # ------------------------------------------------------------------ prompts

  def prompts(self, given: str | Sequence[Any]) -> list[tuple[int, ...]]:
    """The ids of a completion's prompts. Raises Refusal for what does not fit."""
    tokenizer = self.model.tokenizer
    if isinstance(given, str) or isinstance(given[0], int):
      given = [given]
    return [
      self.checked(tokenizer.prompt(self.not_long(p)) if isinstance(p, str) else p, "prompt")
      for p in given
    ]

  def conversation(self, messages: Sequence[schemas.Message]) -> tuple[int, ...]:
    """The ids of a chat. Raises Refusal for what does not fit."""
    if self.chat_template is None:
      raise Refusal(
        400,
        f"{self.settings.name} has no chat template; use /v1/completions",
        code="no_chat_template",
        param="messages",
      )
    plain = [m.plain() for m in messages]
    self.not_long("".join(m["content"] for m in plain), "messages")
    try:
      ids = self.chat_template.prompt(plain)
    except UserError as e:
      raise Refusal(400, str(e), param="messages") from None
    return self.checked(ids, "messages")

  def not_long(self, text: str, param: str = "prompt") -> str:
    """`text`, unless even the longest tokens would be too many: before time is spent on it."""
    longest = int(self.model.tokenizer.byte_lengths.max())
    if len(text) > longest * self.engine.max_length:
      raise Refusal(
        400,
        f"the text of {len(text)} characters is longer than the context of "
        f"{self.engine.max_length} tokens",
        code=_TOO_LONG,
        param=param,
      )
    return text

  def checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
    vocab, most = self.model.config.vocab_size, self.engine.max_length
    if max(ids) >= vocab:
      raise Refusal(
        400, f"token ids must be in 0..{vocab - 1}, got {max(ids)}", "invalid_token", param
      )
    if len(ids) >= most:
      raise Refusal(
        400,
        f"the prompt has {len(ids)} tokens; the context has room for {most}, new ones included",
        code=_TOO_LONG,
        param=param,
      )
    return tuple(ids)

  # --------------------------------------------------------------- generation

  def generation(
    self, body: Any, prompts: Sequence[tuple[int, ...]], max_tokens: int | None
  ) -> Generation:
    """Starts to continue prompts, each `n` times. Raises Refusal where that cannot be."""
    granularity = self.granularity(body.model)
    choices = len(prompts) * (body.n or 1)
    if choices > schemas.MOST_CHOICES:
      raise Refusal(
        400,
        f"{choices} texts are asked for (prompts times n); at most {schemas.MOST_CHOICES}",
        param="n",
      )
    temperature = 1.0 if body.temperature is None else body.temperature
    try:
      sampling = Sampling(temperature, body.top_k or 0, body.top_p or 1.0)
    except UserError as e:
      raise Refusal(400, str(e), param="temperature") from None
    seed = secrets.randbelow(SEED_LIMIT) if body.seed is None else body.seed
    requests = []
    for i in range(choices):
      prompt = prompts[i // (body.n or 1)]
      room = self.engine.max_length - len(prompt)
      if max_tokens is not None and max_tokens > room:
        raise Refusal(
          400,
          f"the prompt has {len(prompt)} tokens and {max_tokens} more are asked for; the context "
          f"has room for {self.engine.max_length}",
          code=_TOO_LONG,
          param="max_tokens",
        )
      requests.append(
        Request(prompt, max_tokens or room, granularity, sampling, (seed + i) % SEED_LIMIT)
      )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    try:
      return Generation(self.engine, self.model.tokenizer, requests, stop, self.settings.timeout)
    except Overloaded:
      raise (refusals.stopping() if self.stopping else refusals.too_many()) from None
    except UserError as e:
      raise Refusal(400, str(e)) from None


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
    texts, finish = list(self._echo), [""] * len(self._echo)
    async for piece in self.generation.pieces():
      texts[piece.index] += piece.text
      finish[piece.index] = piece.finish or ""
    self._measure()
    if not self._chat:
      choices = [self._choice(Piece(i, t, f)) for i, (t, f) in enumerate(zip(texts, finish))]
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

  async def events(self, first: Piece, rest: AsyncIterator[Piece], usage: bool):
    """The answer as server-sent events, as it comes."""
    try:
      for chunk in self._chunks(first):
        yield _event(chunk)
      async for piece in rest:
        for chunk in self._chunks(piece):
          yield _event(chunk)
    except Refusal as e:
      yield _event(schemas.Error(**e.body()))
      return
    self._measure()
    if usage:
      kind = schemas.ChatChunk if self._chat else schemas.Completion
      yield _event(kind(choices=[], usage=self._usage(), **self._top(first.index)))
    yield "data: [DONE]\n\n"

  def _chunks(self, piece: Piece):
    index, begins = piece.index, piece.index not in self._begun
    self._begun.add(index)
    if not self._chat:
      piece = dataclasses.replace(piece, text=self._echo[index] * begins + piece.text)
      if piece.text or piece.finish:
        yield schemas.Completion(choices=[self._choice(piece)], **self._top(index))
      return
    deltas = [(schemas.Delta(role="assistant", content=""), None)] if begins else []
    if piece.text:
      deltas.append((schemas.Delta(content=piece.text), None))
    if piece.finish:
      deltas.append((schemas.Delta(), piece.finish))
    for delta, finish in deltas:
      choice = schemas.ChunkChoice(
        index=index, delta=delta, finish_reason=finish, matformer=self._size(index)
      )
      yield schemas.ChatChunk(choices=[choice], **self._top(index))

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


async def _answer(service: Service, http: fastapi.Request, body: Any, reply: Reply) -> Response:
  """Waits for the answer, or for the first of it; gives up when the client does."""
  generation = reply.generation
  pieces = generation.pieces()
  streaming = False
  try:
    if not body.stream:
      whole = await _unless_gone(http, reply.whole())
      if whole is None:
        return Response(status_code=499)
      return JSONResponse(whole.model_dump(mode="json"), headers=reply.headers(0))
    first = await _unless_gone(http, anext(pieces))
    if first is None:
      return Response(status_code=499)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    events = reply.events(first, pieces, usage)
    streaming = True
    return _EventStream(events, reply, first.index, service.settings.timeout + _SLOW_READER)
  finally:
    if not streaming:
      generation.cancel()


async def _unless_gone(http: fastapi.Request, work) -> Any:
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
  return f"data: {content.model_dump_json(exclude_unset=False)}\n\n"


_ERRORS: dict[int | str, dict[str, Any]] = {
  status: {"model": schemas.Error, "description": what}
  for status, what in {
    400: "The request is wrong.",
    401: "The key is wrong or missing.",
    404: "There is no such model or size.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full.",
    500: "The model failed.",
    503: "The server is shutting down.",
    504: "The answer took too long.",
  }.items()
}
_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


def make_app(engine: Engine, model: loading.LanguageModel, settings: Settings) -> fastapi.FastAPI:
  """The ASGI application; `app.state.service` is its `Service`."""
  service = Service(engine, model, settings)
  app = fastapi.FastAPI(
    title="matformer_jax", version=matformer_jax.__version__, docs_url=None, redoc_url=None
  )
  app.state.service = service
  app.add_middleware(Gate, service=service)
  page = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
  refused = lambda *statuses: {status: _ERRORS[status] for status in statuses}

  @app.post(
    "/v1/completions", response_model=schemas.Completion, responses=_ERRORS | {200: _STREAM}
  )
  async def completions(body: schemas.CompletionRequest, http: fastapi.Request) -> Any:
    """Continues texts."""
    service.granularity(body.model)
    prompts = await run_in_threadpool(service.prompts, body.prompt)
    tokens = body.max_tokens
    if tokens is None:
      tokens = min(DEFAULT_TOKENS, *(engine.max_length - len(p) for p in prompts))
    echo = _echo(body, service) if body.echo else []
    generation = service.generation(body, prompts, tokens)
    reply = Reply(service, generation, False, sum(map(len, prompts)), echo)
    return await _answer(service, http, body, reply)

  @app.post(
    "/v1/chat/completions",
    response_model=schemas.ChatCompletion,
    responses=_ERRORS | {200: _STREAM},
  )
  async def chat_completions(body: schemas.ChatRequest, http: fastapi.Request) -> Any:
    """Continues a conversation."""
    service.granularity(body.model)
    prompt = await run_in_threadpool(service.conversation, body.messages)
    tokens = body.max_completion_tokens or body.max_tokens
    generation = service.generation(body, [prompt], tokens)
    return await _answer(service, http, body, Reply(service, generation, True, len(prompt)))

  @app.get("/v1/models", responses=refused(400, 401))
  async def models() -> schemas.ModelList:
    """The sizes; mixes and budgets work too."""
    return schemas.ModelList(data=[service.record(name) for name in service.sizes])

  @app.get("/v1/models/{name:path}", responses=refused(400, 401, 404))
  async def one_model(name: str) -> schemas.ModelRecord:
    """What a name stands for."""
    return service.record(name)

  @app.get("/health", responses=refused(400, 503))
  async def health() -> schemas.Health:
    """Whether requests are taken."""
    if service.stopping:
      raise refusals.stopping()
    stats = engine.stats()
    return schemas.Health(
      status="ok",
      model=settings.name,
      slots=stats.slots,
      active=stats.active,
      waiting=stats.waiting,
    )

  @app.get("/metrics", response_class=Response, responses=refused(400, 401))
  async def metrics() -> Any:
    """For Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)

  @app.get("/", include_in_schema=False)
  async def index() -> Any:
    return HTMLResponse(page, headers=_PAGE_HEADERS)

  @app.exception_handler(Refusal)
  async def refuse(_, e: Refusal) -> Any:
    return JSONResponse(e.body(), e.status, e.headers)

  @app.exception_handler(RequestValidationError)
  async def invalid(_, e: RequestValidationError) -> Any:
    refusal = _invalid(e)
    return JSONResponse(refusal.body(), refusal.status)

  @app.exception_handler(HTTPException)
  async def http_error(_, e: HTTPException) -> Any:
    code = {404: "not_found", 405: "method_not_allowed"}.get(e.status_code)
    return JSONResponse(
      Refusal(e.status_code, str(e.detail), code).body(), e.status_code, e.headers
    )

  @app.exception_handler(Exception)
  async def fault(_, e: Exception) -> Any:
    return JSONResponse(Refusal(500, "the server failed; its log says how").body(), 500)

  service.paths = frozenset(route.path for route in app.routes)
  schema = app.openapi

  def openapi() -> dict[str, Any]:
    """Without FastAPI's own 422: what is wrong with a request is a 400 here."""
    made = schema()
    for operations in made["paths"].values():
      for operation in operations.values():
        operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
      made["components"]["schemas"].pop(name, None)
    return made

  app.openapi = openapi
  return app


_PAGE_HEADERS = {
  "content-security-policy": "default-src 'none'; connect-src 'self'; img-src data:; "
  "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
  "frame-ancestors 'none'",
  "x-content-type-options": "nosniff",
}


def _echo(body: schemas.CompletionRequest, service: Service) -> list[str]:
  """The prompt of each continuation, as text."""
  given: Any = body.prompt
  if isinstance(given, str) or isinstance(given[0], int):
    given = [given]
  decode = service.model.tokenizer.decode
  return [p if isinstance(p, str) else decode(p) for p in given for _ in range(body.n or 1)]


def _invalid(e: RequestValidationError) -> Refusal:
  """The first thing that is wrong with a request, in one line."""
  error = e.errors()[0]
  where = [str(part) for part in error["loc"] if part != "body"]
  param = where[0] if where else None
  if error["type"] == "json_invalid":
    return Refusal(
      400, f"the body is not JSON: {error.get('ctx', {}).get('error', '')}", "bad_json"
    )
  if error["type"] == "extra_forbidden":
    return Refusal(400, f"unknown parameter: {'.'.join(where)}", "unknown_parameter", param)
  if param in schemas.UNSUPPORTED:
    return Refusal(
      400, f"{param} is not supported here; leave it out", "unsupported_parameter", param
    )
  place = f"{'.'.join(where)}: " if where else "the body, which must be a JSON object: "
  return Refusal(400, place + error["msg"], "invalid_value", param)
