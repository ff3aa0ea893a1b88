"""Our models as a model of lm-eval, by the name `matformer`.

import matformer_jax.harness.model  # registers it
lm_eval.simple_evaluate(
  model="matformer", model_args="workdir=runs/mine,granularity=M*2+L*2", tasks=["piqa"]
)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import tqdm

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution
from matformer_jax.decoding.decode import Decoder, Sampling
from matformer_jax.errors import SEED_LIMIT, UserError, import_extra
from matformer_jax.evals.likelihood import Request, Scorer
from matformer_jax.loading import LanguageModel, load

_NEEDED_BY = "evaluating on public tasks"
_api = import_extra("lm_eval.api.model", _NEEDED_BY, "eval")
_registry = import_extra("lm_eval.api.registry", _NEEDED_BY, "eval")
_utils = import_extra("lm_eval.utils", _NEEDED_BY, "eval")
_TemplateLM: Any = _api.TemplateLM

MAX_NEW_TOKENS = 256  # where a task does not say
STEPS = 16  # tokens between looks for what ends a text
_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclasses.dataclass(frozen=True)
class Generation:
  """How a request wants its text generated.

  Attributes:
    sampling: how tokens are chosen.
    until: what ends a text, and is not part of it.
    max_tokens: at most.
  """

  sampling: Sampling
  until: tuple[str, ...]
  max_tokens: int

  @classmethod
  def parse(cls, kwargs: Mapping[str, Any]) -> Generation:
    """Of a task's `generation_kwargs`; temperature 0 unless it samples.

    Raises:
      UserError: for what is not known.
    """
    rest = dict(kwargs)
    until = rest.pop("until", None) or []
    until = tuple([until] if isinstance(until, str) else until)
    lengths = [rest.pop(key) for key in _LENGTH_KEYS if key in rest]
    temperature = float(rest.pop("temperature", None) or 0.0)
    if rest.pop("do_sample", temperature > 0):
      temperature = temperature or 1.0
    else:
      temperature = 0.0
    sampling = Sampling(temperature, int(rest.pop("top_k", 0)), float(rest.pop("top_p", 1.0)))
    if rest:
      raise UserError(
        f"generation_kwargs {rest} are not known; of until, do_sample, temperature, top_k, top_p "
        f"and {_LENGTH_KEYS[0]} a task may say"
      )
    return cls(sampling, tuple(filter(None, until)), int(lengths[0] if lengths else MAX_NEW_TOKENS))


@_registry.register_model("matformer")
class MatFormerLM(_TemplateLM):
  """A model at one granularity.

  Args:
    workdir: of a training run or an imported or extracted model.
    granularity: a size or mix; None: everything stored.
    step: checkpoint; None: the newest that verifies.
    model: instead of `workdir`, one that is loaded.
    dtype: to compute in, float32 or bfloat16.
    data, fsdp, tensor: the mesh, as in training, on as many devices; data=-1 takes all.
    max_length: tokens of context; 0: as many as the model was trained on.
    batch_size: texts generated together, per batch shard; 0: as suits the platform.
    batch_tokens: tokens scored together, per batch shard; 0: as suits the platform.
    share: run once what requests have in common.
    prefix_token_id: what comes before a text that is scored from its first token; None: what
      texts begin with, or end of text. (The harness's `hf` takes a `bos_token` that the tokenizer
      names, even where texts do not begin with it.)
    seed: request i samples with seed + i.
    quiet: no progress bars.

  Raises:
    UserError: for arguments that do not fit the model or the machine.
  """

  def __init__(
    self,
    workdir: str | None = None,
    granularity: str | None = None,
    step: int | None = None,
    model: LanguageModel | None = None,
    dtype: str = "float32",
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    max_length: int = 0,
    batch_size: int | str = 0,
    batch_tokens: int = 0,
    share: bool = True,
    prefix_token_id: int | None = None,
    seed: int = 0,
    quiet: bool = False,
    device: str | None = None,
    max_batch_size: int | None = None,
  ):
    super().__init__()
    if device is not None:
      raise UserError(f"device={device!r}: JAX chooses it; set JAX_PLATFORMS=cpu, cuda or tpu")
    if model is None:
      if not workdir:
        raise UserError("model_args needs workdir=..., the directory of a model")
      model = load(workdir, step, LanguageModel)
    self.model, self._quiet, self._seed = model, quiet, seed
    self.granularity = gran.full(model.config)
    if granularity is not None:
      self.granularity = gran.parse(granularity, model.config)
    execution, params = _place(model, dtype, {"data": data, "fsdp": fsdp, "tensor": tensor})
    self.scorer = Scorer(
      params, model.config, execution, self.granularity, int(batch_tokens), bool(share)
    )
    rows = 0 if batch_size in ("auto", None) else int(batch_size)
    rows = rows or (8 if execution.flat_weights else 32)
    self._rows = rows * sharding.batch_shards(execution.mesh)
    self._max_length = int(max_length)
    self._prefix = prefix_token_id
    self._encode = functools.lru_cache(maxsize=4096)(lambda text: tuple(self._begin(text)))

  # ---------------------------------------------------------------- tokens

  @property
  def max_length(self) -> int:
    return self._max_length or self.model.config.seq_len

  @property
  def eot_token_id(self) -> int:
    return self.model.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    if self._prefix is not None:
      return self._prefix
    tokenizer = self.model.tokenizer
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

  @property
  def tokenizer_name(self) -> str:
    return self.model.tokenizer.sha256

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """Ids of a text, from its beginning unless special tokens are refused."""
    if add_special_tokens is False:
      return self.model.tokenizer.encode(string)
    return list(self._encode(string))

  def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    return self.model.tokenizer.decode(tokens)

  def _begin(self, text: str) -> list[int]:
    return self.model.tokenizer.begin(text)

  # --------------------------------------------------------------- scoring

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
    """[(log-likelihood, greedy)] of [(strings, context ids, continuation ids)].

    A context too long for the model loses its beginning.

    Raises:
      UserError: for a continuation that is too long by itself.
    """
    chosen = []
    for _, context, continuation in requests:
      if len(continuation) > self.max_length:
        raise UserError(
          f"a continuation of {len(continuation)} tokens is longer than max_length="
          f"{self.max_length}; give a larger max_length, or leave the task out"
        )
      context = context or [self.prefix_token_id]
      tokens = [*context, *continuation][-(self.max_length + 1) :]
      chosen.append(Request(tokens, len(continuation)))
    total = sum(len(r.tokens) for r in chosen)
    hidden = disable_tqdm or self._quiet
    with tqdm.tqdm(total=total, desc="scoring", unit="token", disable=hidden) as bar:
      scores = self.scorer.score(chosen, bar.update)
    answers = [(s.log_likelihood, s.greedy) for s in scores]
    for (strings, _, _), answer in zip(requests, answers):
      if strings is not None:
        self.cache_hook.add_partial("loglikelihood", strings, answer)
    return answers

  def loglikelihood(self, requests, disable_tqdm: bool = False):
    """See lm_eval.api.model.LM."""
    return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._quiet)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """See lm_eval.api.model.LM: whole texts, in windows of `max_length`."""
    windows, owners = [], []
    for i, request in enumerate(requests):
      ids = self.tok_encode(request.args[0])
      for window in _utils.get_rolling_token_windows(
        token_list=ids,
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      ):
        windows.append((None, *_utils.make_disjoint_window(window)))
        owners.append(i)
    totals = np.zeros(len(requests))
    scores = self._loglikelihood_tokens(windows, disable_tqdm)
    np.add.at(totals, np.array(owners, int), [log_p for log_p, _ in scores])
    for request, total in zip(requests, totals.tolist()):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals.tolist()

  # ------------------------------------------------------------ generation

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """See lm_eval.api.model.LM. Texts depend on seed and request, not on the batch."""
    texts = [""] * len(requests)
    alike: dict[Generation, list[int]] = {}
    for i, request in enumerate(requests):
      alike.setdefault(Generation.parse(request.args[1]), []).append(i)
    hidden = disable_tqdm or self._quiet
    with tqdm.tqdm(total=len(requests), desc="generating", unit="text", disable=hidden) as bar:
      for how, members in alike.items():
        most = min(how.max_tokens, self.max_length // 2)  # the rest is for the prompt
        prompts = {
          i: self.model.tokenizer.prompt(requests[i].args[0])[-(self.max_length - most) :]
          for i in members
        }
        members = sorted(members, key=lambda i: -len(prompts[i]))
        for start in range(0, len(members), self._rows):
          batch = members[start : start + self._rows]
          for i, text in zip(batch, self._generate([prompts[i] for i in batch], batch, how, most)):
            texts[i] = text
            self.cache_hook.add_partial("generate_until", requests[i].args, text)
          bar.update(len(batch))
    return texts

  def _generate(self, prompts, numbers: list[int], how: Generation, most: int) -> list[str]:
    """Continuations of up to `self._rows` prompts, cut at what ends them."""
    decoder = self._decoder(how.sampling)
    fill = self._rows - len(prompts)
    seeds = [(self._seed + i) % SEED_LIMIT for i in numbers] + [0] * fill
    state = decoder.prefill(
      self.scorer.weights, [*prompts, *([[self.eot_token_id]] * fill)], most, seeds
    )
    ended = np.arange(self._rows) >= len(prompts)
    texts = [""] * len(prompts)
    while not ended.all():
      done = jax.device_put(ended | np.asarray(state.done), state.done.sharding)
      state = decoder.advance(self.scorer.weights, dataclasses.replace(state, done=done), STEPS)
      ended = ended | np.asarray(state.done)
      for i, (prompt, ids) in enumerate(zip(prompts, state.sequences())):
        whole = self.model.tokenizer.continuation(prompt, ids[len(prompt) :])
        cuts = [at for at in map(whole.find, how.until) if at >= 0]
        texts[i] = whole[: min(cuts)] if cuts else whole
        ended[i] |= bool(cuts)
    return texts

  def _decoder(self, sampling: Sampling) -> Decoder:
    return dataclasses.replace(self.scorer.decoder, sampling=sampling, eos_id=self.eot_token_id)

  def get_model_info(self) -> dict[str, Any]:
    """What the harness writes beside its results."""
    model = self.model
    return {
      "model_workdir": str(model.workdir),
      "model_step": model.step,
      "model_granularity": gran.to_text(self.granularity, model.config),
      "model_num_parameters": gran.count(model.config, self.granularity).params,
    }


def _place(model: LanguageModel, dtype: str, shape: dict[str, int]) -> tuple[Execution, Any]:
  """How the model is run, and its parameters where that needs them."""
  devices = jax.devices()
  sizes = list(shape.values())
  if min(sizes) > 0:
    devices = devices[: int(np.prod(sizes))]
  mesh = sharding.make_mesh(shape, devices)
  device = devices[0]
  execution = Execution.for_platform(
    device.platform, mesh, dtype=dtype, remat="none", device_kind=device.device_kind
  )
  if execution.mesh is None:
    return execution, model.params
  sharding.check_model_fits_mesh(model.config, mesh)
  return execution, jax.device_put(model.params, sharding.param_shardings(model.params, mesh))
