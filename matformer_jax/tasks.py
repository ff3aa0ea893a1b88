"""A task is a model, a loss and a data source; the training loop knows none of them."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, Callable, Mapping, Protocol

import jax
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax import losses
from matformer_jax.config import Execution, ModelConfig
from matformer_jax.data import text
from matformer_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from matformer_jax.errors import UserError
from matformer_jax.evals import lm
from matformer_jax.models import matlm



class Task(Protocol):
  """What the training loop needs.

  Attributes:
    model_config: of the universal model.
    examples_unit: what `examples_per_step` counts, e.g. tokens.
    examples_per_step: over all processes.
  """

  model_config: ModelConfig
  examples_unit: str
  examples_per_step: int

  def init(self, rng: jax.Array) -> Any:
    """Universal parameters."""

  def slice(self, params, granularity: gran.Granularity) -> Any:
    """The submodel's own parameter tree."""

  def loss(self, sub_config: ModelConfig, execution: Execution, sub_params,
           batch) -> tuple[jax.Array, jax.Array]:
    """(objective to differentiate, loss to report) of a submodel on one batch."""

  def batch(self, step: int, rows: range | None = None) -> np.ndarray:
    """Rows (all by default) of the batch of `step`; a pure function of both."""

  def sample_ids(self, step: int, rows: range | None = None) -> list[int]:
    """What the rows are, for the ledger of samples."""

  def evaluate(self, execution: Execution, params, put: Callable,
               should_stop: Callable[[], bool]) -> dict[str, float] | None:
    """{granularity: validation loss}, or None if stopped."""

  def identity(self) -> Mapping[str, Any]:
    """JSON that must not change in the course of a run."""

  def save_files(self, workdir: pathlib.Path) -> None:
    """Writes what a checkpoint needs beside the weights, such as a tokenizer."""


class NextToken:
  """Next-token prediction with a MatLM: model and loss, without data."""

  examples_unit = "tok"

  def __init__(self, model_config: ModelConfig, batch_size: int, z_loss: float = 0.0):
    self.model_config = model_config
    self.examples_per_step = batch_size * model_config.seq_len
    self._z_loss = z_loss

  def init(self, rng):
    return matlm.init_params(self.model_config, rng)

  def slice(self, params, granularity):
    return matlm.slice_params(params, self.model_config, granularity)

  def loss(self, sub_config, execution, sub_params, batch):
    model = matlm.MatLM(sub_config, execution)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    hidden, embedding = model.apply({"params": sub_params}, inputs, return_hidden=True)
    chunks = losses.num_chunks(inputs.shape, sub_config.vocab_size, execution)
    return losses.chunked_cross_entropy(hidden, embedding, targets, chunks, self._z_loss)


class LanguageModeling(NextToken):
  """Next-token prediction on a corpus: a tokenizer, a token store, batches by step."""

  def __init__(self, config, workdir: pathlib.Path | None = None):
    super().__init__(ModelConfig.from_dict(config.model), config.batch_size, config.z_loss)
    data = config.data
    given = data.tokenizer or _existing(workdir)
    cache_dir = data.cache_dir or None

    def make_tokenizer(corpus: text.Corpus) -> Tokenizer:
      if given:
        return Tokenizer.from_file(given)
      return text.get_tokenizer(corpus, self.model_config.vocab_size, data.tokenizer_type,
                                data.tokenizer_sample_bytes, cache_dir)

    self.store, self.tokenizer = text.open_source(
        data.source, data.data_dir or None, make_tokenizer, data.validation_fraction, cache_dir)
    if self.tokenizer.vocab_size > self.model_config.vocab_size:
      raise UserError(f"model.vocab_size={self.model_config.vocab_size} is smaller than the "
                      f"tokenizer's {self.tokenizer.vocab_size} pieces ({given or data.source}); "
                      "raise it")
    seq_len = self.model_config.seq_len
    self._train = text.Windows(self.store.tokens["train"], seq_len, config.batch_size,
                               config.seed)
    self._validation = text.Windows(self.store.tokens["validation"], seq_len,
                                    config.eval.batch_size, None)
    self._eval_batch_size = config.eval.batch_size
    self._eval_batches = max(1, min(config.eval.batches,
                                    self._validation.num_windows // config.eval.batch_size))

  def batch(self, step, rows=None):
    return self._train.batch(step, rows)

  def sample_ids(self, step, rows=None):
    return self._train.window_ids(step, rows)

  def evaluate(self, execution, params, put, should_stop=lambda: False):
    batches = (put(functools.partial(self._validation.batch, i), self._eval_batch_size)
               for i in range(self._eval_batches))
    results = lm.evaluate(self.model_config, execution, params, gran.uniform(self.model_config),
                          batches, consistency=False, should_stop=should_stop)
    return None if results is None else {r.granularity: r.loss for r in results}

  def identity(self):
    return {"tokenizer": self.tokenizer.sha256, "tokens": self.store.fingerprint}

  def save_files(self, workdir):
    path = workdir / TOKENIZER_FILE
    if not path.exists() or path.read_bytes() != self.tokenizer.model:
      path.write_bytes(self.tokenizer.model)


def _existing(workdir: pathlib.Path | None) -> pathlib.Path | None:
  path = workdir / TOKENIZER_FILE if workdir else None
  return path if path is not None and path.exists() else None


def make_task(config, workdir: pathlib.Path | None = None) -> Task:
  """The task named by `config.task`. Raises UserError for an unknown one."""
  if config.task != "matlm":
    raise UserError(f"task={config.task!r} is unknown; use 'matlm'")
  return LanguageModeling(config, workdir)
