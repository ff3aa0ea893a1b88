"""New tokens to text, piece by piece: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from matformer_jax.data.tokenizer import Tokenizer

_CUT = "\ufffd"  # what bytes that are no whole character decode to


class TextStream:
  """The text that continues a prompt.

  What `push` and `close` return joins to `tokenizer.continuation(prompt, all new ids)`, or to that
  up to the first stop string. The first is the one that is complete first, and of several that
  are complete with the same character the longest, so that the text does not depend on how many
  tokens come at a time.

  Args:
    prompt: ids, at least one.
    stop: texts that end the continuation and are not part of it.

  Attributes:
    stopped: a stop string has been seen; nothing follows.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
    self._tokenizer = tokenizer
    self._stop = tuple(stop)
    # ids[start:read] gives the new ids their context: a tokenizer may drop a text's first space.
    # Only these are decoded again, not the whole text.
    self._ids, self._start, self._read = list(prompt), 0, len(prompt)
    self._held = ""  # the end of the text, which may begin a stop string
    self.stopped = False

  def push(self, new: Sequence[int]) -> str:
    """The text that can be shown after `new` ids."""
    self._ids += new
    text = self._new_text()
    if not text or text.endswith(_CUT):  # a character may be cut in the middle of its bytes
      return ""
    self._start, self._read = self._read, len(self._ids)
    return self._up_to_stop(text)

  def close(self) -> str:
    """The rest, when no ids follow."""
    text, self._read = self._new_text(), len(self._ids)
    text, self._held = self._up_to_stop(text) + self._held, ""
    return text

  def _new_text(self) -> str:
    known = self._tokenizer.decode(self._ids[self._start : self._read])
    return self._tokenizer.decode(self._ids[self._start :])[len(known) :]

  def _up_to_stop(self, text: str) -> str:
    if self.stopped:
      return ""
    text, self._held = self._held + text, ""
    found = [(text.find(s) + len(s), text.find(s)) for s in self._stop if s in text]
    if found:
      self.stopped = True
      return text[: min(found)[1]]
    held = max((_overlap(text, s) for s in self._stop), default=0)
    text, self._held = text[: len(text) - held], text[len(text) - held :]
    return text


def _overlap(text: str, stop: str) -> int:
  """The most characters at the end of `text` with which `stop` begins."""
  most = min(len(text), len(stop) - 1)
  return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)
