"""What the API takes and answers: OpenAI's completions and chat, and what is added to them.

A parameter that changes the answer and is not implemented is declared with the one value that
changes nothing, so that it is refused rather than ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (  # pyright: ignore[reportMissingImports]
  AfterValidator,
  BaseModel,
  ConfigDict,
  Field,
  StrictInt,
)

from matformer_jax.serving.generation import Finish

MOST_CHOICES = 128  # of a request: prompts times n
MOST_STOPS = 16


def _whole(text: str) -> str:
  if not text.isascii():
    try:
      text.encode()
    except UnicodeEncodeError:
      raise ValueError("half of a surrogate pair is no text") from None
  return text


_Text = Annotated[str, AfterValidator(_whole)]
_TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
_Ids = Annotated[list[_TokenId], Field(min_length=1)]
_Stop = Annotated[_Text, Field(min_length=1, max_length=256)]
_Zero = Annotated[float, Field(ge=0, le=0)]
_NoItems = Annotated[list[Any], Field(max_length=0)]
_NoKeys = Annotated[dict[str, Any], Field(max_length=0)]


class _Schema(BaseModel):
  model_config = ConfigDict(extra="forbid", protected_namespaces=())


class _Lenient(BaseModel):
  """A part of a conversation: clients send back what they were answered, with all its fields."""

  model_config = ConfigDict(extra="ignore")


# ------------------------------------------------------------------- requests


class StreamOptions(_Schema):
  include_usage: bool = False
  continuous_usage_stats: bool = Field(default=False, description="Usage so far, in every chunk.")
  include_obfuscation: Literal[False] | None = None


class _Request(_Schema):
  """What completions and chat share."""

  model: _Text = Field(
    max_length=1000,
    description="`name` (the load policy chooses), `name:M`, `name:M*2+L*2`, or a budget: "
    "`name:0.6x` of the parameters, `name:15ms` a token.",
  )
  max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
  temperature: float | None = Field(default=None, ge=0, le=2, description="Default 1; 0 is greedy.")
  top_p: float | None = Field(default=None, gt=0, le=1)
  top_k: int | None = Field(default=None, ge=0, lt=2**31, description="0 keeps all. Not OpenAI's.")
  n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
  seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="Taken modulo 2^32.")
  stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: str | None = None
  # Refused, but for the value that does nothing.
  presence_penalty: _Zero | None = None
  frequency_penalty: _Zero | None = None
  logit_bias: _NoKeys | None = None


class CompletionRequest(_Request):
  prompt: (
    _Text
    | Annotated[list[_Text], Field(min_length=1, max_length=MOST_CHOICES)]
    | _Ids
    | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_CHOICES)]
  )
  echo: bool | None = Field(default=None, description="The text begins with the prompt.")
  best_of: Literal[1] | None = None
  logprobs: None = None
  suffix: Annotated[str, Field(max_length=0)] | None = None

  def prompts(self) -> list[Any]:
    """Each prompt: a text or token ids."""
    one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
    return [self.prompt] if one else list(self.prompt)


class TextPart(_Lenient):
  type: Literal["text"]
  text: _Text


class Message(_Lenient):
  role: Literal["system", "developer", "user", "assistant"]
  content: _Text | list[TextPart]
  name: _Text | None = None
  tool_calls: _NoItems | None = None
  function_call: None = None

  def plain(self) -> dict[str, str]:
    """As a chat template takes it."""
    content = self.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    role = "system" if self.role == "developer" else self.role
    return {"role": role, "content": text, **({"name": self.name} if self.name else {})}


class ResponseFormat(_Schema):
  type: Literal["text"]


class ChatRequest(_Request):
  messages: list[Message] = Field(min_length=1)
  max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
  logprobs: Literal[False] | None = None
  top_logprobs: Literal[0] | None = None
  tools: _NoItems | None = None
  tool_choice: Literal["none", "auto"] | None = None
  parallel_tool_calls: bool | None = None
  functions: _NoItems | None = None
  function_call: Literal["none", "auto"] | None = None
  response_format: ResponseFormat | None = None
  modalities: list[Literal["text"]] | None = None
  store: Literal[False] | None = None
  metadata: dict[str, str] | None = None
  service_tier: Literal["auto", "default"] | None = None


# Fields that are declared only to be refused, but for what does nothing.
UNSUPPORTED = frozenset(
  "presence_penalty frequency_penalty logit_bias best_of logprobs suffix top_logprobs tools "
  "tool_choice functions function_call response_format modalities store service_tier".split()
)


# ------------------------------------------------------------------ responses


class Size(_Schema):
  """Who answered.

  Attributes:
    granularity: canonical text, e.g. `M*2+L*2`.
    parameters: of that submodel.
  """

  granularity: str
  parameters: int


class Usage(_Schema):
  prompt_tokens: int
  completion_tokens: int
  total_tokens: int


class CompletionChoice(_Schema):
  index: int
  text: str
  finish_reason: Finish | None
  logprobs: None = None
  matformer: Size


class Completion(_Schema):
  """Also a chunk of a stream."""

  id: str
  object: Literal["text_completion"] = "text_completion"
  created: int
  model: str
  choices: list[CompletionChoice]
  usage: Usage | None = None
  matformer: Size


class AnsweredMessage(_Schema):
  role: Literal["assistant"] = "assistant"
  content: str
  refusal: None = None


class ChatChoice(_Schema):
  index: int
  message: AnsweredMessage
  finish_reason: Finish
  logprobs: None = None
  matformer: Size


class ChatCompletion(_Schema):
  id: str
  object: Literal["chat.completion"] = "chat.completion"
  created: int
  model: str
  choices: list[ChatChoice]
  usage: Usage
  matformer: Size


class Delta(_Schema):
  role: Literal["assistant"] | None = None
  content: str | None = None


class ChunkChoice(_Schema):
  index: int
  delta: Delta
  finish_reason: Finish | None
  logprobs: None = None
  matformer: Size


class ChatChunk(_Schema):
  id: str
  object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
  created: int
  model: str
  choices: list[ChunkChoice]
  usage: Usage | None = None
  matformer: Size


class ModelRecord(_Schema):
  id: str
  object: Literal["model"] = "model"
  created: int
  owned_by: str = "matformer_jax"
  matformer: Size | None = Field(default=None, description="None where the load policy chooses.")


class ModelList(_Schema):
  object: Literal["list"] = "list"
  data: list[ModelRecord]


class Health(_Schema):
  status: Literal["ok"]
  model: str
  max_length: int = Field(description="Tokens of a prompt and its continuation, at most.")
  slots: int
  active: int
  waiting: int


class ErrorDetail(_Schema):
  message: str
  type: str
  param: str | None
  code: str | None


class Error(_Schema):
  error: ErrorDetail
