"""Where a run's numbers go: metrics.jsonl, TensorBoard, the progress line."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax

from matformer_jax import storage
from matformer_jax.evals import Result
from matformer_jax.runtime import to_json
from matformer_jax.tpu.chips import PEAK_FLOPS


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
  """Peak bf16 FLOP/s of all devices of a mesh; None where unknown."""
  peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
  return peak * mesh.size if peak else None


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The complete objects of a .jsonl file; a line cut by a kill is left out."""
  rows = []
  path = storage.path(path)
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        row = json.loads(line)
      except ValueError:
        continue
      if isinstance(row, dict):
        rows.append(row)
  return rows


class JsonLines:
  """An append-only .jsonl file that holds each step once, in order.

  Opening it for a run that resumes at `step` drops later lines, which that run
  will write again.

  Attributes:
    dropped: those lines.
  """

  def __init__(self, path: pathlib.Path, step: int):
    found = {row["step"]: row for row in read_jsonl(path) if "step" in row}
    rows = {s: row for s, row in found.items() if s <= step}
    self.dropped = [row for s, row in found.items() if s > step]
    storage.replace_file(path, "".join(json.dumps(rows[s]) + "\n" for s in sorted(rows)).encode())
    self._file = open(path, "a", buffering=1)

  def write(self, row: Mapping[str, Any]) -> None:
    self._file.write(to_json(row) + "\n")

  def close(self) -> None:
    self._file.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
  """What is known of a finished step; the fields are those of metrics.jsonl.

  Attributes:
    step: from 1.
    granularity: what was drawn; the name of the kind of step, where it is not one size.
    loss, grad_norm: as computed, of the sliced tree. The loss is the cross-entropy alone.
    kl: KL(teacher || size) at the distillation's temperature, nats per token; None, and not in
      metrics.jsonl, for a step without a teacher.
    learning_rate: of the update.
    finite: whether loss, gradient and update were, so that the update was made.
    step_time_s: since the previous step finished; `data_wait_s` is the part spent waiting for
      data.
    draw_hash: what all hosts must have drawn alike.
    losses: by granularity, of a step with several sizes; None, and not in metrics.jsonl, else.
  """

  step: int
  granularity: str
  loss: float
  grad_norm: float
  learning_rate: float
  finite: bool
  step_time_s: float
  data_wait_s: float
  draw_hash: int
  kl: float | None = None
  losses: dict[str, float] | None = None


class RunLog:
  """Records every step, and prints a progress line every `every` steps.

  Attributes:
    lost_s: seconds of steps that an earlier process did and this one repeats.

  Args:
    staging: of the workdir, which gets metrics.jsonl, eval.jsonl and tensorboard/; None, in
      processes other than the first, records nothing.
    step: steps already done.
    total_steps: of the whole run.
    every: steps between progress lines and TensorBoard points.
    examples_per_step, unit, rate: for throughput: `unit` in progress lines, `rate` in files.
    granularities: names, smallest first, in the order of progress lines.
    flops: kind of step -> FLOPs of one over all devices.
    peak_flops: of all devices together, or None where unknown.
  """

  def __init__(
    self,
    staging: storage.Staging | None,
    step: int,
    total_steps: int,
    every: int,
    examples_per_step: int,
    unit: str,
    rate: str,
    granularities: Sequence[str],
    flops: Mapping[str, float],
    peak_flops: float | None,
  ):
    self._recording, self.lost_s = staging is not None, 0.0
    if staging is not None:
      import tensorboardX  # slow where PyTorch is installed, which it imports; for no other process

      self._steps = JsonLines(staging.fetch("metrics.jsonl"), step)
      self._evals = JsonLines(staging.fetch("eval.jsonl"), step)
      board = staging.local / "tensorboard"
      self._board = tensorboardX.SummaryWriter(str(board), purge_step=step + 1)
      self.lost_s = sum(row.get("step_time_s", 0.0) for row in self._steps.dropped)
    self._total, self._every = total_steps, every
    self._examples, self._unit, self._rate = examples_per_step, unit, rate
    self._flops, self._peak = flops, peak_flops
    self._recent = collections.defaultdict(lambda: collections.deque(maxlen=10))
    for name in granularities:  # in their order
      self._recent[name].clear()
    self._window = collections.defaultdict(list)
    self._durations = collections.deque(maxlen=4 * every)
    self.skipped = collections.Counter()

  def step(self, record: StepRecord) -> None:
    """Records one finished step."""
    if not self._recording:
      return
    row = {name: value for name, value in dataclasses.asdict(record).items() if value is not None}
    step, granularity, finite = record.step, record.granularity, row.pop("finite")
    row[self._rate] = self._examples / record.step_time_s
    if self._peak:
      row["mfu"] = self._flops[granularity] / record.step_time_s / self._peak
    if not finite:
      self.skipped[granularity] += 1
      row["skipped"] = True
      print(
        f"step {step}: loss, gradient or update of {granularity} is not finite; update skipped "
        f"({sum(self.skipped.values())} so far)",
        flush=True,
      )
    self._steps.write(row)
    self._durations.append(record.step_time_s)
    if finite:
      losses = row.pop("losses", {granularity: record.loss})
      for name, loss in losses.items():
        self._recent[name].append(loss)
        self._window[f"loss/{name}"].append(loss)
      for name in row.keys() - {"step", "granularity", "draw_hash", "loss"}:
        self._window[f"{name}/{granularity}"].append(row[name])
    if step % self._every == 0 or step == self._total:
      self._report(step)

  def _report(self, step: int) -> None:
    for name, values in self._window.items():
      self._board.add_scalar(name, sum(values) / len(values), step)
    for name, count in self.skipped.items():
      self._board.add_scalar(f"skipped/{name}", count, step)
    self._window.clear()
    losses = "  ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in self._recent.items() if v)
    mean = sum(self._durations) / len(self._durations)
    print(
      f"step {step:,}/{self._total:,}  {losses}  {self._examples / mean:,.0f} {self._unit}/s  "
      f"ETA {_clock((self._total - step) * mean)}",
      flush=True,
    )

  def evaluation(self, step: int, results: Sequence[Result]) -> None:
    """Records validation metrics."""
    if not self._recording:
      return
    measured = {
      metric: {r.granularity: r.metrics[metric] for r in results} for metric in results[0].metrics
    }
    self._evals.write({"step": step, "examples": results[0].examples, **measured})
    for metric, values in measured.items():
      for name, value in values.items():
        self._board.add_scalar(f"validation_{metric}/{name}", value, step)
    parts = []
    for r in results:
      accuracy = f" ({r.metrics['accuracy']:.2%})" if "accuracy" in r.metrics else ""
      parts.append(f"{r.granularity} {r.metrics['loss']:.4f}{accuracy}")
    print(f"step {step:,}/{self._total:,}  validation  {'  '.join(parts)}", flush=True)

  def flush(self) -> None:
    if self._recording:
      self._board.flush()

  def close(self) -> None:
    if not self._recording:
      return
    self._steps.close()
    self._evals.close()
    self._board.close()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
