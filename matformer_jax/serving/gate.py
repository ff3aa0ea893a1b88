"""What every request passes before a handler sees it: host, key, shutdown, size of the body."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from typing import Any

from starlette.requests import ClientDisconnect, Request  # pyright: ignore[reportMissingImports]
from starlette.responses import JSONResponse  # pyright: ignore[reportMissingImports]

from matformer_jax.serving.refusals import Refusal, stopping
from matformer_jax.serving.replies import GONE
from matformer_jax.serving.service import Service

BODY_SECONDS = 30  # in which a body is to arrive
_READ_ON = 2**24  # bytes that are read and dropped of a body that is too large
PUBLIC = ("/", "/health", "/openapi.json")  # without a key


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach a host's address."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


class Gate:
  """ASGI middleware.

  Args:
    app: what is behind it.
    service: what it asks for limits and counts for.
  """

  def __init__(self, app: Any, service: Service):
    self._app, self._service = app, service

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    service, path, status = self._service, scope["path"], GONE
    generates = scope["method"] == "POST" and path.startswith("/v1/")

    async def counted(message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    service.in_flight += generates
    try:
      request = Request(scope, receive)
      self._check(request)
      if scope["method"] not in ("GET", "HEAD"):
        receive = _replay(await self._body(request), receive)
      await self._app(scope, receive, counted)
    except Refusal as e:
      response = JSONResponse(e.body(), e.status, e.headers)
      await response(scope, receive, counted)
    except ClientDisconnect:
      pass
    except BaseException:
      status = 500
      raise
    finally:
      service.in_flight -= generates
      service.metrics.responses.labels(service.known_path(path), str(status)).inc()

  def _check(self, request: Request) -> None:
    settings = self._service.settings
    if settings.api_key:
      given = request.headers.get("authorization", "").encode("utf-8", "replace")
      wanted = f"Bearer {settings.api_key}".encode()
      # Not of request.url, into which a client's Host header goes.
      if request.scope["path"] not in PUBLIC and not hmac.compare_digest(given, wanted):
        raise Refusal(
          401,
          "a key is needed: send the header 'Authorization: Bearer KEY'",
          code="invalid_api_key",
          headers={"www-authenticate": "Bearer"},
        )
    elif settings.local_only:
      # A page of another site whose name was made to point here would be let in by a browser.
      host = request.headers.get("host", "localhost").lower()
      name = host if host.endswith("]") else host.rpartition(":")[0] or host
      if not is_loopback(name.strip("[]")):
        raise Refusal(
          400,
          f"the host {name!r} is not localhost or a loopback address; start the server with a key",
        )
    if self._service.stopping and request.method == "POST":
      raise stopping()

  async def _body(self, request: Request) -> bytes:
    most = self._service.settings.max_body
    too_large = Refusal(413, f"the body is larger than {most} bytes", code="request_too_large")
    # A client reads its answer after it has written its body, so some more is read; for one that
    # writes without end the connection is closed, and it may not see why.
    cut_off = Refusal(413, too_large.message, too_large.code, headers={"connection": "close"})
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most + _READ_ON:
      raise cut_off
    body, size = bytearray(), 0
    try:
      async with asyncio.timeout(BODY_SECONDS):
        async for chunk in request.stream():
          size += len(chunk)
          if size <= most:
            body += chunk
          elif size > most + _READ_ON:
            raise cut_off
    except TimeoutError:
      raise Refusal(
        408,
        f"the body did not arrive within {BODY_SECONDS} s",
        code="timeout",
        headers={"connection": "close"},
      ) from None
    if size > most:
      raise too_large
    return bytes(body)


def _replay(body: bytes, receive):
  """A `receive` that gives the body in one message and then what comes after it."""
  read = False

  async def replayed():
    nonlocal read
    if read:
      return await receive()
    read = True
    return {"type": "http.request", "body": body, "more_body": False}

  return replayed
