"""Trains one universal model by sampling a granularity every step (Section 3.2).

  python -m matformer_jax.train --config=configs/matlm.py:quickstart --workdir=runs/quickstart

Running the same command again resumes bit-exactly. Exit codes: 0 done, 1 an error
to fix, 143 stopped by SIGTERM or 130 by Ctrl-C after saving (run again to go on).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from importlib import metadata
from typing import Any, Callable

from absl import flags
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from matformer_jax import checkpoint, cli, metrics, optim, runtime, sharding
from matformer_jax import granularity as gran
from matformer_jax.config import Execution, ModelConfig
from matformer_jax.data.tokenizer import TOKENIZER_FILE
from matformer_jax.errors import UserError
from matformer_jax.tasks import Task, make_task

VERSIONED = ("matformer_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
             "numpy", "sentencepiece")
# Changing these in the course of a run would not be the same run any more.
FIXED = ("task", "model", "seed", "batch_size", "sampling", "identity", "optimizer")


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=("params", "opt_state"), meta_fields=())
@dataclasses.dataclass
class TrainState:
  """Universal parameters and optimizer state; the step is the loop's."""

  params: Any
  opt_state: Any


# ------------------------------------------------------------------ the step


def make_train_step(task: Task, execution: Execution, optimizer: optax.GradientTransformation,
                    granularity: gran.Granularity, grad_accum: int = 1):
  """The update of one granularity: (state, batch) -> (state, metrics).

  The gradient is taken, and accumulated over `grad_accum` micro-batches, on the
  sliced tree; slicing's transpose pads it with exact zeros, and the optimizer is
  applied to the full tree. Where loss or gradient is not finite, parameters and
  optimizer state are returned unchanged, bit for bit.
  """
  sub_config = gran.submodel_config(task.model_config, granularity)
  shards = sharding.batch_shards(execution.mesh)
  loss_fn = functools.partial(task.loss, sub_config, execution, shards=shards)
  gradient = jax.value_and_grad(lambda sub, batch: loss_fn(sub, batch), has_aux=True)

  def train_step(state: TrainState, batch: jax.Array):
    slice_ = functools.partial(task.slice, granularity=granularity)
    sub_params, unslice = jax.vjp(slice_, state.params)
    if grad_accum == 1:
      (_, loss), sub_grads = gradient(sub_params, batch)
    else:
      loss, sub_grads = _accumulate(gradient, sub_params, batch, grad_accum)
    grad_norm = optax.tree.norm(sub_grads)
    (grads,) = unslice(sub_grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = TrainState(optax.apply_updates(state.params, updates), opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return state, {"loss": loss, "grad_norm": grad_norm, "finite": finite}

  return train_step


def _accumulate(gradient, params, batch, parts: int):
  """Mean loss and gradient over `parts` micro-batches, each spread over all batch shards."""
  micro = batch.reshape((batch.shape[0] // parts, parts) + batch.shape[1:]).swapaxes(0, 1)

  def add(sums, micro_batch):
    (_, loss), grads = gradient(params, micro_batch)
    return jax.tree.map(jnp.add, sums, (loss, grads)), None

  zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  sums, _ = jax.lax.scan(add, zeros, micro)
  return jax.tree.map(lambda x: x / parts, sums)


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A task on a mesh: shapes, shardings and compiled steps."""

  task: Task
  config: Any
  mesh: jax.sharding.Mesh

  @functools.cached_property
  def execution(self) -> Execution:
    return Execution.for_platform(self.mesh.devices.flat[0].platform, self.mesh,
                                  self.config.dtype, self.config.remat)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    return optim.make_optimizer(self.config.optim, self.config.steps)

  @functools.cached_property
  def granularities(self) -> list[gran.Granularity]:
    return gran.uniform(self.task.model_config)

  @functools.cached_property
  def probabilities(self) -> tuple[float, ...]:
    """One per granularity; a model that stores fewer than g gives its last the rest."""
    p = gran.sampling_probabilities(self.config.sampling, self.task.model_config)
    last = len(self.granularities) - 1
    return p[:last] + (sum(p[last:]),)

  @functools.cached_property
  def names(self) -> list[str]:
    """Text of the granularities."""
    return [gran.to_text(g, self.task.model_config) for g in self.granularities]

  def _init(self, rng) -> TrainState:
    params = self.task.init(rng)
    return TrainState(params, self.optimizer.init(params))

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(self._init, jax.random.key(0))
    shardings = TrainState(
        sharding.param_shardings(shapes.params, self.mesh),
        sharding.state_shardings(shapes.opt_state, shapes.params, self.mesh))
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
                        shapes, shardings)

  @property
  def _state_shardings(self):
    return jax.tree.map(lambda s: s.sharding, self.abstract_state)

  def init(self, seed: int) -> TrainState:
    """A fresh state; its values do not depend on the mesh."""
    return jax.jit(self._init, out_shardings=self._state_shardings)(jax.random.key(seed))

  def put(self, batch: np.ndarray) -> jax.Array:
    """This process's rows as a global array sharded over the batch axes."""
    return jax.make_array_from_process_local_data(sharding.batch_sharding(self.mesh), batch)

  def lower(self, granularity: gran.Granularity):
    """The jitted step of a granularity, lowered for the shapes of this run."""
    step = make_train_step(self.task, self.execution, self.optimizer, granularity,
                           self.config.grad_accum)
    replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0,
                     out_shardings=(self._state_shardings, replicated))
    rows = (self.config.batch_size, self.task.model_config.seq_len + 1)
    batch = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=sharding.batch_sharding(self.mesh))
    return jitted.lower(self.abstract_state, batch)

  def compile(self) -> dict[int, Callable]:
    """Compiles the step of every granularity that is sampled, in parallel."""
    wanted = [i for i, p in enumerate(self.probabilities) if p > 0]
    started = time.perf_counter()
    programs = {}
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
      futures = {pool.submit(lambda i=i: self.lower(self.granularities[i]).compile()): i
                 for i in wanted}
      while len(programs) < len(wanted):
        # A bounded wait lets signal handlers run on the main thread.
        done, _ = concurrent.futures.wait(futures, 0.2, concurrent.futures.FIRST_COMPLETED)
        for future in done:
          index = futures.pop(future)
          programs[index] = future.result()
          print(f"compiled {self.names[index]} ({len(programs)}/{len(wanted)}) after "
                f"{time.perf_counter() - started:.1f} s", flush=True)
    return programs


# ------------------------------------------------------------------ the loop


def train(config, workdir: str | os.PathLike) -> int:
  """Trains or resumes; returns the exit code.

  Args:
    config: an `ml_collections.ConfigDict`, see configs/matlm.py.
    workdir: gets config.json, tokenizer.model, checkpoints/, metrics.jsonl,
      eval.jsonl, tensorboard/.

  Raises:
    UserError: for a mistake in the config, corpus or workdir, or divergence.
  """
  workdir = pathlib.Path(workdir)
  stop = _StopSignal()
  runtime.enable_compilation_cache()
  _check_config(config)
  workdir.mkdir(parents=True, exist_ok=True)
  old_card = _read_card(workdir)
  config = _start_from(config, workdir, old_card)
  _check_fixed(workdir, old_card, config)
  _recover_tokenizer(workdir, old_card)
  task = make_task(config, workdir)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_model_fits_mesh(task.model_config, mesh)
  _check_batch(config, mesh)
  trainer = Trainer(task, config, mesh)
  probabilities = trainer.probabilities
  card = make_card(config, task)
  if old_card is not None:
    _check_same_run(workdir, old_card, card)

  items = {"params": trainer.abstract_state.params, "opt_state": trainer.abstract_state.opt_state}
  found = checkpoint.restore_newest(workdir, items, repair=True)
  if found is None:
    start, skipped, state = 0, 0, trainer.init(config.seed)
    if config.get("init_from"):
      state = _initial_params(config.init_from, trainer, state)
  else:
    restored, meta, _ = found
    start, skipped = meta["step"], meta["skipped"]
    state = TrainState(restored["params"], restored["opt_state"])
    print(f"resuming {workdir} at step {start:,}", flush=True)
  _write_atomically(workdir / checkpoint.CARD_FILE, json.dumps(card, indent=1))
  task.save_files(workdir)
  names = trainer.names
  counts = {name: gran.count(task.model_config, name) for name in names}
  _say_what_is_trained(config, task, counts, mesh, trainer.execution)
  writer = checkpoint.Writer(workdir, config.checkpoint.keep_last, config.checkpoint.keep_best,
                             card)
  if start >= config.steps:
    print(f"nothing to do: {workdir} is at step {start:,} of {config.steps:,}", flush=True)
    writer.close()
    return 0

  programs = trainer.compile()
  peak = metrics.PEAK_FLOPS.get(jax.devices()[0].device_kind)
  log = metrics.RunLog(
      workdir, start, config.steps, config.log_every, task.examples_per_step, task.examples_unit,
      {n: c.train_flops_per_token * task.examples_per_step for n, c in counts.items()},
      peak * mesh.size if peak else None)
  # All at once and ahead of time: evaluated step by step it would cost the loop 1%.
  schedule = jax.jit(jax.vmap(optim.make_schedule(config.optim, config.steps)))
  learning_rates = np.asarray(schedule(np.arange(config.steps)))
  bad_in_a_row = 0
  finished_at = time.perf_counter()
  pending = None

  def report() -> None:
    """Waits for the pending step and records it."""
    nonlocal pending, bad_in_a_row, skipped, finished_at
    if pending is None:
      return
    step, index, outputs = pending
    pending = None
    outputs = jax.device_get(outputs)
    now = time.perf_counter()
    finite = bool(outputs["finite"])
    log.step(step, names[index], float(outputs["loss"]), float(outputs["grad_norm"]),
             float(learning_rates[step - 1]), finite, now - finished_at)
    finished_at = now
    skipped += not finite
    bad_in_a_row = 0 if finite else bad_in_a_row + 1
    if config.max_nonfinite and bad_in_a_row >= config.max_nonfinite:
      raise UserError(
          f"diverged: loss or gradient was not finite for {bad_in_a_row} steps in a row, last "
          f"{names[index]} at step {step}; nothing bad was saved. Lower optim.peak_lr="
          f"{config.optim.peak_lr:g} or set optim.clip_norm, then run again to resume")

  def save(step: int, losses: dict[str, float] | None = None) -> None:
    nonlocal finished_at
    report()
    log.flush()
    writer.save(step, state.params, state.opt_state, {"step": step}, {"skipped": skipped},
                metric=losses[names[-1]] if losses else None)
    finished_at = time.perf_counter()

  stop.finish_step = True
  next_batch = trainer.put(task.batch(start))
  for step in range(start + 1, config.steps + 1):
    index = gran.sample_index(config.seed, step, probabilities)
    state, outputs = programs[index](state, next_batch)
    if step < config.steps:
      next_batch = trainer.put(task.batch(step))
    report()  # of step - 1, while this one runs
    pending = (step, index, outputs)
    due = lambda every: every and step % every == 0
    losses = None
    if not stop.requested and (due(config.eval.every) or step == config.steps):
      report()
      losses = task.evaluate(trainer.execution, state.params, trainer.put, lambda: stop.requested)
      finished_at = time.perf_counter()
      if losses is not None:
        log.evaluation(step, losses)
    if stop.requested or losses or due(config.checkpoint.every) or step == config.steps:
      save(step, losses)
    if stop.requested:
      break
  writer.close()
  log.close()
  if stop.requested and step < config.steps:
    print(f"stopped by {stop.name}; saved step {step:,}. Run the same command to resume", flush=True)
    return stop.exit_code
  print(f"done: {config.steps:,} steps in {workdir}", flush=True)
  return 0


class _StopSignal:
  """SIGTERM or Ctrl-C: leaves at once while setting up, after the current step once training.

  A second Ctrl-C interrupts for good.
  """

  def __init__(self):
    self.requested = False
    self.finish_step = False
    self.name, self.exit_code = "", 0
    for signum in (signal.SIGTERM, signal.SIGINT):
      signal.signal(signum, self._handle)

  def _handle(self, signum, frame):
    self.name = signal.Signals(signum).name
    self.exit_code = 128 + signum  # 143 for SIGTERM, 130 for Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if self.finish_step:
      self.requested = True
    else:
      print(f"stopped by {self.name} before the first step", flush=True)
      os._exit(self.exit_code)  # compile threads cannot be interrupted


# ------------------------------------------------------------------ the card


def make_card(config, task: Task) -> dict[str, Any]:
  """What config.json stores: everything needed to rebuild the model, and how it was made."""
  return {
      "format": checkpoint.FORMAT,
      "task": config.task,
      "model": task.model_config.to_dict(),
      "seed": config.seed,
      "batch_size": config.batch_size,
      "sampling": list(gran.sampling_probabilities(config.sampling, task.model_config)),
      "optimizer": config.optim.name,
      "identity": dict(task.identity()),
      "config": json.loads(config.to_json_best_effort()),
      "versions": {name: metadata.version(name) for name in VERSIONED},
      "python": sys.version.split()[0],
  }


def _read_card(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The card of a run to resume; None in a fresh directory."""
  try:
    return checkpoint.read_card(workdir)
  except UserError as e:
    if (workdir / checkpoint.CARD_FILE).exists():
      print(f"warning: {e}; writing it anew", flush=True)
    return None


def _start_from(config, workdir: pathlib.Path, old_card):
  """The config with its model taken from `init_from`, where given; the tokenizer is copied."""
  if old_card is not None and "extracted" in old_card:
    raise UserError(f"--workdir={workdir} is an extracted model; to train it further give "
                    f"--config.init_from={workdir} and another --workdir")
  if not config.get("init_from"):
    return config
  card = old_card or checkpoint.read_card(config.init_from)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model = ml_collections.ConfigDict(card["model"])
  if old_card is None and not config.data.tokenizer:
    shutil.copyfile(pathlib.Path(config.init_from) / TOKENIZER_FILE, workdir / TOKENIZER_FILE)
  return config


def _initial_params(init_from: str, trainer: Trainer, state: TrainState) -> TrainState:
  found = checkpoint.restore_newest(init_from, {"params": trainer.abstract_state.params},
                                    repair=False)
  if found is None:
    raise UserError(f"init_from={init_from!r} holds no checkpoint that verifies; give the directory "
                    "of a trained or extracted model")
  print(f"starting from {init_from}, step {found[1]['step']:,}", flush=True)
  return TrainState(found[0]["params"], state.opt_state)


def _differences(old: Any, new: Any, path: str) -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    return [d for key in sorted(old.keys() | new.keys())
            for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
  return [] if old == new else [f"{path} is {old!r} there and {new!r} here"]


def _check_fixed(workdir: pathlib.Path, old_card, config) -> None:
  """Compares what is known before any data is read, so that a wrong workdir fails fast."""
  if old_card is None:
    return
  new = json.loads(json.dumps(ModelConfig.from_dict(config.model).to_dict()))
  _raise_if_different(workdir, {"model": old_card["model"]}, {"model": new})


def _check_same_run(workdir: pathlib.Path, old_card, new_card) -> None:
  new_card = json.loads(json.dumps(new_card))
  _raise_if_different(workdir, {k: old_card[k] for k in FIXED}, {k: new_card[k] for k in FIXED})
  changed = _differences(old_card["config"], new_card["config"], "")
  if changed:
    print(f"note: resuming with a changed config: {'; '.join(changed)}", flush=True)


def _raise_if_different(workdir, old, new) -> None:
  changed = _differences(old, new, "")
  if changed:
    raise UserError(f"--workdir={workdir} holds another run: {'; '.join(changed)}. Use another "
                    "--workdir, or that run's config")


def _recover_tokenizer(workdir: pathlib.Path, card) -> None:
  """Moves a damaged tokenizer.model out of the way; it is remade from the corpus."""
  path = workdir / TOKENIZER_FILE
  wanted = card and card["identity"].get("tokenizer")
  if wanted and path.exists():
    if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
      checkpoint.set_aside(path)


def _write_atomically(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
  temporary.write_text(text)
  temporary.rename(path)


# ----------------------------------------------------------------- checks


def _check_config(config) -> None:
  for name in ("steps", "batch_size", "grad_accum", "log_every"):
    value = config[name]
    if not isinstance(value, int) or value < 1:
      raise UserError(f"{name}={value!r} must be a positive integer")
  if config.checkpoint.keep_last < 1:
    raise UserError(f"checkpoint.keep_last={config.checkpoint.keep_last} must be at least 1")
  if not isinstance(config.seed, int) or config.seed < 0:
    raise UserError(f"seed={config.seed!r} must be a non-negative integer")


def _check_batch(config, mesh) -> None:
  shards = sharding.batch_shards(mesh)
  for name, value in (("batch_size", config.batch_size), ("eval.batch_size", config.eval.batch_size)):
    parts = config.grad_accum if name == "batch_size" else 1
    if value % (shards * parts):
      raise UserError(
          f"{name}={value} is not divisible by {shards} batch shards (mesh data x fsdp)"
          + (f" x grad_accum={parts}" if parts > 1 else "")
          + f"; use a multiple of {shards * parts}")


def _say_what_is_trained(config, task, counts, mesh, execution) -> None:
  sizes = "  ".join(f"{name} {c.params / 1e6:,.1f}M" for name, c in counts.items())
  device = jax.devices()[0]
  warmup = optim.warmup_steps(config.optim, config.steps)
  if warmup < config.optim.warmup_steps:
    print(f"note: optim.warmup_steps={config.optim.warmup_steps} is not below steps="
          f"{config.steps}; warming up over {warmup}", flush=True)
  print(f"one universal model, parameters per granularity: {sizes}\n"
        f"{mesh.size} x {device.device_kind}, mesh {dict(mesh.shape)}, {execution.dtype}, "
        f"remat {execution.remat}, {task.examples_per_step:,} {task.examples_unit}/step",
        flush=True)


def main(argv) -> int:
  cli.check(argv, workdir=_WORKDIR.value)
  return train(cli.read_config(_CONFIG), _WORKDIR.value)


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, "
                                 "tokenizer. An existing run is resumed.")
  flags.adopt_module_key_flags(cli)
  cli.run(main)
