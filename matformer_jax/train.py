"""Trains one universal model by sampling a granularity every step (Section 3.2).

  python -m matformer_jax.train --config=configs/matlm.py:quickstart --workdir=runs/quickstart

Running the same command again resumes bit-exactly. On a TPU slice, under Slurm's srun
and Open MPI's mpirun the processes find each other; elsewhere start one per machine
with --coordinator, --num_processes and --process_id.

Exit codes: 0 done; 1 an error to fix first (config, data, divergence, a workdir in use); 143
stopped by SIGTERM, 130 by Ctrl-C; 42 lost a peer or the workdir's bucket, hung or a hardware
fault: run the same command again.
"""

from __future__ import annotations

import functools
import os

from absl import flags
import jax
from jax.sharding import Mesh

from matformer_jax import cli, models, runtime, sharding, storage, tables
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import kind_of, model_config
from matformer_jax.config_keys import Config
from matformer_jax.data.tokenizer import (
  TOKENIZER_FILES,
  DamagedTokenizer,
  find_tokenizer,
  open_tokenizer,
)
from matformer_jax.errors import UserError, check_seed
from matformer_jax.hosts import goodput, lock, multihost
from matformer_jax.hosts.multihost import Hosts
from matformer_jax.hosts.watchdog import Watchdog
from matformer_jax.runtime import say
from matformer_jax.tasks import Task, make_task
from matformer_jax.training import distill, methods, metrics, optim
from matformer_jax.training.loop import Loop, SampleLog, StepProfile, StopSignal, evaluates_after
from matformer_jax.training.trainer import Trainer, TrainState

STARTED_OVER = "started_over"  # in the card: `start_over` was carried out
# The smallest value of the config's integers.
LEAST = {
  **{name: 1 for name in ("steps", "batch_size", "grad_accum", "log_every")},
  **{"eval.batch_size": 1, "checkpoint.keep_last": 1},
  **{name: 0 for name in ("max_nonfinite", "replica_check_every", "checkpoint.keep_best")},
  **{name: 0 for name in ("eval.every", "eval.batches", "checkpoint.every")},
}


def train(
  config: Config,
  workdir: str | os.PathLike,
  hosts: Hosts = Hosts(),
  profile: range = range(0),
  start_over: bool = False,
) -> int:
  """Trains or resumes; returns the exit code.

  Args:
    config: as `get_config` returns it.
    workdir: gets config.json, the tokenizer's files, checkpoints/, metrics.jsonl,
      eval.jsonl, goodput.json, tensorboard/; train.lock while it is in use. With several
      hosts, a directory they share.
    hosts: the processes that train together.
    profile: steps to trace with JAX's profiler, into profile/.
    start_over: begin at step 0, once: the run in the workdir is moved to
      checkpoints_damaged/run.

  Raises:
    UserError: for a mistake in the config, corpus or workdir, divergence, a workdir that
      another training is using, or one whose checkpoints cannot be restored.
  """
  workdir = checkpoint.check_place(workdir)
  stop = StopSignal(hosts)
  runtime.enable_compilation_cache()
  _check_config(config)
  if profile and profile.start > config.steps:
    raise UserError(
      f"--profile begins at step {profile.start}, after the last of steps={config.steps}"
    )
  if not workdir.exists():
    cards.with_model_of_init(config)  # a mistake there leaves no directory behind
  workdir.mkdir(parents=True, exist_ok=True)
  with lock.hold(workdir, hosts, lost_s=config.storage_timeout_s):
    try:
      if start_over:
        _start_over(config, workdir, hosts)
      return _train(config, workdir, hosts, stop, profile, start_over)
    except Exception as e:
      if storage.is_outage(e):
        why = f"{storage.refusal(e) if storage.is_refusal(e) else e}"
        runtime.say_here(f"error: {why}")
        hosts.leave(multihost.EXIT_RETRY, why)
      raise


def _train(
  config: Config,
  workdir: storage.Path,
  hosts: Hosts,
  stop: StopSignal,
  profile: range,
  start_over: bool,
) -> int:
  old_card = cards.read_existing(workdir)
  if hosts.first:
    _recover_tokenizer(workdir, old_card)
  config = _start_from(config, workdir, old_card)
  if hosts.first:
    _copy_files(config, workdir, old_card)
  if old_card is not None:
    cards.check_model(workdir, old_card, config)
  _check_shared(workdir, hosts)
  task, mesh = _task_on_mesh(config, workdir)
  trainer = Trainer(task, config, mesh)
  parent, fingerprint = trainer.load_parent(hosts)
  distillation = trainer.distillation
  identity = distillation.identity(fingerprint) if distillation else None
  card = cards.make_card(config, task, identity)
  if start_over or (old_card or {}).get(STARTED_OVER):
    card[STARTED_OVER] = True
  if old_card is None and config.get("init_from"):
    _check_tokenizer(config, card)
  if hosts.count > 1:
    hosts.check_equal(cards.host_facts(card))
  if old_card is not None:
    cards.check_same_run(workdir, old_card, card)
  state, start, skipped = _initial_state(config, workdir, trainer, hosts, old_card)
  if hosts.first:
    cards.write(workdir, card)
    task.save_files(workdir)
  counts = {name: gran.count(task.model_config, name) for name in trainer.names}
  _say_what_is_trained(config, trainer, counts, hosts)
  writer = checkpoint.Writer(
    workdir, config.checkpoint.keep_last, config.checkpoint.keep_best, card
  )
  owes_evaluation = _owes_evaluation(config, workdir, start, hosts)
  if start >= config.steps and not owes_evaluation:
    say(f"nothing to do: {workdir} is at step {start:,} of {config.steps:,}")
    writer.close()
    return 0
  staging = storage.Staging(workdir)
  log = metrics.RunLog(
    staging=staging if hosts.first else None,
    step=start,
    total_steps=config.steps,
    every=config.log_every,
    examples_per_step=task.examples_per_step,
    unit=task.examples_unit,
    rate=task.rate,
    granularities=trainer.names,
    flops={kind.name: trainer.step_flops(kind) for kind in trainer.kinds},
    peak_flops=metrics.peak_flops(mesh),
  )
  ledger = goodput.Ledger(workdir / goodput.GOODPUT_FILE if hosts.first else None, log.lost_s)
  ledger.enter("compile")
  programs = trainer.compile() if start < config.steps else {}
  ledger.enter("step")
  loop = Loop(
    config=config,
    trainer=trainer,
    programs=programs,
    hosts=hosts,
    stop=stop,
    writer=writer,
    log=log,
    ledger=ledger,
    watchdog=Watchdog(config.hang_timeout_s, hosts),
    staging=staging,
    profile=StepProfile(profile, staging),
    samples=SampleLog(staging, start, trainer, hosts) if config.data.log_samples else None,
    state=state,
    start=start,
    skipped=skipped,
    parent=parent,
    owes_evaluation=owes_evaluation,
  )
  try:
    stopped_at = loop.run()
  except Exception as e:
    if not multihost.is_failure_of_peers(e):
      writer.wait()  # for what is being saved
      log.close()
      with storage.refusals_ignored():  # which may be what has failed
        staging.sync()
    raise
  ledger.enter("checkpoint")
  writer.close()
  log.close()
  staging.sync()
  ledger.save()
  say(ledger.report())
  if loop.stopped:
    say(f"stopped by {stop.name}; saved step {stopped_at:,}. Run the same command to resume")
    return stop.exit_code
  say(f"done: {config.steps:,} steps in {workdir}")
  return 0


# ------------------------------------------------------------------ setting up


def _task_on_mesh(config: Config, workdir: storage.Path | None) -> tuple[Task, Mesh]:
  """The task with its data, and the mesh. Raises UserError where they do not go together."""
  mesh = sharding.make_mesh(config.mesh)
  task = make_task(config, workdir)
  sharding.check_model_fits_mesh(task.model_config, mesh)
  methods.check_batch(config, task.model_config, mesh)
  sharding.check_batch(config.eval.batch_size, 1, mesh, "eval.batch_size")
  distill.check_parent(config, task, mesh)
  return task, mesh


def _start_from(config: Config, workdir: storage.Path, old_card) -> Config:
  """The config with its model taken from `init_from`, where given."""
  made = next((how for how in ("extracted", "imported") if old_card and how in old_card), None)
  if made:
    raise UserError(
      f"--workdir={workdir} is an {made} model; to train it further give "
      f"--config.init_from={workdir} and another --workdir"
    )
  return cards.with_model_of_init(config, old_card)


def _copy_files(config: Config, workdir: storage.Path, old_card) -> None:
  """Takes over what `init_from` holds beside its weights, such as a tokenizer."""
  if config.get("init_from") and cards.keeps_head(config) and not config.data.get("tokenizer"):
    for name in kind_of(config).resolve("objective").files:
      source = storage.path(config.init_from) / name
      if old_card is None:  # what is there is of an attempt that failed, perhaps with another model
        (workdir / name).unlink(missing_ok=True)
      if source.exists() and not (workdir / name).exists():
        storage.copy_file(source, workdir / name)


def _check_tokenizer(config: Config, card) -> None:
  """Raises UserError where the trained embedding's rows would mean other tokens."""
  theirs = cards.read(config.init_from)["identity"].get("tokenizer")
  ours = card["identity"].get("tokenizer")
  if cards.keeps_head(config) and ours != theirs:
    source = config.data.tokenizer or config.data.source
    raise UserError(
      f"init_from={config.init_from!r} was trained with another tokenizer ({theirs[:12]}) than "
      f"the data's ({ours[:12]}, of {source!r}), so its embedding would mean other tokens; use "
      "that model's tokenizer, or start the embedding afresh: --config.init_head=False"
    )


def _start_over(config: Config, workdir: storage.Path, hosts: Hosts) -> None:
  """Moves what a run has written out of the way, once; nothing is deleted.

  A job that is restarted repeats its command, flags included, and must resume what it began.
  """
  card = cards.read_existing(workdir)
  if card is not None and card.get(STARTED_OVER):
    say(f"note: {workdir} was started over before, and is resumed now; --start_over works once")
    return
  fresh = cards.with_model_of_init(config)
  if fresh.get("init_from") and cards.keeps_head(fresh) and hasattr(fresh.data, "tokenizer"):
    with fresh.unlocked():
      fresh.data.tokenizer = fresh.data.tokenizer or str(fresh.init_from)
  _task_on_mesh(fresh, None)  # so that nothing is moved for a command that cannot run
  hosts.barrier()
  if hosts.first:
    aside = checkpoint.set_run_aside(workdir, but=lock.LOCK_FILE)
    if aside is not None:
      say(f"set the run of {workdir} aside as {aside}")
  hosts.barrier()


def _initial_state(
  config, workdir: storage.Path, trainer: Trainer, hosts: Hosts, old_card
) -> tuple[TrainState, int, int]:
  """(state, steps done, updates skipped) of the newest checkpoint, or of a fresh start."""
  abstract = trainer.abstract_state
  items = {"params": abstract.params, "opt_state": abstract.opt_state}
  try:
    found = checkpoint.restore_newest(workdir, items, True, hosts)
  except checkpoint.OtherCheckpoint as e:
    changed = cards.changed_keys(old_card, config, "optim") if old_card else []
    what = f": {'; '.join(changed)}" if changed else f" ({e})"
    raise UserError(
      f"--workdir={workdir} cannot be resumed with another optimizer{what}. Set it back, or start "
      f"from these weights in another --workdir: --config.init_from={workdir}"
    ) from e
  except checkpoint.NothingRestored as e:
    raise UserError(f"{e}. To begin again at step 0 and keep them aside, add --start_over") from e
  if found is not None:
    restored, meta, _ = found
    say(f"resuming {workdir} at step {meta['step']:,}")
    return TrainState(restored["params"], restored["opt_state"]), meta["step"], meta["skipped"]
  state = trainer.init(config.seed)
  if config.get("init_from"):
    old = model_config(cards.read(config.init_from))
    found = checkpoint.restore_newest(
      config.init_from, {"params": trainer.abstract_params(old)}, False, hosts
    )
    if found is None:
      raise UserError(
        f"init_from={config.init_from!r} holds no checkpoint; give the directory of a trained or "
        "extracted model"
      )
    say(f"starting from {config.init_from}, step {found[1]['step']:,}")
    adapt = functools.partial(
      models.adapt_params,
      config=old,
      new=trainer.task.model_config,
      keep_head=cards.keeps_head(config),
    )
    places = jax.tree.map(lambda s: s.sharding, abstract.params)
    params = jax.jit(adapt, out_shardings=places)(found[0]["params"], state.params)
    state = TrainState(params, state.opt_state)
  return state, 0, 0


def _owes_evaluation(config: Config, workdir: storage.Path, start: int, hosts: Hosts) -> bool:
  """Whether the run was stopped after step `start` and before its evaluation."""
  if not start or not evaluates_after(config, start):
    return False
  rows = metrics.read_jsonl(workdir / "eval.jsonl") if hosts.first else ()
  return not hosts.gather(any(row.get("step") == start for row in rows))[0]


def _recover_tokenizer(workdir: storage.Path, card) -> None:
  """Moves a damaged tokenizer's files out of the way; it is remade, or taken from its source."""
  wanted = card and card["identity"].get("tokenizer")
  if not wanted or not find_tokenizer(workdir):
    return
  try:
    damaged = open_tokenizer(workdir).sha256 != wanted
  except DamagedTokenizer:
    damaged = True
  if damaged:
    for path in (workdir / name for name in TOKENIZER_FILES):
      if path.exists():
        checkpoint.set_aside(path)


def _check_shared(workdir: storage.Path, hosts: Hosts) -> None:
  """Raises UserError unless all hosts see the same workdir."""
  if hosts.count == 1:
    return
  token = workdir / f".shared-{hosts.gather(os.getpid())[0]}"
  if hosts.first:
    storage.replace_file(token, b"")
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


def _check_config(config: Config) -> None:
  for name, least in LEAST.items():
    value = functools.reduce(getattr, name.split("."), config)
    if not isinstance(value, int) or value < least:
      raise UserError(f"{name}={value!r} must be an integer of at least {least}")
  check_seed(config.seed, "seed")
  distill.check(config)


def _say_what_is_trained(config: Config, trainer: Trainer, counts, hosts: Hosts) -> None:
  sizes = "  ".join(f"{name} {tables.si(c.params)}" for name, c in counts.items())
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
    f"{mesh.size} x {jax.devices()[0].device_kind}{processes}, mesh {sharding.sizes(mesh)}, "
    f"{execution.dtype}, remat {execution.remat}, "
    f"{task.examples_per_step:,} {task.examples_unit}/step\n{trainer.budget()}"
  )
  distillation = trainer.distillation
  if distillation is not None:
    say(
      f"distilling from {distillation.parent or trainer.names[-1] + ' of the same weights'}, "
      f"weight {distillation.weight:g}, temperature {distillation.temperature:g}"
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
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  config = cli.read_config(_CONFIG)
  hosts = multihost.join(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, config.peer_timeout_s
  )
  with hosts.together():
    code = train(config, workdir, hosts, _parse_profile(_PROFILE.value), _START_OVER.value)
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
  _START_OVER = flags.DEFINE_bool(
    "start_over",
    False,
    "Begin at step 0 in a --workdir that holds a run, which is moved to "
    "checkpoints_damaged/run. Works once: a restarted job resumes.",
  )
  _PROFILE = flags.DEFINE_string("profile", None, "Trace these steps, e.g. 100:110.")
  flags.adopt_module_key_flags(cli)
  cli.run(main)
