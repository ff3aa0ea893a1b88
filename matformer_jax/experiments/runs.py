"""The models that experiments compare: what each is trained on, and training many of them.

A run is a `matformer train` command, and its directory says whether it was carried out. Several
are trained at a time, each on a processor of its own: a small model's step is hardly faster on
two.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shlex
import signal
import time
from typing import Any

from matformer_jax import config_files, runtime
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import MatLMConfig, ModelConfig, model_config
from matformer_jax.config_keys import Config
from matformer_jax.errors import Diverged, UserError
from matformer_jax.training import distill, methods, metrics

FLOPS_PER_S = 2e10  # of a processor that trains a small model, until a run here has been timed
OVERHEAD_S = 10  # of a run: compiling, opening the data, a checkpoint
LOG = ".log"  # after the name of a run: what its training said
POLL_S = 1.0
STATUS_EVERY_S = 60.0


@dataclasses.dataclass(frozen=True)
class Run:
  """A model to train.

  Attributes:
    name: of its directory, below that of all runs.
    spec: of its config, e.g. matlm:tiny.
    changes: keys of the config, such as "optim.peak_lr", with their values.
    method: of its training, as families.py names it.
  """

  name: str
  spec: str
  changes: tuple[tuple[str, Any], ...]
  method: str

  @functools.cached_property
  def config(self) -> Config:
    """The whole config. Raises UserError or KeyError for one that does not exist."""
    return changed(self.spec, dict(self.changes))

  @functools.cached_property
  def model(self) -> ModelConfig:
    """What is trained."""
    return model_config(self.config)

  @property
  def key(self) -> str:
    """Its name as part of a file's."""
    return self.name.replace("/", "-")

  @property
  def examples(self) -> int:
    """Tokens or images that it is trained on."""
    length = self.model.seq_len if isinstance(self.model, MatLMConfig) else 1
    return self.config.steps * self.config.batch_size * length

  @property
  def flops(self) -> float:
    """That its training takes, a teacher's forward passes included."""
    model = self.model
    sizes = gran.trained(model)
    probabilities = methods.size_probabilities(self.config, model)
    teacher = distill.from_config(self.config, model)
    extra = lambda g: teacher.flops(g, model.num_tokens) if teacher else 0
    cost = lambda g: gran.count(model, g).train_flops + extra(g)
    kinds = methods.step_kinds(self.config, self.model)
    return self.examples * sum(
      kind.probability * methods.mean_cost(kind, sizes, probabilities, cost) for kind in kinds
    )

  def but(self, name: str, changes: Mapping[str, Any]) -> Run:
    """Another run, which differs by that."""
    return dataclasses.replace(
      self, name=name, changes=tuple({**dict(self.changes), **changes}.items())
    )

  def command(self, root: pathlib.Path) -> str:
    """What trains it on any machine, e.g. a pod."""
    flags = [f"--config.{key}={value}" for key, value in self.changes]
    return shlex.join(
      ["matformer", "train", f"--config={self.spec}", f"--workdir={root / self.name}", *flags]
    )

  def is_done(self, root: pathlib.Path) -> bool:
    """Whether a directory holds it, trained to the end.

    Raises:
      UserError: if it holds another run of this name.
    """
    card = cards.read_existing(root / self.name)
    if card is None:
      return False
    theirs = flat(card["config"])
    different = [key for key, value in self.changes if theirs.get(key) != _as_json(value)]
    if different:
      raise UserError(
        f"{root / self.name} was trained with another config ({', '.join(different)} differ); "
        "give another --out, or remove that directory to train it again"
      )
    steps = checkpoint.steps(root / self.name)
    evaluated = metrics.read_jsonl(root / self.name / "eval.jsonl")
    return bool(steps) and steps[-1] >= self.config.steps and bool(evaluated)

  def divergence(self, root: pathlib.Path) -> pathlib.Path:
    """A file that is there once its training was given up, as losses were not finite."""
    return root / self.name / "diverged.txt"


def changed(spec: str, changes: Mapping[str, Any]) -> Config:
  """A row of a config file, with other values for some keys. Raises as `Run.config`."""
  config = config_files.get_config(spec)
  config.update_from_flattened_dict(dict(changes))
  return config


def seconds(run: Run, root: pathlib.Path) -> float:
  """That a finished run took, over all restarts, from its first compilation."""
  ledger = root / run.name / "goodput.json"
  spent = json.loads(ledger.read_text()) if ledger.exists() else []  # one that diverged at once
  idle = ("down", "start-up")  # a process that trains several runs was started for the first one
  return sum(s for attempt in spent for phase, s in attempt["seconds"].items() if phase not in idle)


@dataclasses.dataclass(frozen=True)
class Pool:
  """Where runs are trained, and how many at a time.

  Attributes:
    root: their directories' parent.
    jobs: at a time; with several, each on its share of the processors.
  """

  root: pathlib.Path
  jobs: int

  def missing(self, runs: Sequence[Run], may_diverge: bool = False) -> list[Run]:
    """Those that are not done, once each, in order; without those that diverged, if they may."""
    given_up = lambda run: may_diverge and run.divergence(self.root).exists()
    return [r for r in dict.fromkeys(runs) if not r.is_done(self.root) and not given_up(r)]

  def estimate_s(self, runs: Sequence[Run]) -> float:
    """Seconds that training takes, at the rate of the same config's runs here so far."""
    missing = dict.fromkeys(self.missing(runs))
    done = [run for run in dict.fromkeys(runs) if run not in missing]

    def rate(spec: str) -> float:
      same = [run for run in done if run.spec == spec]
      spent = sum(seconds(run, self.root) - OVERHEAD_S for run in same)
      return sum(run.flops for run in same) / spent if spent > 0 else FLOPS_PER_S

    rates = {spec: rate(spec) for spec in {run.spec for run in missing}}
    return sum(run.flops / rates[run.spec] + OVERHEAD_S for run in missing) / self.jobs

  def train(self, runs: Sequence[Run], may_diverge: bool = False) -> None:
    """Trains what is not done yet; the longest first, so that all end together.

    Args:
      may_diverge: as one of a sweep may; such a run is not tried again.

    Raises:
      UserError: if one cannot be trained.
      KeyboardInterrupt: for Ctrl-C or SIGTERM, once all have saved what they have.
    """
    left = sorted(self.missing(runs, may_diverge), key=lambda run: -run.flops)
    if not left:
      return
    self.root.mkdir(parents=True, exist_ok=True)
    if self.jobs == 1:  # in this process, which alone can hold an accelerator
      self._watch(left, _InTurn(left, self.root), may_diverge)
      return
    with _Workers(left, self.root, min(self.jobs, len(left))) as workers:
      self._watch(left, workers, may_diverge)

  def _watch(self, left: Sequence[Run], workers: _Workers | _InTurn, may_diverge: bool) -> None:
    """Says what is finished and what is going on, until all is finished."""
    started = said = time.monotonic()
    total = sum(run.flops for run in left)
    finished: list[Run] = []
    running: dict[str, Run] = {}
    while len(finished) < len(left):
      event = workers.next()
      if isinstance(event, _Failed) and not (event.diverged and may_diverge):
        raise UserError(
          f"{event.name} could not be trained: {event.why}; see {self.root / event.name}{LOG}"
        )
      if isinstance(event, _Started):
        running[event.name] = next(run for run in left if run.name == event.name)
      elif isinstance(event, _Finished | _Failed):
        run = running.pop(event.name)
        finished.append(run)
        done = sum(r.flops for r in finished) + sum(map(self._progress, running.values()))
        time_left = (time.monotonic() - started) * (total / done - 1)
        print(
          f"[{len(finished)} of {len(left)}] {run.name}: {self._result(run)}; "
          f"{duration(time_left)} left",
          flush=True,
        )
        said = time.monotonic()
      if time.monotonic() - said > STATUS_EVERY_S:
        said = time.monotonic()
        going = (f"{run.name} {self._progress(run) / run.flops:.0%}" for run in running.values())
        print(f"  {len(finished)} of {len(left)} done; {', '.join(going)}", flush=True)

  def _progress(self, run: Run) -> float:
    """FLOPs done."""
    rows = metrics.read_jsonl(self.root / run.name / "metrics.jsonl")
    return run.flops * (rows[-1]["step"] / run.config.steps if rows else 0)

  def _result(self, run: Run) -> str:
    if run.divergence(self.root).exists():
      return "diverged"
    losses = metrics.read_jsonl(self.root / run.name / "eval.jsonl")[-1]["loss"]
    shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    return f"{shown}; {duration(seconds(run, self.root))}"


def flat(changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"model": {"d_model": 1}} -> {"model.d_model": 1}."""
  found: dict[str, Any] = {}
  for key, value in changes.items():
    name = f"{prefix}{key}"
    found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
  return found


def _as_json(value: Any) -> Any:
  """As it is read from a card."""
  return json.loads(json.dumps(value))


def duration(seconds: float) -> str:
  """'2 h 05 min', '12 min' or '40 s'."""
  minutes = round(seconds / 60)
  if minutes >= 60:
    return f"{minutes // 60} h {minutes % 60:02d} min"
  return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


# ------------------------------------------------------------------ processes


@dataclasses.dataclass(frozen=True)
class _Started:
  name: str


@dataclasses.dataclass(frozen=True)
class _Finished:
  name: str


@dataclasses.dataclass(frozen=True)
class _Failed:
  name: str
  why: str
  diverged: bool


class _Stopped(Exception):
  """A run was told to stop, and has saved its step."""


def _carry_out(run: Run, root: pathlib.Path) -> _Finished | _Failed:
  """Trains a run; what it says goes into a file beside its directory."""
  import jax

  from matformer_jax import train

  workdir = root / run.name
  workdir.parent.mkdir(parents=True, exist_ok=True)
  log = workdir.with_name(workdir.name + LOG)
  with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
    try:
      code = train.train(run.config, workdir)
    except (UserError, OSError) as e:
      if isinstance(e, Diverged):
        run.divergence(root).write_text(f"{e}\n")
      return _Failed(run.name, str(e), isinstance(e, Diverged))
  if code:
    raise _Stopped
  jax.clear_caches()  # its programs are of no use to the next one
  return _Finished(run.name)


@contextlib.contextmanager
def _same_handlers() -> Iterator[None]:
  """Puts back what Ctrl-C and SIGTERM did before: training has handlers of its own."""
  kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for number, handler in kept.items():
      signal.signal(number, handler)


class _InTurn:
  """Trains one run after the other when asked for news."""

  def __init__(self, left: Sequence[Run], root: pathlib.Path):
    self._events = self._train(left, root)

  def _train(self, left, root) -> Iterator[_Started | _Finished | _Failed]:
    for run in left:
      yield _Started(run.name)
      with _same_handlers():
        done = _carry_out(run, root)
      yield done

  def next(self) -> _Started | _Finished | _Failed:
    try:
      return next(self._events)
    except _Stopped:
      raise KeyboardInterrupt from None


class _Workers:
  """Processes that train runs, each on its share of the processors.

  Ctrl-C and SIGTERM reach all of them: each saves its step before it ends.
  """

  def __init__(self, left: Sequence[Run], root: pathlib.Path, number: int):
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    self._left = collections.deque(left)
    self._running: dict[Any, str] = {}  # by connection
    self._processes = []
    for share in _shares(number):
      ours, theirs = context.Pipe()
      self._running[ours] = "nothing yet"
      self._processes.append((context.Process(target=_work, args=(theirs, root, share)), theirs))

  def __enter__(self) -> _Workers:
    self._handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    for process, theirs in self._processes:
      process.start()
      theirs.close()  # so that the end of the process is seen at our end
    return self

  def __exit__(self, *_) -> None:
    for connection in self._running:
      connection.close()  # whoever waits for a run ends; whoever trains one is told to stop
    for process, _ in self._processes:
      if process.is_alive():
        process.terminate()
    for process, _ in self._processes:
      process.join()
    signal.signal(signal.SIGTERM, self._handler)

  def next(self) -> _Started | _Finished | _Failed | None:
    """What happened next; None if nothing did for a while. Raises UserError if a process died."""
    ready: list[Any] = multiprocessing.connection.wait(list(self._running), POLL_S)
    for connection in ready:
      try:
        news = connection.recv()
        if news is not None:
          return news
        run = self._left.popleft() if self._left else None
        connection.send(run)
      except (EOFError, OSError):
        raise UserError(
          f"the process that trained {self._running[connection]} ended; see its {LOG} file, and "
          "run this again to go on"
        ) from None
      if run is None:
        del self._running[connection]
        continue
      self._running[connection] = run.name
      return _Started(run.name)
    return None


def _shares(jobs: int) -> list[set[int]]:
  """Processors for each of several jobs; empty where they cannot be chosen."""
  if not hasattr(os, "sched_getaffinity"):
    return [set()] * jobs
  processors = sorted(os.sched_getaffinity(0))
  return [set(processors[i::jobs]) or set(processors) for i in range(jobs)]


def _work(connection, root: pathlib.Path, processors: set[int]) -> None:
  """Trains one run after the other, as they are given."""
  if processors:
    os.sched_setaffinity(0, processors)  # before JAX counts them
  runtime.keep_freed_memory()
  # Told to stop, or whoever gives runs is gone: what is trained has been saved.
  with contextlib.suppress(_Stopped, KeyboardInterrupt, EOFError, OSError):
    while True:
      connection.send(None)
      run = connection.recv()
      if run is None:
        return
      connection.send(_carry_out(run, root))
