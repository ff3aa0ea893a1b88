"""The engine's interface, until the engine is here."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from matformer_jax import granularity as gran
from matformer_jax.decoding.decode import Sampling


class Overloaded(Exception):
  """The queue is full, or the engine is shutting down."""


@dataclasses.dataclass(frozen=True)
class Request:
  prompt: tuple[int, ...]
  max_tokens: int
  granularity: gran.Granularity | None = None
  sampling: Sampling = Sampling()
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Update:
  tokens: tuple[int, ...]
  finish: str | None = None


class Job:
  granularity: gran.Granularity | None

  def cancel(self) -> None: ...


class Engine:
  max_length: int

  def __init__(
    self, model, slots: int = 8, max_length: int | None = None, queue_limit: int = 256, policy=True
  ):
    raise NotImplementedError

  def submit(self, request: Request, listener: Callable[[Update], None]) -> Job: ...

  def stats(self) -> Any: ...

  def close(self, timeout: float | None = None) -> None: ...
