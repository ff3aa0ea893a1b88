"""What the benchmarks share: configs as shipped, random tokens, programs timed in turn, ratios."""

from __future__ import annotations

import pathlib
import statistics
import time

import jax
import numpy as np

import matformer_jax
from matformer_jax.config import MatLMConfig
from matformer_jax.tasks.language import NextToken

ROOT = pathlib.Path(__file__).resolve().parent.parent


def get_config(file: str, row: str):
  """A row of configs/FILE.py, with nothing overridden."""
  return matformer_jax.get_config(ROOT / "configs" / f"{file}.py:{row}")


class Tokens(NextToken):
  """Next-token prediction on given tokens, without a corpus."""

  def __init__(self, model_config: MatLMConfig, batch_size: int):
    super().__init__(model_config, batch_size)
    rng = np.random.default_rng(0)
    self.tokens = rng.integers(
      0, model_config.vocab_size, (batch_size, model_config.seq_len + 1), np.int32
    )

  def batch(self, step, rows):
    return self.tokens[rows]


class Program:
  """A train step and, where there is one, a forward pass, whose calls are timed one at a time."""

  def __init__(self, step, state, batch, forward=None):
    self.step, self.state, self.forward, self.batch = step, state, forward, batch
    self.step_times, self.forward_times = [], []

  def run(self, record: bool = True):
    started = time.perf_counter()
    self.state, out = self.step(self.state, self.batch)
    jax.block_until_ready((self.state, out))
    middle = time.perf_counter()
    if self.forward:
      jax.block_until_ready(self.forward(self.state.params, self.batch))
    if record:
      self.step_times.append(middle - started)
      self.forward_times.append(time.perf_counter() - middle)


def measure(programs: list[Program], reps: int) -> None:
  """Times all programs in turn, `reps` times, after two warm-up rounds."""
  for i in range(reps + 2):
    for program in programs:
      program.run(record=i >= 2)


def paired(a: list[float], b: list[float]) -> float:
  """Median of the ratios taken in the same round: drift of the machine cancels."""
  return statistics.median(x / y for x, y in zip(a, b))
