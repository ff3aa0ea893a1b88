"""The HTTP API: OpenAI's completions, chat and models, metrics, health and a page."""

from __future__ import annotations

import importlib.resources
from typing import Any

import fastapi  # pyright: ignore[reportMissingImports]
from fastapi.concurrency import run_in_threadpool  # pyright: ignore[reportMissingImports]
from fastapi.exceptions import RequestValidationError  # pyright: ignore[reportMissingImports]
from fastapi.responses import (  # pyright: ignore[reportMissingImports]
  HTMLResponse,
  JSONResponse,
  Response,
)
from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]

import matformer_jax
from matformer_jax import loading
from matformer_jax.serving import refusals, schemas
from matformer_jax.serving.engine import Engine
from matformer_jax.serving.gate import Gate
from matformer_jax.serving.metrics import CONTENT_TYPE
from matformer_jax.serving.refusals import Refusal
from matformer_jax.serving.replies import Reply, answer
from matformer_jax.serving.service import Service, Settings

DEFAULT_TOKENS = 16  # of a completion, as OpenAI's

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
# Of each event, as OpenAPI 3.1 is read where it comes to streams.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM = {"content": {"text/event-stream": {"schema": _EVENT}}}


def make_app(engine: Engine, model: loading.LanguageModel, settings: Settings) -> fastapi.FastAPI:
  """The ASGI application; `app.state.service` is its `Service`."""
  service = Service(engine, model, settings)
  app = fastapi.FastAPI(
    title="matformer_jax", version=matformer_jax.__version__, docs_url=None, redoc_url=None
  )
  app.state.service = service
  app.add_middleware(Gate, service=service)
  page = (
    importlib.resources.files("matformer_jax.serving")
    .joinpath("page.html")
    .read_text(encoding="utf-8")
  )
  refused = lambda *statuses: {status: _ERRORS[status] for status in statuses}

  @app.post(
    "/v1/completions", response_model=schemas.Completion, responses=_ERRORS | {200: _STREAM}
  )
  async def completions(body: schemas.CompletionRequest, http: fastapi.Request) -> Any:
    """Continues texts."""
    service.granularity(body.model)
    prompts = await run_in_threadpool(service.prompts, body.prompts())
    tokens = body.max_tokens
    if tokens is None:
      tokens = min(DEFAULT_TOKENS, *(engine.max_length - len(p) for p in prompts))
    echo = _echo(body, service) if body.echo else []
    generation = service.generation(body, prompts, tokens)
    reply = Reply(service, generation, False, sum(map(len, prompts)), echo)
    return await answer(service, http, body, reply)

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
    return await answer(service, http, body, Reply(service, generation, True, len(prompt)))

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
    if service.stopping or not engine.alive:
      raise refusals.stopping()
    stats = engine.stats()
    return schemas.Health(
      status="ok",
      model=settings.name,
      max_length=engine.max_length,
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

  service.paths = frozenset(getattr(route, "path", "") for route in app.routes)
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
  decode = service.model.tokenizer.decode
  texts = (p if isinstance(p, str) else decode(p) for p in body.prompts())
  return [text for text in texts for _ in range(body.n or 1)]


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
  if not where:
    return Refusal(400, "the body must be a JSON object, sent as application/json", "bad_json")
  return Refusal(400, f"{'.'.join(where)}: {error['msg']}", "invalid_value", param)
