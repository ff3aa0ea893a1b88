"""uvicorn, with an end that finishes what is running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import signal
import socket
import threading

import uvicorn  # pyright: ignore[reportMissingImports]

from matformer_jax import runtime
from matformer_jax.errors import UserError
from matformer_jax.serving.service import Service

_CLOSING_SECONDS = 5  # in which responses that are complete are to reach their clients
_IDLE_SECONDS = 60  # of a connection: a request that meets its end is lost, so it comes seldom


class Server(uvicorn.Server):
  """Serves until SIGTERM or SIGINT.

  Then new requests are refused, those that are running are finished, for `grace` seconds at most,
  and the rest is cancelled. A second signal cancels at once.

  Args:
    app: of `api.make_app`.
    grace: seconds.
    ready: called when requests are taken.
    connections: at most; more are answered with 503.
  """

  def __init__(self, app, grace: float, ready: Callable[[], None], connections: int):
    config = uvicorn.Config(
      app,
      log_level="warning",
      access_log=False,
      lifespan="off",
      ws="none",
      server_header=False,
      limit_concurrency=connections,
      timeout_keep_alive=_IDLE_SECONDS,
      timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    super().__init__(config)
    self._service: Service = app.state.service
    self._grace, self._ready = grace, ready
    self._draining: asyncio.Task | None = None

  async def startup(self, sockets=None) -> None:
    await super().startup(sockets)
    self._ready()

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    # uvicorn's own raises the signal again at the end, so that the process would die of it.
    if threading.current_thread() is not threading.main_thread():
      yield  # only that one can listen to signals
      return
    loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
    for number in signals:
      loop.add_signal_handler(number, self.stop)
    try:
      yield
    finally:
      for number in signals:
        loop.remove_signal_handler(number)

  def stop(self) -> None:
    """What a signal does."""
    if self._draining is None:
      self._service.stopping = True
      if self._service.in_flight:
        runtime.say(
          f"stopping; requests in flight: {self._service.in_flight}. They have {self._grace:g} s "
          "to finish; a second signal cancels them"
        )
      self._draining = asyncio.get_running_loop().create_task(self._drain())
    else:
      self.should_exit = self.force_exit = True

  async def _drain(self) -> None:
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(self._grace):
        while self._service.in_flight:
          await asyncio.sleep(0.02)
    self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens.

  Args:
    port: 0 takes a free one.

  Raises:
    UserError: if the address cannot be had.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=2048)
  except (OSError, OverflowError) as e:
    raise UserError(
      f"cannot listen on --host={host} --port={port} ({e}); give another port, or --port=0 for a "
      "free one"
    ) from e


def url(listening: socket.socket) -> str:
  """Of a socket of `listen`."""
  host, port = listening.getsockname()[:2]
  return f"http://{f'[{host}]' if ':' in host else host}:{port}"
