"""Next-token prediction: MatLM on text."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from matformer_jax import storage
from matformer_jax.config import MatLMConfig
from matformer_jax.config_keys import Config
from matformer_jax.data import text_sources
from matformer_jax.data.batches import ValidationWindows, Windows
from matformer_jax.data.tokenizer import (
  CHAT_TEMPLATE_FILE,
  TOKENIZER_FILES,
  Tokenizer,
  find_tokenizer,
  open_tokenizer,
)
from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.evals import lm
from matformer_jax.models import dynamic, losses, matlm
from matformer_jax.tasks import sample_size

ATTEND = ("across", "within")


class NextToken:
  """Next-token prediction with a MatLM: model and loss, without data.

  A training batch is int32 [B, T+1]; where attention stays within documents {"tokens": that,
  "segments": int32 [B, T]}, the document of each input token, numbered within its window.
  """

  examples_unit = "tok"
  rate = "tokens_per_s"
  metrics = lm.METRICS
  headline = "loss"
  files = (*TOKENIZER_FILES, CHAT_TEMPLATE_FILE)

  def __init__(
    self,
    model_config: MatLMConfig,
    batch_size: int,
    z_loss: float = 0.0,
    attend: str = "across",
  ):
    if attend not in ATTEND:
      raise UserError(f"data.attend={attend!r} is unknown{did_you_mean(str(attend), ATTEND)}")
    self.model_config = model_config
    self.examples_per_step = batch_size * model_config.seq_len
    self.attend = attend
    self._z_loss = z_loss

  @classmethod
  def from_config(cls, config: Config):
    return cls(
      MatLMConfig.from_dict(config.model), config.batch_size, config.z_loss, _attend(config)
    )

  def batch_shapes(self, batch_size):
    length = self.model_config.seq_len
    tokens = jax.ShapeDtypeStruct((batch_size, length + 1), jnp.int32)
    if self.attend == "across":
      return tokens
    return {"tokens": tokens, "segments": jax.ShapeDtypeStruct((batch_size, length), jnp.int32)}

  def preprocess(self, batch):
    return batch

  def loss(self, sub_config, execution, sub_params, batch, teacher=None, layer_indices=None):
    within = self.attend == "within"
    tokens = batch["tokens"] if within else batch
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    segments = {"segments_BxT": batch["segments"]} if within else {}

    def hidden_and_head(config, execution, params):
      model = matlm.MatLM(config, execution)
      return model.apply({"params": params}, inputs, return_hidden=True, **segments)

    if layer_indices is None:
      hidden, head = hidden_and_head(sub_config, execution, sub_params)
    else:
      hidden, head = dynamic.apply_dynamic(
        sub_params,
        inputs,
        layer_indices,
        config=sub_config,
        execution=execution,
        return_hidden=True,
        **segments,
      )
    if teacher is None:
      objective, loss = losses.cross_entropy(hidden, head, targets, execution, self._z_loss)
      return objective, {"loss": loss}
    forward = dataclasses.replace(execution, remat="none")  # there is no backward pass
    teacher_hidden, teacher_head = jax.lax.stop_gradient(
      hidden_and_head(teacher.config, forward, teacher.params)
    )
    objective, loss, kl = losses.distillation(
      hidden,
      head,
      targets,
      teacher_hidden,
      teacher_head,
      execution,
      teacher.weight,
      teacher.temperature,
      self._z_loss,
    )
    return objective, {"loss": loss, "kl": kl}


class LanguageModeling(NextToken):
  """Next-token prediction on a corpus: a tokenizer, a token store, batches by step."""

  def __init__(self, config: Config, workdir: storage.Path | None = None):
    super().__init__(
      MatLMConfig.from_dict(config.model), config.batch_size, config.z_loss, _attend(config)
    )
    data = config.data
    given = data.tokenizer or (workdir and find_tokenizer(workdir))
    cache_dir = data.cache_dir or None

    def make_tokenizer(corpus: text_sources.Corpus) -> Tokenizer:
      if given:
        return open_tokenizer(given)
      return text_sources.get_tokenizer(
        corpus,
        self.model_config.vocab_size,
        data.tokenizer_type,
        data.tokenizer_sample_bytes,
        cache_dir,
      )

    self.store, self.tokenizer = text_sources.open_source(
      data.source, data.data_dir or None, make_tokenizer, data.validation_fraction, cache_dir
    )
    if self.tokenizer.vocab_size > self.model_config.vocab_size:
      raise UserError(
        f"model.vocab_size={self.model_config.vocab_size} is smaller than the "
        f"tokenizer's {self.tokenizer.vocab_size} pieces ({given or data.source}); "
        "raise it"
      )
    seq_len = self.model_config.seq_len
    for split, tokens in self.store.tokens.items():
      if len(tokens) <= seq_len:
        raise UserError(
          f"data.source={data.source!r} has {len(tokens):,} {split} tokens at "
          f"data.validation_fraction={self.store.manifest['validation_fraction']}, fewer than one "
          f"window of model.seq_len={seq_len} + 1; use more text, another fraction or a shorter "
          "seq_len"
        )
    documents = self.store.documents if self.attend == "within" else {}
    self._train = Windows(
      self.store.tokens["train"], seq_len, config.batch_size, config.seed, documents.get("train")
    )
    self.validation = ValidationWindows(
      self.store.tokens["validation"],
      seq_len,
      self.tokenizer.byte_lengths,
      documents.get("validation"),
    )
    self._eval = config.eval

  def batch(self, step, rows=None):
    return self._train.batch(step, rows)

  def sample_ids(self, step, rows=None):
    return self._train.window_ids(step, rows)

  def batches(self, first, last, rows):
    for step in range(first, last + 1):
      yield [self.batch(step, r) for r in rows]

  def sample(self, batches: int | None = None, batch_size: int | None = None):
    """(windows, batch size) that `evaluate` measures: places in `validation`'s order."""
    windows, batch_size = sample_size(self._eval, batches, batch_size)
    return self.validation.sample(windows), batch_size

  def evaluate(
    self,
    execution,
    params,
    put,
    granularities,
    *,
    consistency=False,
    batches=None,
    batch_size=None,
    should_stop=lambda: False,
    progress=lambda done, total: None,
  ):
    sample, batch_size = self.sample(batches, batch_size)
    starts = range(0, len(sample), batch_size)
    total = len(starts)

    def rows_of(start, rows=None):
      places = [start + row for row in rows or range(batch_size)]
      return self.validation.read(places, len(sample))

    read = (put(functools.partial(rows_of, start), batch_size) for start in starts)
    return lm.evaluate(
      self.model_config,
      execution,
      params,
      granularities,
      read,
      consistency,
      should_stop,
      lambda done: progress(done, total),
    )

  def identity(self):
    # Named only where it is not the default, which runs made before there was a choice have.
    attend = {} if self.attend == "across" else {"attend": self.attend}
    return {"tokenizer": self.tokenizer.sha256, "tokens": self.store.fingerprint, **attend}

  def save_files(self, workdir):
    self.tokenizer.save(workdir)


def _attend(config: Config) -> str:
  return getattr(config.data, "attend", "across")
