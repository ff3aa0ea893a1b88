"""Searches the settings with which a slice trains a config fastest.

One setting after the other is changed, for the largest size; what is faster and fits stays. The
best few are then compiled for every size, and the best sampled mean wins. Nothing that is
searched changes what is learned, beyond the order in which numbers are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax

from matformer_jax import granularity as gran
from matformer_jax import sharding, tables
from matformer_jax.config_keys import Config
from matformer_jax.errors import UserError
from matformer_jax.planning import estimate, plan
from matformer_jax.tpu import chips
from matformer_jax.training.trainer import Trainer

MARGIN = 0.05  # of a core's memory, kept free
FINALISTS = 2
TOO_LARGE = 3  # candidates for which memory is looked for
ROUNDS = 3  # at most, through all settings
STEPS = 10  # at most, that a number is halved or doubled
# Each recomputes more than the one before, and keeps less.
REMAT = ("none", "products", "dots_no_batch", "attn_out_ffn_pre", "attn_out", "full")
Overrides = dict[str, Any]  # config key -> value, e.g. {"mesh.fsdp": 64}
Settings = dict[str, Any]  # as from `describe`


@dataclasses.dataclass(frozen=True)
class Rung:
  """A candidate that was tried.

  Attributes:
    overrides: what it changes of the config.
    settings: what it comes to, where `auto` stands in the config.
    row: of `plan_step`; empty where it was skipped.
    verdict: in words.
  """

  overrides: Overrides
  settings: Settings
  row: dict[str, Any]
  verdict: str

  @property
  def seconds(self) -> float:
    """Of a step; infinite where it cannot be run with the margin."""
    return self.row["step_time_s"] if fits(self.row) else float("inf")


def fits(row: dict[str, Any]) -> bool:
  """Whether a planned step leaves the margin free."""
  limit = (1 - MARGIN) * row.get("hbm_capacity", 0)
  return "step_time_s" in row and row["hbm_bytes_per_core"] <= limit


@dataclasses.dataclass
class Search:
  """A search under way; `ladder` grows."""

  config: Config
  topology: str
  size: str
  say: Callable[[str], None]
  ladder: list[Rung] = dataclasses.field(default_factory=list)

  @property
  def best(self) -> Rung | None:
    """The fastest that fits."""
    done = [rung for rung in self.ladder if fits(rung.row)]
    return min(done, key=lambda rung: rung.seconds, default=None)

  @property
  def start(self) -> Rung:
    """What the next candidate changes: the best, or what is nearest to fitting."""
    tried = [rung for rung in self.ladder if rung.row]
    return self.best or min(tried, key=_bytes, default=self.ladder[0])

  def run(self) -> None:
    """Tries the config as it is, then one setting after the other, as long as that helps."""
    self.attempt({})
    for _ in range(ROUNDS):
      before = self.start
      for options in (self._remats, self._logits, self._micro_batches, self._meshes, self._layers):
        for overrides in options():
          self.attempt(overrides)
      if self.start is before:
        break

  def attempt(self, overrides: Overrides) -> None:
    """Compiles a candidate, unless it is known or cannot be better."""
    config = changed(self.config, overrides)
    try:
      trainer, tpu = plan.open_trainer(config, self.topology)
    except UserError:
      return  # a mesh or micro-batch that the sizes do not divide into
    settings = describe(trainer)
    if any(_same(rung.settings, settings) for rung in self.ladder):
      return
    granularity = gran.parse(self.size, trainer.task.model_config)
    bound = estimate.least_seconds(trainer, granularity, tpu)
    best = self.best
    if best and bound >= best.seconds:
      row, verdict = {}, f"skipped: takes {1e3 * bound:,.0f} ms or more"
    else:
      try:
        row = estimate.plan_step(trainer, granularity, tpu)
        verdict = "does not fit" if not fits(row) else ""
      except jax.errors.JaxRuntimeError as e:
        row, verdict = {}, f"does not compile: {str(e).splitlines()[0][:80]}"
      if fits(row) and (best is None or row["step_time_s"] < best.seconds):
        verdict = "best so far"
    self.ladder.append(Rung(overrides, settings, row, verdict))
    self.say(f"{len(self.ladder)}: {in_words(settings)}: {_outcome(self.ladder[-1])}")

  def _remats(self) -> Iterator[Overrides]:
    """Until two in a row fit and are no faster than what keeps more."""
    slower = 0
    for remat in REMAT:
      before = len(self.ladder)
      yield self.start.overrides | {"remat": remat}
      for rung in self.ladder[before:]:
        slower = slower + 1 if fits(rung.row) and rung is not self.best else 0
      if slower == 2:
        break

  def _logits(self) -> Iterator[Overrides]:
    """Fewer logits at a time for what did not fit, and more where they are in chunks."""
    yield from self._until_it_fits("logits_gib", 0.5)
    if self.start.settings["chunks"] > 1:
      yield from self._while_it_helps(lambda s: {"logits_gib": 2 * s["logits_gib"]})

  def _micro_batches(self) -> Iterator[Overrides]:
    """More for what did not fit, and fewer."""
    yield from self._until_it_fits("grad_accum", 2)
    yield from self._while_it_helps(lambda s: {"grad_accum": _half(s["grad_accum"])})

  def _meshes(self) -> Iterator[Overrides]:
    """Larger and smaller axes; the data axis takes what is left."""
    for axis in ("fsdp", "tensor"):
      for change in (lambda size: 2 * size, _half):
        yield from self._while_it_helps(functools.partial(_resized, axis, change))

  def _layers(self) -> Iterator[Overrides]:
    for layers in ("unrolled", "scanned"):
      yield self.start.overrides | {"layers": layers}

  def _while_it_helps(self, change: Callable[[Settings], Overrides]) -> Iterator[Overrides]:
    """Changes `start`, again while that is better."""
    while True:
      before = self.start
      yield before.overrides | change(before.settings)
      if self.start is before:
        break

  def _until_it_fits(self, name: str, factor: float) -> Iterator[Overrides]:
    """Multiplies a setting of each candidate that did not fit, while that frees memory."""
    for rung in self._too_large()[:TOO_LARGE]:
      value, need = rung.settings[name], _bytes(rung)
      for _ in range(STEPS):
        tried = len(self.ladder)
        value *= factor
        yield rung.overrides | {name: value}
        new = self.ladder[tried:]  # empty where the program is the same, or cannot be
        if new and (new[0] not in self._too_large() or _bytes(new[0]) > 0.98 * need):
          break
        need = _bytes(new[0]) if new else need

  def _too_large(self) -> list[Rung]:
    """What would be faster than the best if there were more memory, fastest first."""
    limit = self.best.seconds if self.best else float("inf")
    time = lambda rung: rung.row.get("step_time_s", 0.0)
    wanted = [r for r in self.ladder if r.row and not fits(r.row) and time(r) < limit]
    return sorted(wanted, key=time)


def _half(number: int) -> int:
  return max(number // 2, 1)


def _resized(axis: str, change: Callable[[int], int], settings: Settings) -> Overrides:
  """A mesh with one axis changed."""
  sizes = settings | {axis: change(settings[axis])}
  return {"mesh.data": -1} | {f"mesh.{name}": sizes[name] for name in ("fsdp", "tensor")}


def _bytes(rung: Rung) -> int:
  return rung.row["hbm_bytes_per_core"]


def _same(a: Settings, b: Settings) -> bool:
  """Whether settings come to the same program: logits matter by their chunks alone."""
  return {**a, "logits_gib": 0} == {**b, "logits_gib": 0}


def tune(
  config: Config, topology: str, size: str = "", say: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
  """The whole search, ready for JSON.

  Args:
    config: a training config; its data is not touched.
    topology: e.g. `v5p:4x4x4`.
    size: for which candidates are compared; default the largest.
    say: called with progress messages.

  Returns:
    {"ladder": [...], "finalists": [...], "overrides": of the winner, "plan": its plan}.

  Raises:
    UserError: where the config as it is cannot be planned, or nothing fits.
  """
  trainer, _ = plan.open_trainer(config, topology)
  search = Search(config, topology, size or trainer.names[-1], say)
  search.run()
  fitting = sorted((r for r in search.ladder if fits(r.row)), key=lambda rung: rung.seconds)
  if not fitting:
    raise UserError(
      f"nothing that was tried leaves {100 * MARGIN:.0f}% of a core's memory free on {topology}; "
      "take a larger slice, a smaller batch_size, or a larger --config.grad_accum"
    )
  finalists = []
  for rung in fitting:
    say(f"all sizes with {in_words(rung.settings)}")
    whole = plan.make_plan(changed(config, rung.overrides), topology, say=say)
    if whole["mean"] and all(map(fits, whole["granularities"].values())):
      finalists.append({"overrides": rung.overrides, "settings": rung.settings, "plan": whole})
    if len(finalists) == FINALISTS:
      break
  if not finalists:
    raise UserError(
      f"what fits {topology} for {search.size} does not fit for all sizes; take a larger slice, a "
      "smaller batch_size, or a larger --config.grad_accum"
    )
  winner = min(finalists, key=lambda f: f["plan"]["mean"]["step_time_s"])
  return {
    "topology": topology,
    "size": search.size,
    "ladder": [dataclasses.asdict(rung) for rung in search.ladder],
    "finalists": [
      {"overrides": f["overrides"], "settings": f["settings"], "mean": f["plan"]["mean"]}
      for f in finalists
    ],
    "overrides": winner["overrides"],
    "settings": winner["settings"],
    "plan": winner["plan"],
  }


def changed(config: Config, overrides: Overrides) -> Config:
  """A copy of a config with some keys set."""
  copy = config.copy_and_resolve_references()
  for name, value in overrides.items():
    with copy.unlocked():  # a config made before may lack the key
      *sections, key = name.split(".")
      functools.reduce(getattr, sections, copy)[key] = value
  return copy


def describe(trainer: Trainer) -> Settings:
  """What a config comes to on a slice."""
  execution = trainer.execution
  return {
    "data": int(trainer.mesh.shape[sharding.DATA]),
    "fsdp": int(trainer.mesh.shape[sharding.FSDP]),
    "tensor": int(trainer.mesh.shape[sharding.TENSOR]),
    "remat": execution.remat,
    "layers": "scanned" if execution.scan_layers else "unrolled",
    "grad_accum": trainer.config.grad_accum,
    "chunks": plan.loss_cut(trainer)[0],
    "logits_gib": execution.logits_bytes / chips.GIB,
  }


def in_words(settings: Settings) -> str:
  """Settings in a line."""
  return (
    f"mesh {_mesh(settings)}, remat {settings['remat']}, {settings['layers']}, "
    f"{settings['grad_accum']} micro-batch(es), logits in {settings['chunks']}"
  )


def _mesh(settings: Settings) -> str:
  return "x".join(str(settings[axis]) for axis in sharding.INNER_AXES)


def _outcome(rung: Rung) -> str:
  ms = f"{_time(rung.row)[0]} ms" if "step_time_s" in rung.row else ""
  gib = f"{rung.row['hbm_bytes_per_core'] / chips.GIB:.1f} GiB" if rung.row else ""
  return ", ".join(filter(None, (ms, gib, rung.verdict)))


def as_flags(overrides: Overrides) -> str:
  """Overrides as a command line takes them."""
  return " ".join(f"--config.{name}={value}" for name, value in overrides.items())


def _time(row: dict[str, Any]) -> list[str]:
  """Milliseconds of a step, and MFU."""
  return [f"{1e3 * row['step_time_s']:,.1f}", f"{100 * row['mfu']:.1f}%"]


def tune_tables(result: dict[str, Any]) -> str:
  """The ladder, and what won, for a person to read."""
  rows = []
  for place, rung in enumerate(result["ladder"], 1):
    row, s = rung["row"], rung["settings"]
    rows.append(
      [
        str(place),
        _mesh(s),
        s["remat"],
        s["layers"],
        str(s["grad_accum"]),
        str(s["chunks"]),
        f"{row['hbm_bytes_per_core'] / chips.GIB:.1f}" if row else "",
        *(_time(row) if "step_time_s" in row else ["", ""]),
        rung["verdict"],
      ]
    )
  head = ["", "data x fsdp x tensor", "remat", "layers", "micro-batches", "logits in", "GiB a core"]
  finalists = [[in_words(f["settings"]), *_time(f["mean"])] for f in result["finalists"]]
  mean = result["plan"]["mean"]
  ms, mfu = _time(mean)
  won = (
    f"best: {ms} ms a step, {mfu} MFU, {mean['tokens_per_s']:,.0f} {result['plan']['unit']}/s "
    "over the sampled sizes\n"
    f"{as_flags(result['overrides']) or 'the config as it is'}"
  )
  return "\n\n".join(
    [
      f"{result['topology']}, step of {result['size']}",
      tables.table([*head, "ms", "MFU", ""], rows),
      "Mean over the sampled sizes",
      tables.table(["", "ms", "MFU"], finalists),
      won,
    ]
  )
