"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping

REQUEST, KEY, LIMIT, SERVER = (
  "invalid_request_error",
  "authentication_error",
  "rate_limit_error",
  "server_error",
)


class Refusal(Exception):
  """An answer that is an error.

  Args:
    status: of HTTP.
    message: what is wrong and how to put it right.
    code: a word for programs.
    param: the field of the request that it is about.
    headers: of the response.
  """

  def __init__(
    self,
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.code, self.param = status, message, code, param
    self.headers = dict(headers or {})

  def body(self) -> dict:
    """The response's JSON."""
    kinds = {401: KEY, 429: LIMIT}
    kind = kinds.get(self.status, SERVER if self.status >= 500 else REQUEST)
    error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
    return {"error": {key: value and _encodable(value) for key, value in error.items()}}


def _encodable(text: str) -> str:
  """`text` as it can be sent: a message may quote halves of surrogate pairs."""
  return text.encode("utf-8", "backslashreplace").decode()


def too_many() -> Refusal:
  """The queue is full."""
  return Refusal(
    429,
    "the queue is full; try again in a second",
    code="rate_limit_exceeded",
    headers={"retry-after": "1"},
  )


def stopping() -> Refusal:
  """The server is about to end."""
  return Refusal(
    503,
    "the server is shutting down and takes no new requests",
    code="shutting_down",
    headers={"retry-after": "5"},
  )


def timed_out(seconds: float) -> Refusal:
  """The whole answer was not there in time."""
  return Refusal(
    504,
    f"the answer took longer than {seconds:g} s; ask for fewer tokens or a smaller size",
    code="timeout",
    headers={"x-should-retry": "false"},  # OpenAI's client would try twice more
  )
