"""Conversations as token ids, through a tokenizer's chat template.

Templates are Jinja as transformers' `apply_chat_template` runs them: in a sandbox, with
`raise_exception`, `strftime_now`, `tojson`, loop controls and the `generation` tag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import datetime
import json
import re
from typing import Any

from matformer_jax.data.tokenizer import Tokenizer
from matformer_jax.errors import UserError, import_extra

_MARK = "\ufdd0"  # a noncharacter of Unicode: before what spells a special token and is none


class ChatTemplate:
  """A compiled chat template.

  Args:
    source: Jinja.
    tokenizer: gives the special tokens, and makes ids of the text.

  Raises:
    UserError: if the template does not compile.
  """

  def __init__(self, source: str, tokenizer: Tokenizer):
    self._jinja = import_extra("jinja2", "the chat template", "serve")
    self._tokenizer = tokenizer
    try:
      self._template = _environment(self._jinja).from_string(source)
    except self._jinja.TemplateError as e:
      raise UserError(f"the chat template of the tokenizer does not compile: {e}") from e
    named = ((key, _content(value)) for key, value in tokenizer.config.items())
    special = sorted(filter(None, tokenizer.special_tokens), key=len, reverse=True)
    any_special = "|".join(map(re.escape, special)) or "(?!)"
    self._special = re.compile(f"(?<!{_MARK})(?:{any_special})")
    self._start_of_special = re.compile(f"(?={any_special})")
    self._tokens = {key: text for key, text in named if key.endswith("_token") and text}

  def render(self, messages: Sequence[Mapping[str, str]]) -> str:
    """The conversation as text, up to where the assistant's next message begins.

    Raises:
      UserError: what the template says of a conversation that it does not take.
    """
    try:
      return self._template.render(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._tokens
      )
    except (self._jinja.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as e:
      raise UserError(f"the model's chat template does not take these messages: {e}") from e

  def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation.

    The template's special tokens are special; one that is spelled out in a message is encoded as
    the characters it is written with, so that no message can end itself and begin another.

    Args:
      messages: each with `role` and `content`.

    Raises:
      UserError: as `render`.
    """
    text = self.render([{k: self._spelled(v) for k, v in m.items()} for m in messages])
    ids, end = [], 0
    for match in self._special.finditer(text):
      ids += self._encode(text[end : match.start()])
      ids.append(self._tokenizer.special_tokens[match[0]])
      end = match.end()
    ids += self._encode(text[end:])
    if not ids:
      raise UserError("the model's chat template makes no text of these messages")
    return ids

  def _spelled(self, text: str) -> str:
    """`text` with a mark before what would be a special token."""
    return self._start_of_special.sub(_MARK, text.replace(_MARK, ""))

  def _encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text.replace(_MARK, "")) if text else []


def open_template(tokenizer: Tokenizer) -> ChatTemplate | None:
  """The chat template kept with a tokenizer; None where there is none.

  Raises:
    UserError: if it does not compile.
  """
  source = tokenizer.chat_template
  return None if source is None else ChatTemplate(source, tokenizer)


def _content(token: Any) -> str | None:
  """A token of tokenizer_config.json: a string, or {"content": string}."""
  token = token.get("content") if isinstance(token, Mapping) else token
  return token if isinstance(token, str) else None


def _environment(jinja: Any) -> Any:
  import_extra("jinja2.sandbox", "the chat template", "serve")
  extension = import_extra("jinja2.ext", "the chat template", "serve")

  class Generation(extension.Extension):
    """{% generation %}, which marks for training what the assistant says, and changes no text."""

    tags = {"generation"}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  environment = jinja.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extension.loopcontrols]
  )

  def raise_exception(message: str):
    raise jinja.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
      value,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
    )

  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment
