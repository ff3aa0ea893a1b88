"""Next-token prediction: MatLM on text."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp

from matformer_jax.config import MatLMConfig
from matformer_jax.data import text_sources
from matformer_jax.data.batches import Windows
from matformer_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from matformer_jax.errors import UserError
from matformer_jax.evals import lm
from matformer_jax.models import losses, matlm


class NextToken:
  """Next-token prediction with a MatLM: model and loss, without data."""

  examples_unit = "tok"
  rate = "tokens_per_s"
  metrics = lm.METRICS
  headline = "loss"
  evaluation_batch = 16  # windows
  files = (TOKENIZER_FILE,)

  def __init__(self, model_config: MatLMConfig, batch_size: int, z_loss: float = 0.0):
    self.model_config: MatLMConfig = model_config
    self.examples_per_step = batch_size * model_config.seq_len
    self._z_loss = z_loss

  @classmethod
  def from_config(cls, config):
    return cls(MatLMConfig.from_dict(config.model), config.batch_size, config.z_loss)

  def batch_shapes(self, batch_size):
    return jax.ShapeDtypeStruct((batch_size, self.model_config.seq_len + 1), jnp.int32)

  def preprocess(self, batch):
    return batch

  def loss(self, sub_config, execution, sub_params, batch):
    model = matlm.MatLM(sub_config, execution)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    hidden, embedding = model.apply({"params": sub_params}, inputs, return_hidden=True)
    chunks = losses.num_chunks(inputs.shape, sub_config.vocab_size, execution)
    return losses.chunked_cross_entropy(hidden, embedding, targets, chunks, self._z_loss)


class LanguageModeling(NextToken):
  """Next-token prediction on a corpus: a tokenizer, a token store, batches by step."""

  def __init__(self, config, workdir: pathlib.Path | None = None):
    super().__init__(MatLMConfig.from_dict(config.model), config.batch_size, config.z_loss)
    data = config.data
    given = data.tokenizer or _existing(workdir)
    cache_dir = data.cache_dir or None

    def make_tokenizer(corpus: text_sources.Corpus) -> Tokenizer:
      if given:
        return Tokenizer.from_file(given)
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
    self._train = Windows(self.store.tokens["train"], seq_len, config.batch_size, config.seed)
    self._eval = config.eval

  def batch(self, step, rows=None):
    return self._train.batch(step, rows)

  def sample_ids(self, step, rows=None):
    return self._train.window_ids(step, rows)

  def batches(self, first, last, rows):
    for step in range(first, last + 1):
      yield [self.batch(step, r) for r in rows]

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
    tokens, seq_len = self.store.tokens["validation"], self.model_config.seq_len
    batches = self._eval.batches if batches is None else batches
    if batch_size is None:
      batch_size = self._eval.batch_size
    else:  # no window twice, however few there are
      batch_size = min(batch_size, Windows(tokens, seq_len, 1, None).num_windows)
    windows = Windows(tokens, seq_len, batch_size, None)
    total = max(1, windows.num_windows // batch_size)
    total = min(total, batches) if batches else total
    read = (put(functools.partial(windows.batch, i), batch_size) for i in range(total))
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
    return {"tokenizer": self.tokenizer.sha256, "tokens": self.store.fingerprint}

  def save_files(self, workdir):
    path = workdir / TOKENIZER_FILE
    if not path.exists() or path.read_bytes() != self.tokenizer.model:
      path.write_bytes(self.tokenizer.model)


def _existing(workdir: pathlib.Path | None) -> pathlib.Path | None:
  path = workdir / TOKENIZER_FILE if workdir else None
  return path if path is not None and path.exists() else None
