"""Measurements of trained models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Result:
  """Measurements of one granularity, means over validation examples.

  Attributes:
    granularity: canonical text.
    examples: predictions measured: tokens or images.
    metrics: what was measured, by name:
      loss: as in training, nats per example.
      loss_stderr: its standard error, over windows of text or images; absent for one.
      perplexity: exp(loss), of tokens.
      bits_per_byte: of text: the loss of all tokens in bits, over the bytes of their text.
      accuracy: top-1, of images that have a label.
      accuracy_stderr: its standard error, over images.
      agreement: share of examples whose most likely answer is the largest granularity's.
      kl: KL(largest granularity || this one), nats per example.
  """

  granularity: str
  examples: int
  metrics: dict[str, float]


def measure(
  granularities: Sequence[Any],
  batches: Iterable[Any],
  reference: Callable[[Any], Any],
  program: Callable[[Any, Any, Any], Any],
  should_stop: Callable[[], bool],
  progress: Callable[[int], None],
) -> np.ndarray | None:
  """Runs `program` on every batch for every granularity.

  Args:
    reference: batch -> what the granularities are compared with.
    program: (batch, reference, granularity) -> [B, quantities], of which the first is 1, or 0
      for a row that only fills the batch. With several hosts, replicated.
    should_stop: polled after every program call.
    progress: called with the number of batches done.

  Returns:
    float64 [granularities, rows, quantities] without the rows that fill batches, or None if
    `should_stop` said so.
  """
  measured = []
  for done, batch in enumerate(batches, 1):
    compared = reference(batch)
    rows = []
    for g in granularities:
      rows.append(program(batch, compared, g))
      if should_stop():
        return None
    stacked = np.stack([np.asarray(r, np.float64) for r in rows])
    measured.append(stacked[:, stacked[0, :, 0] > 0])
    progress(done)
  return np.concatenate(measured, axis=1)


def with_stderr(name: str, values: np.ndarray) -> dict[str, float]:
  """{name: mean, name_stderr: its standard error} of independent values; of one, no error."""
  if not len(values):
    return {name: 0.0}
  error = {f"{name}_stderr": stderr(values)} if len(values) > 1 else {}
  return {name: float(np.mean(values)), **error}


def stderr(values: np.ndarray) -> float:
  """Standard error of the mean of two or more independent values."""
  return float(np.std(values, ddof=1) / np.sqrt(len(values)))
