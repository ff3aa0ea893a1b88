"""Trains one universal model by sampling a granularity every step (Section 3.2).

  python -m matformer_jax.train --config=configs/matlm.py:quickstart --workdir=runs/quickstart

Running the same command again resumes bit-exactly. On a TPU slice, under Slurm's srun
and Open MPI's mpirun the processes find each other; elsewhere start one per machine
with --coordinator, --num_processes and --process_id.

Exit codes: 0 done; 1 an error to fix first (config, data, divergence); 143 stopped by
SIGTERM, 130 by Ctrl-C, 42 lost a peer, hung or a hardware fault: run again to go on.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import signal
import time
from typing import Any
import zlib

from absl import flags
import jax
import ml_collections
import numpy as np

from matformer_jax import cli, models, runtime, sharding
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint, replicas
from matformer_jax.config import KINDS, model_config
from matformer_jax.data.prefetch import Prefetcher
from matformer_jax.data.tokenizer import TOKENIZER_FILE
from matformer_jax.errors import UserError
from matformer_jax.evals import Result
from matformer_jax.hosts import goodput, multihost
from matformer_jax.hosts.multihost import Hosts
from matformer_jax.hosts.watchdog import Watchdog
from matformer_jax.runtime import say
from matformer_jax.tasks import make_task
from matformer_jax.training import metrics, optim
from matformer_jax.training.trainer import Trainer, TrainState


def train(
  config, workdir: str | os.PathLike, hosts: Hosts = Hosts(), profile: range = range(0)
) -> int:
  """Trains or resumes; returns the exit code.

  Args:
    config: an `ml_collections.ConfigDict`, see configs/matlm.py.
    workdir: gets config.json, tokenizer.model, checkpoints/, metrics.jsonl,
      eval.jsonl, goodput.json, tensorboard/. With several hosts, a directory they share.
    hosts: the processes that train together.
    profile: steps to trace with JAX's profiler, into profile/.

  Raises:
    UserError: for a mistake in the config, corpus or workdir, or divergence.
  """
  workdir = pathlib.Path(workdir)
  stop = _StopSignal(hosts)
  runtime.enable_compilation_cache()
  _check_config(config)
  workdir.mkdir(parents=True, exist_ok=True)
  old_card = cards.read_existing(workdir)
  if hosts.first:
    _recover_tokenizer(workdir, old_card)
  config = _start_from(config, workdir, old_card, hosts)
  if old_card is not None:
    cards.check_model(workdir, old_card, config)
  _check_shared(workdir, hosts)
  mesh = sharding.make_mesh(config.mesh)
  task = make_task(config, workdir)
  sharding.check_model_fits_mesh(task.model_config, mesh)
  sharding.check_batch(config.batch_size, config.grad_accum, mesh)
  sharding.check_batch(config.eval.batch_size, 1, mesh, "eval.batch_size")
  trainer = Trainer(task, config, mesh)
  card = cards.make_card(config, task)
  if hosts.count > 1:
    hosts.check_equal(cards.host_facts(card))
  if old_card is not None:
    cards.check_same_run(workdir, old_card, card)
  state, start, skipped = _initial_state(config, workdir, trainer, hosts)
  if hosts.first:
    cards.write(workdir, card)
    task.save_files(workdir)
  counts = {name: gran.count(task.model_config, name) for name in trainer.names}
  _say_what_is_trained(config, trainer, counts, hosts)
  writer = checkpoint.Writer(
    workdir, config.checkpoint.keep_last, config.checkpoint.keep_best, card
  )
  if start >= config.steps:
    say(f"nothing to do: {workdir} is at step {start:,} of {config.steps:,}")
    writer.close()
    return 0
  log = metrics.RunLog(
    workdir if hosts.first else None,
    start,
    config.steps,
    config.log_every,
    task.examples_per_step,
    task.examples_unit,
    {n: c.train_flops * task.examples_per_step for n, c in counts.items()},
    metrics.peak_flops(mesh),
  )
  ledger = goodput.Ledger(workdir / goodput.GOODPUT_FILE if hosts.first else None, log.lost_s)
  ledger.enter("compile")
  programs = trainer.compile()
  ledger.enter("step")
  loop = _Loop(
    config,
    trainer,
    programs,
    hosts,
    stop,
    writer,
    log,
    ledger,
    Watchdog(config.hang_timeout_s, hosts),
    _Profile(profile, workdir),
    _SampleLog(workdir, start, trainer, hosts) if config.data.log_samples else None,
    state,
    start,
    skipped,
  )
  stopped_at = loop.run()
  ledger.enter("checkpoint")
  writer.close()
  log.close()
  ledger.save()
  say(ledger.report())
  if stopped_at < config.steps:
    say(f"stopped by {stop.name}; saved step {stopped_at:,}. Run the same command to resume")
    return stop.exit_code
  say(f"done: {config.steps:,} steps in {workdir}")
  return 0


# ------------------------------------------------------------------ the loop


@dataclasses.dataclass
class _Pending:
  """A step that has been dispatched and not yet reported."""

  step: int
  index: int
  outputs: dict[str, jax.Array]
  signals: Any
  data_wait_s: float


@dataclasses.dataclass
class _Loop:
  """Dispatches step t, then records step t - 1 while t runs: no step waits for the host."""

  config: Any
  trainer: Trainer
  programs: dict[int, Callable]
  hosts: Hosts
  stop: _StopSignal
  writer: checkpoint.Writer
  log: metrics.RunLog
  ledger: goodput.Ledger
  watchdog: Watchdog
  profile: _Profile
  samples: _SampleLog | None
  state: TrainState
  start: int
  skipped: int

  def run(self) -> int:
    """Trains until the last step or a stop that all hosts agree on; returns the step saved."""
    config, trainer = self.config, self.trainer
    # All at once and ahead of time: evaluated step by step it would cost the loop 1%.
    schedule = jax.jit(jax.vmap(optim.make_schedule(config.optim, config.steps)))
    self._learning_rates = np.asarray(schedule(np.arange(config.steps)))
    self._signals = multihost.Signals(self.hosts, trainer.mesh)
    self._pending, self._bad_in_a_row, self._stopping = None, 0, False
    self._finished_at = time.perf_counter()
    self.stop.finish_step = True
    batches = Prefetcher(trainer.batches(self.start))
    with self.watchdog:
      for step in range(self.start + 1, config.steps + 1):
        asked = time.perf_counter()
        with self.ledger.phase("data"):
          batch = batches.next()
        waited = time.perf_counter() - asked
        index = gran.sample_index(config.seed, step, trainer.probabilities)
        self.profile.before(step)
        self.state, outputs = self.programs[index](self.state, batch)
        signals = self._signals.send(self.stop.requested, _draw_hash(step, index))
        self._report()  # of step - 1, while this one runs
        self._pending = _Pending(step, index, outputs, signals, waited)
        if self.samples:
          self.samples.write(step)
        results = None
        if not self._stopping and (_due(config.eval.every, step) or step == config.steps):
          results = self._evaluate(step)
        if _due(config.replica_check_every, step):
          self._check_replicas()
        if self._stopping or results or _due(config.checkpoint.every, step) or step == config.steps:
          self._save(step, results)
        self.profile.after(step)
        if self._stopping:
          break
    batches.close()
    return step

  def _report(self) -> None:
    """Waits for the pending step and records it."""
    if self._pending is None:
      return
    done, self._pending = self._pending, None
    outputs = jax.device_get(done.outputs)
    stopping = self._signals.read(done.signals, done.step)
    self._stopping = self.stop.requested if stopping is None else stopping
    now = time.perf_counter()
    finite = bool(outputs["finite"])
    name = self.trainer.names[done.index]
    self.log.step(
      done.step,
      name,
      float(outputs["loss"]),
      float(outputs["grad_norm"]),
      float(self._learning_rates[done.step - 1]),
      finite,
      now - self._finished_at,
      done.data_wait_s,
      _draw_hash(done.step, done.index),
    )
    self._finished_at = now
    self.watchdog.alive(f"step {done.step:,}")
    if _due(self.config.log_every, done.step):
      self.ledger.save()
    self.skipped += not finite
    self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1
    if self.config.max_nonfinite and self._bad_in_a_row >= self.config.max_nonfinite:
      raise UserError(
        f"diverged: loss or gradient was not finite for {self._bad_in_a_row} steps in a row, "
        f"last {name} at step {done.step}; nothing bad was saved. Lower optim.peak_lr="
        f"{self.config.optim.peak_lr:g} or set optim.clip_norm, then run again to resume"
      )

  def _evaluate(self, step: int) -> list[Result] | None:
    """Validation of every size; None if a stop was asked for meanwhile."""
    self._report()

    def should_stop() -> bool:
      self.watchdog.alive(f"evaluation after step {step:,}")
      self._stopping = self._signals.any(self.stop.requested)
      return self._stopping

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
    self._finished_at = time.perf_counter()
    return results

  def _check_replicas(self) -> None:
    try:
      replicas.check(self.state, self.trainer.mesh)
    except replicas.ReplicasDiffer as e:
      self.hosts.give_up(f"{e}; checkpoints saved before are intact")

  def _save(self, step: int, results: list[Result] | None) -> None:
    self._report()
    self.log.flush()
    with self.ledger.phase("checkpoint"):
      self._check_replicas()  # so that no checkpoint holds a flipped bit
      self.writer.save(
        step,
        self.state.params,
        self.state.opt_state,
        {"step": step},
        {"skipped": self.skipped},
        metric=results[-1].metrics["loss"] if results else None,
      )
    self.ledger.save()
    self.watchdog.alive(f"saving step {step:,}")
    self._finished_at = time.perf_counter()


def _due(every: int, step: int) -> bool:
  return bool(every) and step % every == 0


def _draw_hash(step: int, index: int) -> int:
  """What all hosts must agree on at a step, in 32 bits."""
  return zlib.crc32(f"{step}:{index}".encode())


class _StopSignal:
  """SIGTERM or Ctrl-C: leaves at once while setting up, after the current step once training.

  A second Ctrl-C interrupts for good.
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
    self.exit_code = 128 + signum  # 143 for SIGTERM, 130 for Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if self.finish_step:
      self.requested = True
    else:
      why = f"stopped by {self.name} before the first step"
      print(why, flush=True)
      self._hosts.leave(self.exit_code, why)  # compile threads cannot be interrupted


class _Profile:
  """Traces a range of steps with JAX's profiler."""

  def __init__(self, steps: range, workdir: pathlib.Path):
    self._steps, self._path = steps, workdir / "profile"

  def before(self, step: int) -> None:
    if step == self._steps.start:
      jax.profiler.start_trace(str(self._path))

  def after(self, step: int) -> None:
    if step == self._steps.stop - 1:
      jax.profiler.stop_trace()
      say(
        f"wrote a profile of steps {self._steps.start} to {step} to {self._path}; view it with "
        "TensorBoard's profile plug-in or xprof"
      )


class _SampleLog:
  """samples-<process>.jsonl: which samples every step trained on, as this process read them."""

  def __init__(self, workdir: pathlib.Path, start: int, trainer: Trainer, hosts: Hosts):
    self._trainer, self._rows = trainer, trainer.local_rows()
    self._file = metrics.JsonLines(workdir / f"samples-{hosts.index}.jsonl", start)

  def write(self, step: int) -> None:
    ids = {rows.start: self._trainer.task.sample_ids(step - 1, rows) for rows in self._rows}
    self._file.write({"step": step, "first_row_to_ids": ids})


# ------------------------------------------------------------------ setting up


def _start_from(config, workdir: pathlib.Path, old_card, hosts: Hosts):
  """The config with its model taken from `init_from`, where given; the tokenizer is copied."""
  if old_card is not None and "extracted" in old_card:
    raise UserError(
      f"--workdir={workdir} is an extracted model; to train it further give "
      f"--config.init_from={workdir} and another --workdir"
    )
  if not config.get("init_from"):
    return config
  card = old_card or checkpoint.read_card(config.init_from)
  if card["task"] != config.task:
    raise UserError(
      f"init_from={config.init_from!r} is of task {card['task']!r}, and this config "
      f"of {config.task!r}"
    )
  own = {key: config.model[key] for key in KINDS[config.task].adaptable}
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model = ml_collections.ConfigDict(card["model"] | own)
  tokenizer = pathlib.Path(config.init_from) / TOKENIZER_FILE
  if old_card is None and hosts.first and config.task == "matlm" and not config.data.tokenizer:
    shutil.copyfile(tokenizer, workdir / TOKENIZER_FILE)
  return config


def _initial_state(
  config, workdir: pathlib.Path, trainer: Trainer, hosts: Hosts
) -> tuple[TrainState, int, int]:
  """(state, steps done, updates skipped) of the newest checkpoint, or of a fresh start."""
  abstract = trainer.abstract_state
  found = checkpoint.restore_newest(
    workdir, {"params": abstract.params, "opt_state": abstract.opt_state}, True, hosts
  )
  if found is not None:
    restored, meta, _ = found
    say(f"resuming {workdir} at step {meta['step']:,}")
    return TrainState(restored["params"], restored["opt_state"]), meta["step"], meta["skipped"]
  state = trainer.init(config.seed)
  if config.get("init_from"):
    old = model_config(checkpoint.read_card(config.init_from))
    found = checkpoint.restore_newest(
      config.init_from, {"params": trainer.abstract_params(old)}, False, hosts
    )
    if found is None:
      raise UserError(
        f"init_from={config.init_from!r} holds no checkpoint that verifies; give the "
        "directory of a trained or extracted model"
      )
    say(f"starting from {config.init_from}, step {found[1]['step']:,}")
    adapt = functools.partial(
      models.adapt_params,
      config=old,
      new=trainer.task.model_config,
      keep_head=config.get("init_head", True),
    )
    places = jax.tree.map(lambda s: s.sharding, abstract.params)
    params = jax.jit(adapt, out_shardings=places)(found[0]["params"], state.params)
    state = TrainState(params, state.opt_state)
  return state, 0, 0


def _recover_tokenizer(workdir: pathlib.Path, card) -> None:
  """Moves a damaged tokenizer.model out of the way; it is remade from the corpus."""
  path = workdir / TOKENIZER_FILE
  wanted = card and card["identity"].get("tokenizer")
  if wanted and path.exists():
    if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
      checkpoint.set_aside(path)


def _check_shared(workdir: pathlib.Path, hosts: Hosts) -> None:
  """Raises UserError unless all hosts see the same workdir."""
  if hosts.count == 1:
    return
  token = workdir / f".shared-{hosts.gather(os.getpid())[0]}"
  if hosts.first:
    token.touch()
  hosts.barrier()
  seen = hosts.gather(token.exists())
  if hosts.first:
    token.unlink()
  if not all(seen):
    raise UserError(
      f"--workdir={workdir} is not one directory on all hosts: process "
      f"{seen.index(False)} does not see what process 0 wrote there; use a shared "
      "file system"
    )


def _check_config(config) -> None:
  for name in ("steps", "batch_size", "grad_accum", "log_every"):
    value = config[name]
    if not isinstance(value, int) or value < 1:
      raise UserError(f"{name}={value!r} must be a positive integer")
  if config.checkpoint.keep_last < 1:
    raise UserError(f"checkpoint.keep_last={config.checkpoint.keep_last} must be at least 1")
  if not isinstance(config.seed, int) or config.seed < 0:
    raise UserError(f"seed={config.seed!r} must be a non-negative integer")


def _say_what_is_trained(config, trainer: Trainer, counts, hosts: Hosts) -> None:
  sizes = "  ".join(f"{name} {c.params / 1e6:,.1f}M" for name, c in counts.items())
  warmup = optim.warmup_steps(config.optim, config.steps)
  if warmup < config.optim.warmup_steps:
    say(
      f"note: optim.warmup_steps={config.optim.warmup_steps} is not below steps="
      f"{config.steps}; warming up over {warmup}"
    )
  mesh, execution, task = trainer.mesh, trainer.execution, trainer.task
  processes = f" of {hosts.count} processes" if hosts.count > 1 else ""
  say(
    f"one universal model, parameters per granularity: {sizes}\n"
    f"{mesh.size} x {jax.devices()[0].device_kind}{processes}, mesh {dict(mesh.shape)}, "
    f"{execution.dtype}, remat {execution.remat}, "
    f"{task.examples_per_step:,} {task.examples_unit}/step"
  )


def _parse_profile(text: str | None) -> range:
  """'100:110' -> steps 100 to 109."""
  if not text:
    return range(0)
  first, _, last = text.partition(":")
  if not (first.isdecimal() and last.isdecimal() and 0 < int(first) < int(last)):
    raise UserError(f"--profile={text!r} is not FIRST:LAST, e.g. 100:110 for steps 100 to 109")
  return range(int(first), int(last))


def main(argv) -> int:
  cli.check(argv, workdir=_WORKDIR.value)
  config = cli.read_config(_CONFIG)
  hosts = multihost.join(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, config.peer_timeout_s
  )
  with hosts.together():
    code = train(config, _WORKDIR.value, hosts, _parse_profile(_PROFILE.value))
  return hosts.finish(code)


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run: checkpoints, metrics, tokenizer. An existing run is resumed.",
  )
  _COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0. Not needed on TPU slices, Slurm, Open MPI, or with one process.",
  )
  _NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes that train together.")
  _PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
  _PROFILE = flags.DEFINE_string("profile", None, "Trace these steps, e.g. 100:110.")
  flags.adopt_module_key_flags(cli)
  cli.run(main)
