"""Loading a trained model in a notebook or a program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import os
import time
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from matformer_jax import granularity as gran
from matformer_jax import models, storage, tables
from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import (
  KINDS,
  Execution,
  MatLMConfig,
  MatViTConfig,
  ModelConfig,
  kind_of,
  model_config,
)
from matformer_jax.config_keys import Config, ModelKeys
from matformer_jax.data.augment import Transform
from matformer_jax.data.tokenizer import Tokenizer, open_tokenizer
from matformer_jax.decoding.decode import Decoder, Sampling
from matformer_jax.decoding.speculative import (
  AUTO_DRAFT_LENGTHS,
  CostMeter,
  SpeculativeDecoder,
  Stats,
)
from matformer_jax.errors import SEED_LIMIT, UserError, check_seed
from matformer_jax.evals import classification
from matformer_jax.models import losses, matlm, slicing
from matformer_jax.tasks import Task, make_task
from matformer_jax.tasks.classification import ImageClassification
from matformer_jax.tasks.language import LanguageModeling

CALL_SECONDS = 0.05  # of generation: a program call makes about as many tokens as take this long


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to continue a text.

  Attributes:
    granularity: who decodes, or verifies; None is everything stored.
    max_tokens: per prompt, at most.
    sampling: temperature (0: greedy), top-k, top-p.
    seed: prompt i uses seed + i, modulo 2^32.
    draft: granularity that drafts (speculative decoding); None decodes plainly.
    draft_lengths: tokens per draft; several are chosen from, by acceptance and time measured
      on the way; None: AUTO_DRAFT_LENGTHS.
    share_cache: the draft works on the verifier's attention cache.
  """

  granularity: gran.GranularityLike | None = None
  max_tokens: int = 64
  sampling: Sampling = Sampling()
  seed: int = 0
  draft: gran.GranularityLike | None = None
  draft_lengths: tuple[int, ...] | None = None
  share_cache: bool = True

  def __post_init__(self):
    check_seed(self.seed, "seed")


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
  """A trained model and everything needed to use it at any granularity.

  Attributes:
    params: the universal parameter tree, float32.
    config: what the model is.
    step: training steps of these weights.
    card: config.json: full training config, data and library versions.
    workdir: where it was loaded from.
    execution: how it runs on this machine.
  """

  params: Any
  config: ModelConfig
  step: int
  card: dict[str, Any]
  workdir: storage.Path
  execution: Execution

  @classmethod
  def read_extras(
    cls, workdir: storage.Path, card: Mapping[str, Any], config: ModelConfig
  ) -> dict[str, Any]:
    """What a kind of model has beside its weights: values of the fields that it adds."""
    return {}

  def _parse(self, granularity: gran.GranularityLike | None) -> gran.Granularity:
    return gran.full(self.config) if granularity is None else gran.parse(granularity, self.config)

  def __repr__(self) -> str:
    c = self.config
    rows = []
    for g in gran.trained(c):
      n = gran.count(c, g)
      rows.append(
        (gran.to_text(g, c), f"{n.params:,}", f"{n.non_embedding_params:,}", tables.si(n.flops))
      )
    sizes = tables.table(("granularity", "parameters", c.blocks_name, f"FLOPs/{c.unit}"), rows)
    text = f"{c.name} from {self.workdir}, step {self.step:,}: {c.summary}\n{sizes}"
    mixes = [g for g in gran.mix_n_match_ladder(c) if g not in gran.trained(c)]
    if mixes:
      example = gran.to_text(mixes[len(mixes) // 2], c)
      text += f"\nplus {len(mixes)} Mix'n'Match models, such as {example!r}"
    return text


M = TypeVar("M", bound=Model)


@dataclasses.dataclass(frozen=True, repr=False)
class VisionModel(Model):
  """A MatViT.

  Attributes:
    transform: from a Pillow image to what the model takes, as in its evaluation.
  """

  config: MatViTConfig
  transform: Transform

  @classmethod
  def read_extras(cls, workdir, card, config):
    assert isinstance(config, MatViTConfig)
    text = card["config"]["data"]["eval_transform"]
    return {"transform": Transform(text, config.image_size, "data.eval_transform")}

  @property
  def class_names(self) -> list[str]:
    """Of the C classes."""
    return self.card["identity"]["classes"]

  def prepare(self, images: Sequence[Image.Image]) -> np.ndarray:
    """uint8 [B, S, S, channels] from Pillow images of any size.

    Raises:
      UserError: for what is no Pillow image.
    """
    for image in images:
      if not isinstance(image, Image.Image):
        raise UserError(
          f"prepare takes Pillow images, got a {type(image).__name__}; make one with "
          "PIL.Image.fromarray, or give logits uint8 arrays of the model's own size"
        )
    mode = "L" if self.config.channels == 1 else "RGB"
    rng = np.random.default_rng(0)  # transforms for evaluation draw nothing
    return np.stack([self.transform(image.convert(mode), rng) for image in images])

  def logits(self, images, granularity: gran.GranularityLike | None = None) -> jax.Array:
    """float32 [B, C].

    Args:
      images: uint8 [B, S, S, channels], or float scaled to [-1, 1]; `prepare` makes them.
      granularity: e.g. "M" or "M*6+L*6"; default: everything stored.

    Raises:
      UserError: for images of another shape or a granularity that does not parse.
    """
    return classification.logits(
      self.params, self._check(images), self.config, self.execution, self._parse(granularity)
    )

  def features(self, images, granularity: gran.GranularityLike | None = None) -> jax.Array:
    """float32 [B, F]: what the head is given, for retrieval; arguments as in `logits`."""
    return classification.logits(
      self.params,
      self._check(images),
      self.config,
      self.execution,
      self._parse(granularity),
      features=True,
    )

  def _check(self, images) -> jax.Array:
    c = self.config
    images, want = jnp.asarray(images), (c.image_size, c.image_size, c.channels)
    if images.shape[1:] != want:
      raise UserError(
        f"images must be [B, {', '.join(map(str, want))}], got {images.shape}; "
        "model.prepare([image, ...]) makes them from Pillow images"
      )
    return images


@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel(Model):
  """A MatLM.

  Attributes:
    tokenizer: text to tokens and back.
  """

  config: MatLMConfig
  tokenizer: Tokenizer

  @classmethod
  def read_extras(cls, workdir, card, config):
    tokenizer = open_tokenizer(workdir)
    if tokenizer.sha256 != card["identity"]["tokenizer"]:
      raise UserError(
        f"{workdir} does not hold the tokenizer this model was trained with (its checksum "
        "differs); restore its files, or run train there again"
      )
    return {"tokenizer": tokenizer}

  def logits(self, tokens, granularity: gran.GranularityLike | None = None) -> jax.Array:
    """Next-token logits.

    Args:
      tokens: int ids [T] or [B, T], each in [0, V).
      granularity: e.g. "M" or "M*2+L*2"; default: everything stored.

    Returns:
      float32 [T, V] or [B, T, V].

    Raises:
      UserError: for ids outside the vocabulary or a granularity that does not parse.
    """
    tokens = self._check(tokens)
    batch = tokens if tokens.ndim == 2 else tokens[None]
    out = _logits(self.params, batch, self.config, self.execution, self._parse(granularity))
    return out if tokens.ndim == 2 else out[0]

  def loss(self, text_or_tokens, granularity: gran.GranularityLike | None = None) -> float:
    """Mean cross-entropy of each token given those before it, nats.

    Args:
      text_or_tokens: a string, which begins as the tokenizer's texts do, or int ids [T] or [B, T]
        with T >= 2.
      granularity: as in `logits`.
    """
    tokens = text_or_tokens
    if isinstance(tokens, str):
      tokens = self.tokenizer.begin(tokens)
    length = np.shape(tokens)[-1:]
    if length and length[0] < 2:
      raise UserError(f"loss needs at least 2 tokens, got {length[0]}; give more text")
    tokens = self._check(tokens)
    batch = tokens if tokens.ndim == 2 else tokens[None]
    return float(_loss(self.params, batch, self.config, self.execution, self._parse(granularity)))

  def generate(
    self,
    prompt: str | Sequence[str],
    granularity: gran.GranularityLike | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    **settings,
  ) -> str | list[str]:
    """Continues one text, or several together; stops at end-of-text.

    Args:
      prompt: text; empty starts a new document.
      granularity: as in `logits`.
      temperature, top_k, top_p: see `decode.Sampling`.
      **settings: more of `Settings`: max_tokens, seed, draft, ...

    Returns:
      The continuation, or one per prompt.

    Raises:
      UserError: for settings that do not fit the model.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
      return []
    ids = [self.tokenizer.prompt(p) for p in prompts]
    sampling = Sampling(temperature, top_k, top_p)
    new: list[list[int]] = []
    for new, _ in self.stream(ids, Settings(granularity, sampling=sampling, **settings)):
      pass
    texts = [self.tokenizer.continuation(i, n) for i, n in zip(ids, new)]
    return texts[0] if isinstance(prompt, str) else texts

  def stream(
    self, prompts: Sequence[Sequence[int]], settings: Settings
  ) -> Iterator[tuple[list[list[int]], Stats | None]]:
    """Continues prompts of token ids together, yielding after every program call.

    Yields:
      (new ids per prompt so far, counts of speculative decoding or None).
    """
    g = (
      gran.full(self.config) if settings.granularity is None else self._parse(settings.granularity)
    )
    config: Any = gran.submodel_config(self.config, g)
    decoder = Decoder(
      config, self.execution, gran.full(config), settings.sampling, self.tokenizer.eos_id
    )
    weights = decoder.lay_out(slicing.slice_params(self.params, self.config, g))
    seeds = [(settings.seed + i) % SEED_LIMIT for i in range(len(prompts))]
    request = prompts, settings.max_tokens, seeds
    lengths = settings.draft_lengths or tuple(
      k for k in AUTO_DRAFT_LENGTHS if k or settings.share_cache
    )
    stats, meter, speculative = None, CostMeter(lengths), None
    if settings.draft is None:
      state = decoder.prefill(weights, *request)
    else:
      draft = dataclasses.replace(decoder, granularity=gran.parse(settings.draft, config))
      speculative = SpeculativeDecoder(decoder, draft, lengths, settings.share_cache)
      state = speculative.prefill(weights, weights, *request)
    steps, rounds, done = 1, 0.0, False
    while not done:
      started = time.perf_counter()
      if speculative is None:
        state = decoder.advance(weights, state, steps)
      else:
        state, stats = speculative.advance(weights, weights, state, steps, stats, meter.costs())
      done = bool(state.done.all())
      elapsed = time.perf_counter() - started
      if stats is not None:
        before, rounds = rounds, float(stats.rounds.max())
        meter.record(elapsed, rounds - before)
      yield [s[len(p) :] for s, p in zip(state.sequences(), prompts)], stats
      steps = max(1, min(2 * steps, int(steps * CALL_SECONDS / elapsed)))

  def _check(self, tokens) -> jax.Array:
    array = np.asarray(tokens)
    if array.ndim not in (1, 2) or array.size == 0 or array.dtype.kind not in "iu":
      raise UserError(
        f"tokens must be integers of shape [T] or [B, T], got {array.dtype} of "
        f"shape {array.shape}; model.tokenizer.encode(text) makes them"
      )
    if array.min() < 0 or array.max() >= self.config.vocab_size:
      raise UserError(
        f"token ids must be in 0..{self.config.vocab_size - 1}, got "
        f"{array.min()}..{array.max()}; use model.tokenizer"
      )
    return jnp.asarray(array, jnp.int32)


def load(workdir: str | os.PathLike, step: int | None = None, kind: type[M] = Model) -> M:
  """Loads a trained model: a LanguageModel or a VisionModel.

  Reads files of this machine, or of a bucket; unpickles nothing.

  Args:
    workdir: directory of a training run; gs:// too.
    step: which checkpoint; default the newest that verifies.
    kind: of model that is wanted.

  Raises:
    UserError: if there is no such run or step, or it is of another kind.
    checkpoint.DamagedCheckpoint: (a UserError) if `step` fails verification,
      naming the leaf.
  """
  workdir = storage.path(workdir)
  card = cards.read(workdir)
  config = model_config(card)
  loaded = kind_of(config).resolve("loaded")
  if not issubclass(loaded, kind):
    wanted = " or ".join(
      k.config.name for k in KINDS.values() if issubclass(k.resolve("loaded"), kind)
    )
    raise UserError(f"{workdir} holds a {config.name}; this needs a {wanted}")
  shapes = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
  if step is None:
    found = checkpoint.restore_newest(workdir, {"params": abstract}, repair=False)
    if found is None:
      raise UserError(f"{workdir} holds no checkpoint that verifies; train there first")
  else:
    if step not in checkpoint.steps(workdir):
      raise UserError(
        f"{workdir} has no checkpoint of step {step}; it has "
        f"{', '.join(map(str, checkpoint.steps(workdir))) or 'none'}"
      )
    found = checkpoint.restore(workdir, step, {"params": abstract})
  items, meta, _ = found
  device = jax.devices()[0]
  execution = Execution.for_platform(
    device.platform, dtype="float32", remat="none", device_kind=device.device_kind
  )
  extras = loaded.read_extras(workdir, card, config)
  return loaded(items["params"], config, meta["step"], card, workdir, execution, **extras)


@overload
def open_task(model: LanguageModel, source: str | None = None) -> LanguageModeling: ...
@overload
def open_task(model: VisionModel, source: str | None = None) -> ImageClassification: ...
@overload
def open_task(model: Model, source: str | None = None) -> Task: ...
def open_task(model: Model, source: str | None = None) -> Any:
  """The task that the model was trained on, with its data, made from the source if need be.

  Args:
    source: other data, as `data.source`; what is held out of it is what training on it would
      hold out.

  Raises:
    UserError: if the source no longer gives the same data; if another one has other tokens or
      classes than the model.
  """
  config = Config(model.card["config"])
  config.model = ModelKeys(model.config.to_dict())
  config.data.tokenizer = ""  # the one beside the weights
  config.data.source = source or config.data.source
  task = make_task(config, model.workdir)
  trained_on = model.card["identity"]
  changed = [
    key
    for key, value in task.identity().items()
    if key in trained_on and json.loads(json.dumps(value)) != trained_on[key]
  ]
  if source is not None:
    changed = [key for key in changed if key in ("tokenizer", "classes")]
    if changed:
      raise UserError(f"--source={source} has another {changed[0]} than {model.workdir}")
  elif changed:
    raise UserError(
      f"data.source={config.data.source!r} no longer gives the {', '.join(changed)} "
      "this model was trained on (another version of it?); evaluate where it was "
      "trained"
    )
  return task


def _jit(f):
  return jax.jit(f, static_argnums=(2, 3, 4))


@_jit
def _logits(params, tokens, config, execution, granularity):
  return matlm.MatLM(config, execution).apply({"params": params}, tokens, granularity=granularity)


@_jit
def _loss(params, tokens, config, execution, granularity):
  model: Any = matlm.MatLM(config, execution)
  hidden, embedding = model.apply(
    {"params": params}, tokens[:, :-1], granularity=granularity, return_hidden=True
  )
  return losses.cross_entropy(hidden, embedding, tokens[:, 1:], execution)[1]
