"""A task is a model, a loss and a data source; the training loop knows none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any, Protocol

import jax

from matformer_jax import granularity as gran
from matformer_jax import storage
from matformer_jax.config import Execution, ModelConfig, kind_of
from matformer_jax.config_keys import Config
from matformer_jax.evals import Result


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen model that a loss also learns from; see `losses.chunked_distillation`.

  Attributes:
    config: of the teacher, all of which is run.
    params: its parameters, as a program sees the student's.
    weight, temperature: how it is learned from.
  """

  config: ModelConfig
  params: Any
  weight: float
  temperature: float


class Task(Protocol):
  """What the training loop needs. A batch is a tree of arrays whose first axis is the batch.

  Attributes:
    model_config: of the universal model.
    examples_unit: what `examples_per_step` counts, e.g. tokens.
    examples_per_step: over all processes.
    rate: what metrics.jsonl calls their number per second.
    metrics: what `evaluate` can measure, see `Result.metrics`.
    headline: of those, what plots show.
    files: what belongs beside the weights, by name in the run's directory.
  """

  metrics: tuple[str, ...]
  headline: str
  files: tuple[str, ...]
  model_config: ModelConfig
  examples_unit: str
  rate: str
  examples_per_step: int

  def batch_shapes(self, batch_size: int) -> Any:
    """A training batch as `jax.ShapeDtypeStruct`s."""
    ...

  def preprocess(self, batch) -> Any:
    """What is done to a whole batch on the device, before devices and micro-batches share it."""
    ...

  def loss(
    self,
    sub_config: ModelConfig,
    execution: Execution,
    sub_params,
    batch,
    teacher: Teacher | None = None,
    layer_indices: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(objective to differentiate, what to report) of a submodel on one batch.

    Reported are scalars that are means over the batch: `loss`, and `kl` where there is a
    teacher, whom not every task can learn from.

    Args:
      layer_indices: int32 [L], where the sizes of the layers are told to the program; see
        models/dynamic.py. Not every task can.
    """
    ...

  def batch(self, step: int, rows: range | None = None) -> Any:
    """Rows (all by default) of the batch of `step`, in NumPy; a pure function of both."""
    ...

  def batches(self, first: int, last: int, rows: Sequence[range]) -> Iterator[list[Any]]:
    """`[batch(step, r) for r in rows]` for steps first to last, read as fast as may be."""
    ...

  def sample_ids(self, step: int, rows: range | None = None) -> list[int]:
    """What the rows are, for the ledger of samples."""
    ...

  def evaluate(
    self,
    execution: Execution,
    params,
    put: Callable,
    granularities: Sequence[gran.Granularity],
    *,
    consistency: bool = False,
    batches: int | None = None,
    batch_size: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
  ) -> list[Result] | None:
    """Measures granularities on validation data.

    Args:
      put: (read, batch_size) -> a global batch; see `Trainer.put`.
      consistency: also compare with the largest granularity.
      batches: at most this many; 0 is the whole split; default the examples that the config's
        `eval.batches` of `eval.batch_size` hold. They are a sample of the split, the same one
        for a number of examples whatever the batch size, seed, mesh and number of hosts.
      batch_size: default the config's.
      should_stop: polled after every program call.
      progress: called with (batches done, batches in all).

    Returns:
      One Result per granularity, or None if stopped.
    """
    ...

  def identity(self) -> Mapping[str, Any]:
    """JSON that must not change in the course of a run."""
    ...

  def save_files(self, workdir: storage.Path) -> None:
    """Writes what a checkpoint needs beside the weights, such as a tokenizer."""
    ...


def sample_size(eval_config, batches: int | None, batch_size: int | None) -> tuple[int, int]:
  """(examples, batch size) that `Task.evaluate` measures; 0 examples are the whole split."""
  batch_size = batch_size or eval_config.batch_size
  if batches is None:
    return eval_config.batches * eval_config.batch_size, batch_size
  return batches * batch_size, batch_size


def make_task(config: Config, workdir: storage.Path | None = None) -> Task:
  """The task named by `config.task`, with its data. Raises UserError for an unknown one."""
  return kind_of(config).resolve("task")(config, workdir)


def make_task_without_data(config: Config) -> Task:
  """The same model and loss, for whoever only compiles programs."""
  return kind_of(config).resolve("objective").from_config(config)
