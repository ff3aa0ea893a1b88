"""The loop over steps, and what surrounds a step: stopping, tracing, the log of samples."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import signal
import time
from typing import Any
import zlib

import jax
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax import storage
from matformer_jax.checkpoints import checkpoint, replicas
from matformer_jax.config_keys import Config
from matformer_jax.data.prefetch import Prefetcher
from matformer_jax.errors import Diverged
from matformer_jax.hosts import goodput, multihost
from matformer_jax.hosts.multihost import Hosts
from matformer_jax.hosts.watchdog import Watchdog
from matformer_jax.runtime import say
from matformer_jax.training import metrics, optim
from matformer_jax.training.methods import StepKind
from matformer_jax.training.trainer import Trainer, TrainState


@dataclasses.dataclass
class _Pending:
  """A step that has been dispatched and not yet reported."""

  step: int
  index: int
  draw_hash: int
  outputs: dict[str, jax.Array]
  signals: Any
  data_wait_s: float


@dataclasses.dataclass(kw_only=True)
class Loop:
  """Dispatches step t, then records step t - 1 while t runs: no step waits for the host.

  Attributes:
    config: of the run.
    programs: index of a kind of step -> the compiled step.
    state: after `start` steps; then after the last one dispatched.
    start: steps done before.
    skipped: updates skipped so far, since loss, gradient or update was not finite.
    parent: the steps' last argument: parameters of a frozen teacher, or ().
    owes_evaluation: whether the run was stopped after step `start` and before its evaluation.
    stopped: by a signal, before all steps and their evaluations were done.
  """

  config: Config
  trainer: Trainer
  programs: dict[int, Callable]
  hosts: Hosts
  stop: StopSignal
  writer: checkpoint.Writer
  log: metrics.RunLog
  ledger: goodput.Ledger
  watchdog: Watchdog
  staging: storage.Staging
  profile: StepProfile
  samples: SampleLog | None
  state: TrainState
  start: int
  skipped: int
  parent: tuple[Any, ...] = ()
  owes_evaluation: bool = False
  stopped: bool = dataclasses.field(default=False, init=False)
  _pending: _Pending | None = dataclasses.field(default=None, init=False)
  _bad_in_a_row: int = dataclasses.field(default=0, init=False)
  _saved: int = dataclasses.field(default=0, init=False)  # the newest checkpoint's step
  _finished_at: float = dataclasses.field(default=0.0, init=False)  # the last step, monotonic

  def __post_init__(self):
    self._saved = self.start
    # All at once and ahead of time: evaluated step by step it would cost the loop 1%.
    schedule = jax.jit(jax.vmap(optim.make_schedule(self.config.optim, self.config.steps)))
    self._learning_rates = np.asarray(schedule(np.arange(self.config.steps)))
    self._signals = multihost.Signals(self.hosts, self.trainer.mesh)

  def run(self) -> int:
    """Trains until the last step or a stop that all hosts agree on; returns the step saved."""
    config, trainer = self.config, self.trainer
    self._finished_at = time.perf_counter()
    self.stop.finish_step = True
    batches = Prefetcher(trainer.batches(self.start))
    with self.watchdog, contextlib.closing(self.profile):
      if self.owes_evaluation:
        self._evaluate(self.start)
      for step in range(self.start + 1, config.steps + 1):
        if self.stopped:
          break
        asked = time.perf_counter()
        with self.ledger.phase("data"):
          batch = batches.next()
        waited = time.perf_counter() - asked
        index, told = trainer.draw(step)
        drawn = _draw_hash(step, index, told)
        self.profile.before(step)
        self.state, outputs = self.programs[index](self.state, batch, *told, *self.parent)
        signals = self._signals.send(self.stop.requested, drawn)
        self._report()  # of step - 1, while this one runs
        self._pending = _Pending(step, index, drawn, outputs, signals, waited)
        if self.samples:
          self.samples.write(step)
        evaluates = evaluates_after(config, step)
        if _due(config.replica_check_every, step):
          self._check_replicas()
        if self.stopped or evaluates or _due(config.checkpoint.every, step):
          self._save(step)  # first, so that an evaluation that fails loses nothing
        if evaluates and not self.stopped:
          self._evaluate(step)
        self.profile.after(step)
    batches.close()
    return self._saved

  def _report(self) -> None:
    """Waits for the pending step and records it."""
    if self._pending is None:
      return
    done, self._pending = self._pending, None
    outputs = jax.device_get(done.outputs)
    stopping = self._signals.read(done.signals, done.step)
    self.stopped = self.stop.requested if stopping is None else stopping
    now = time.perf_counter()
    finite = bool(outputs["finite"])
    kind = self.trainer.kinds[done.index]
    name = kind.name
    self.log.step(
      metrics.StepRecord(
        step=done.step,
        granularity=name,
        loss=float(outputs["loss"]),
        grad_norm=float(outputs["grad_norm"]),
        kl=float(outputs["kl"]) if "kl" in outputs else None,
        # The optimizer counts the updates it made; a skipped one leaves its count alone.
        learning_rate=float(self._learning_rates[done.step - 1 - self.skipped]),
        finite=finite,
        step_time_s=now - self._finished_at,
        data_wait_s=done.data_wait_s,
        draw_hash=done.draw_hash,
        losses=self._losses(kind, outputs),
      )
    )
    self._finished_at = now
    self.watchdog.alive(f"step {done.step:,}")
    if _due(self.config.log_every, done.step):
      self.ledger.save()
    self.skipped += not finite
    self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1
    if self.config.max_nonfinite and self._bad_in_a_row >= self.config.max_nonfinite:
      kept = (
        f"the newest checkpoint is of step {self._saved:,}" if self._saved else "none was saved"
      )
      raise Diverged(
        f"diverged: loss, gradient or update was not finite for {self._bad_in_a_row} steps in a "
        f"row, last {name} at step {done.step}; none of them was applied or saved, and {kept}. "
        f"Lower optim.peak_lr={self.config.optim.peak_lr:g} or set optim.clip_norm, then run "
        "again to resume"
      )

  def _losses(self, kind: StepKind, outputs) -> dict[str, float] | None:
    """Of each size of a step that has several."""
    if "losses" not in outputs:
      return None
    names = [gran.to_text(g, self.trainer.task.model_config) for g in kind.granularities]
    return dict(zip(names, outputs["losses"].tolist()))

  def _evaluate(self, step: int) -> None:
    """Validation of every size, unless a stop is asked for meanwhile."""

    def should_stop() -> bool:
      self.watchdog.alive(f"evaluation after step {step:,}")
      self.stopped = self._signals.any(self.stop.requested)
      return self.stopped

    with self.ledger.phase("evaluation"):
      results = self.trainer.task.evaluate(
        self.trainer.execution,
        self.state.params,
        self.trainer.put,
        self.trainer.granularities,
        should_stop=should_stop,
      )
    if results is not None:
      self.log.evaluation(step, results)
      self.writer.record(step, results[-1].metrics["loss"])
    self._finished_at = time.perf_counter()

  def _check_replicas(self) -> None:
    try:
      replicas.check(self.state, self.trainer.mesh)
    except replicas.ReplicasDiffer as e:
      self.hosts.give_up(f"{e}; checkpoints saved before are intact")

  def _save(self, step: int) -> None:
    """Saves the state; while updates are being skipped only where the run ends."""
    self._report()
    if self._bad_in_a_row and not self.stopped and step < self.config.steps:
      return
    self.log.flush()
    with self.ledger.phase("checkpoint"):
      self.staging.sync()  # so that the records of all that is saved are there
      self._check_replicas()  # so that no checkpoint holds a flipped bit
      self.writer.save(
        step,
        self.state.params,
        self.state.opt_state,
        {"step": step},
        {"skipped": self.skipped},
      )
    self._saved = step
    self.ledger.save()
    self.watchdog.alive(f"saving step {step:,}")
    self._finished_at = time.perf_counter()


def _due(every: int, step: int) -> bool:
  return bool(every) and step % every == 0


def evaluates_after(config: Config, step: int) -> bool:
  """Whether a run evaluates after a step."""
  return step == config.steps or _due(config.eval.every, step)


def _draw_hash(step: int, index: int, told: tuple[np.ndarray, ...]) -> int:
  """What all hosts must agree on at a step, in 32 bits."""
  return zlib.crc32(":".join([str(step), str(index), *(str(x.tolist()) for x in told)]).encode())


class StopSignal:
  """SIGTERM or Ctrl-C: leaves at once while setting up, after the current step once training.

  A second Ctrl-C interrupts for good.

  Attributes:
    requested: whether to stop after the step.
    finish_step: whether a step is under way that should be finished first.
    name: of the signal.
    exit_code: 143 for SIGTERM, 130 for Ctrl-C.
  """

  def __init__(self, hosts: Hosts):
    self.requested = False
    self.finish_step = False
    self.name, self.exit_code = "SIGTERM on another host", 128 + signal.SIGTERM
    self._hosts = hosts
    for signum in (signal.SIGTERM, signal.SIGINT):
      signal.signal(signum, self._handle)

  def _handle(self, signum, frame):
    self.name = signal.Signals(signum).name
    self.exit_code = 128 + signum
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if self.finish_step:
      if signum == signal.SIGINT:
        print("\nstopping after this step; Ctrl-C again leaves without saving it", flush=True)
      self.requested = True
    else:
      why = f"stopped by {self.name} before the first step"
      print(why, flush=True)
      self._hosts.leave(self.exit_code, why)  # compile threads cannot be interrupted


PROFILE_DIR = "profile"


class StepProfile:
  """Traces a range of steps with JAX's profiler."""

  def __init__(self, steps: range, staging: storage.Staging):
    self._steps, self._staging = steps, staging
    self._traced: list[int] = []  # while a trace is being taken

  def before(self, step: int) -> None:
    if step in self._steps:
      if not self._traced:
        jax.profiler.start_trace(str(self._staging.local / PROFILE_DIR))
      self._traced.append(step)

  def after(self, step: int) -> None:
    if step + 1 not in self._steps:
      self.close()

  def close(self) -> None:
    """Writes what was traced, also of a run that ends within the range."""
    if self._traced:
      jax.profiler.stop_trace()
      say(
        f"wrote a profile of steps {self._traced[0]} to {self._traced[-1]} to "
        f"{self._staging.directory / PROFILE_DIR}; view it with TensorBoard's profile plug-in or "
        "xprof"
      )
      self._traced.clear()


class SampleLog:
  """samples-<process>.jsonl: which samples every step trained on, as this process read them."""

  def __init__(self, staging: storage.Staging, start: int, trainer: Trainer, hosts: Hosts):
    self._trainer, self._rows = trainer, trainer.local_rows()
    self._file = metrics.JsonLines(staging.fetch(f"samples-{hosts.index}.jsonl"), start)

  def write(self, step: int) -> None:
    ids = {rows.start: self._trainer.task.sample_ids(step - 1, rows) for rows in self._rows}
    self._file.write({"step": step, "first_row_to_ids": ids})
