"""From a request's fields to continuations under way: names, prompts, limits."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import secrets
import time
from typing import Any

from matformer_jax import granularity as gran
from matformer_jax import loading, runtime
from matformer_jax.decoding.decode import Sampling
from matformer_jax.errors import SEED_LIMIT, UserError
from matformer_jax.evals import latency
from matformer_jax.serving import chat, names, refusals, schemas
from matformer_jax.serving.engine import Engine, Overloaded, Request
from matformer_jax.serving.generation import Generation
from matformer_jax.serving.metrics import Metrics
from matformer_jax.serving.refusals import Refusal

_TOO_LONG = "context_length_exceeded"


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
    try:
      self.chat_template = chat.open_template(model.tokenizer)
    except UserError as e:
      runtime.warn(f"{e}; only /v1/completions answers")
      self.chat_template = None
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

  def prompts(self, given: Sequence[Any]) -> list[tuple[int, ...]]:
    """The ids of a completion's prompts. Raises Refusal for what does not fit."""
    tokenizer = self.model.tokenizer
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
    most = min(schemas.MOST_CHOICES, self.engine.room)
    if choices > most:
      raise Refusal(
        400,
        f"{choices} texts are asked for (prompts times n); at most {most}",
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
