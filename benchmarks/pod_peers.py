"""Our train step against MaxText's on a TPU slice, by one estimator, with no TPU.

  python benchmarks/pod_peers.py --rows=850M,2.6B --topology=v5p:4x4x4

Both steps are compiled by the TPU compiler on this CPU, and `planning.estimate` reads both
programs: MaxText's dense model of XL's shape, from its own `train_compile` in an environment of
its own (Python 3.12, made on the first run), and ours, as XL, as S, and as the floor: the same
model with XL alone. Each side has its own libtpu unless TPU_LIBRARY_PATH names one for ours.
The last line is one JSON object. Takes 6 to 7 minutes a row on 2 cores.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from typing import Any

from absl import flags
import maxtext_peer
import step_kinds
from timing import get_config

from matformer_jax import cli, sharding, tables
from matformer_jax import granularity as gran
from matformer_jax.errors import UserError
from matformer_jax.planning import estimate, plan, slices
from matformer_jax.tpu import chips, hlo
from matformer_jax.training.trainer import Trainer

# Of its attention kernel: tokens, and whether one kernel makes all gradients (sa_block_q, ...).
MAXTEXT_BLOCKS = (512, False)
ROWS = ("78M", "180M", "310M", "463M", "850M", "2.6B")


def progress(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------- steps


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled train step.

  Attributes:
    text: optimized HLO.
    names: what its operations are called.
    memory: bytes on one device by purpose, as `estimate.memory`.
    kernels: its Pallas kernels.
    flops: of one device's products and kernels.
    model_flops: of all devices; what MFU counts.
    devices: that share them.
  """

  text: str
  names: step_kinds.Names
  memory: dict[str, int]
  kernels: estimate.Kernels
  flops: float
  model_flops: float
  devices: int

  def figures(self, tpu: chips.Tpu) -> dict[str, float]:
    """What the tables show of it as a whole."""
    timed = estimate.timing(self.text, self.kernels, self.flops, self.memory, tpu)
    return {
      "ms": 1e3 * timed["step_time_s"],
      "mfu": self.model_flops / timed["step_time_s"] / (self.devices * tpu.core_flops),
      "hbm_gib": sum(self.memory.values()) / 2**30,
      "wire_mib": timed["wire_bytes"] / 2**20,
      "exposed_mib": timed["exposed_wire_bytes"] / 2**20,
    }

  def kinds(self, tpu: chips.Tpu) -> dict[str, float]:
    """Milliseconds by kind."""
    found = dict.fromkeys(step_kinds.KINDS, 0.0)
    are_products = step_kinds.products(self.text)
    for o in hlo.operations(self.text):
      found[step_kinds.kind(o, o.name in are_products, self.names)] += 1e3 * o.cycles / tpu.clock_hz
    attention = dataclasses.replace(self.kernels, loss=[])
    found["attention kernel"] = 1e3 * attention.seconds(tpu)
    found["loss kernels"] = 1e3 * self.kernels.seconds(tpu) - found["attention kernel"]
    exposed = sum(c.wire_bytes for c in hlo.collectives(self.text) if not c.hidden)
    found["exposed collectives"] = 1e3 * exposed / tpu.core_ring_bytes_per_s
    return found


def make_trainer(row: str, overrides: dict[str, Any]) -> Trainer:
  """Of a row of configs/matlm.py with other keys. Raises UserError where they do not fit."""
  config = get_config("matlm", row).lock()
  try:
    config.update_from_flattened_dict(overrides)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    reason = str(e).strip("'").partition(" Other fields")[0]
    raise UserError(f"--overrides: {reason}") from e
  return plan.open_trainer(config, _TOPOLOGY.value)[0]


def our_step(trainer: Trainer, granularity: gran.Granularity) -> Step:
  """Raises estimate.DoesNotFit."""
  traced = trainer.trace(granularity)
  compiled, text = estimate.compile_program(traced.lower())
  kernels, flops = estimate.work(trainer, granularity, traced.jaxpr.jaxpr)
  return Step(
    text=text,
    names=step_kinds.OURS,
    memory=estimate.memory(compiled),
    kernels=kernels,
    flops=flops,
    model_flops=trainer.model_flops(granularity),
    devices=trainer.mesh.size,
  )


def maxtext_step(maxtext: maxtext_peer.MaxText, trainer: Trainer, remat: str) -> Step | None:
  """Of a dense model of XL's shape; None where it does not fit."""
  compiled = maxtext.compile(trainer, _TOPOLOGY.value, remat, _MAXTEXT_OPTIONS.value)
  if compiled is None:
    return None
  text, memory = compiled
  # The attention kernel is the one that we use, in MaxText's blocks, on rows that are split over
  # all devices; its forward pass runs once where its result, MaxText's context, is kept.
  config = trainer.config.copy_and_resolve_references()
  config.remat = "none" if remat == "none" or "context" in remat else "full"
  mesh = sharding.make_mesh({sharding.FSDP: -1}, list(trainer.mesh.devices.flat))
  same, xl = Trainer(trainer.task, config, mesh), trainer.granularities[-1]
  return Step(
    text=text,
    names=step_kinds.MAXTEXT,
    memory=memory,
    kernels=estimate.Kernels(estimate.attention_flops(same, xl, MAXTEXT_BLOCKS), []),
    flops=trainer.model_flops(xl) / mesh.size,  # at the least
    model_flops=trainer.model_flops(xl),
    devices=mesh.size,
  )


# ---------------------------------------------------------------------- a report


def timed(what: str, make):
  """Calls `make`, between two lines of progress."""
  progress(f"compiling {what}")
  started = time.perf_counter()
  step = make()
  progress(f"  {time.perf_counter() - started:.0f} s" + ("" if step else "; it does not fit"))
  return step


def compile_steps(
  row: str, maxtext: maxtext_peer.MaxText
) -> tuple[dict[str, Step], dict[str, Step]]:
  """Ours by name, and MaxText's by remat policy."""
  trainer = make_trainer(row, _overrides())
  ratios = trainer.task.model_config.ffn_ratios
  floor = make_trainer(row, _overrides() | {"model.ffn_ratios": ratios[-1:]})
  ours, theirs = {}, {}
  for name, of, i in (("ours", trainer, -1), ("floor", floor, -1), ("S", trainer, 0)):
    ours[name] = timed(f"{row}, {name}", lambda: our_step(of, of.granularities[i]))
  for remat in _MAXTEXT_REMAT.value:
    step = timed(f"{row}, MaxText, remat {remat}", lambda: maxtext_step(maxtext, trainer, remat))
    if step:
      theirs[remat] = step
  if not theirs:
    tried = ",".join(_MAXTEXT_REMAT.value)
    raise UserError(f"MaxText's step of {row} does not fit with --maxtext_remat={tried}")
  return ours, theirs


def report(row: str, ours, theirs, tpu: chips.Tpu) -> dict[str, Any]:
  """Prints the tables of a row; returns its part of the JSON object."""
  steps = ours | {f"MaxText {remat}": step for remat, step in theirs.items()}
  figures = {name: step.figures(tpu) for name, step in steps.items()}
  kinds = {name: step.kinds(tpu) for name, step in steps.items()}
  print(f"\n{row}, {_TOPOLOGY.value}, one device\n")
  header = ["step", "ms", "MFU", "HBM GiB", "wire MiB", "exposed MiB"]
  formats = ("{:.1f}", "{:.1%}", "{:.2f}", "{:,.0f}", "{:,.0f}")
  cells = lambda f: [text.format(value) for text, value in zip(formats, f.values())]
  print(tables.table(header, [[name, *cells(f)] for name, f in figures.items()]) + "\n")
  rows = [[kind, *(f"{ms[kind]:.1f}" for ms in kinds.values())] for kind in step_kinds.KINDS]
  print(tables.table(["ms", *kinds], rows), flush=True)
  best = min(theirs, key=lambda remat: figures[f"MaxText {remat}"]["ms"])
  sides = {name.lower(): figures[name] for name in ours} | {"maxtext": figures[f"MaxText {best}"]}
  # XLA gives no cycles for these kernels: how fast must they be?
  reached = estimate.loss_efficiency(tpu)
  others = figures["ours"]["ms"] - kinds["ours"]["loss kernels"]
  even = reached * kinds["ours"]["loss kernels"] / max(sides["maxtext"]["ms"] - others, 1e-9)
  if 0 < even < reached:
    print(
      f"\nOur loss kernels are taken to reach {reached:.0%} of the chip's peak. At {even:.0%} of "
      "it, ours would be as slow as MaxText's."
    )
  share = ours["S"].model_flops / ours["ours"].model_flops
  return {f"{side}_{key}": value for side, f in sides.items() for key, value in f.items()} | {
    "maxtext_remat": best,
    "ours_to_floor": figures["ours"]["ms"] / figures["floor"]["ms"],
    "loss_kernels_even_at": even,
    "s_time_to_flop_share": figures["S"]["ms"] / figures["ours"]["ms"] / share,
    "ms_by_kind": kinds,
  }


def _overrides() -> dict[str, Any]:
  found = {}
  for item in _OVERRIDES.value:
    key, equals, value = item.partition("=")
    if not equals:
      raise UserError(f"--overrides: {item!r} is not KEY=VALUE, e.g. remat=products")
    try:
      found[key] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      found[key] = value
  return found


def our_versions() -> dict[str, str]:
  """Of jax, and of the libtpu that is used."""
  path = os.environ.get("TPU_LIBRARY_PATH")
  where = [str(pathlib.Path(path).resolve().parent.parent)] if path else sys.path
  libtpu = next(importlib.metadata.distributions(name="libtpu", path=where), None)
  version = libtpu.version if libtpu else path or "none"
  return {"jax": importlib.metadata.version("jax"), "libtpu": version}


def main(argv) -> None:
  cli.check(argv)
  for row in _ROWS.value:
    if row not in ROWS:
      raise UserError(f"--rows: no row {row!r}; rows are {', '.join(ROWS)}")
  tpu, _ = slices.topology_devices(_TOPOLOGY.value)
  _overrides()
  maxtext = maxtext_peer.MaxText(pathlib.Path(_MAXTEXT_ENV.value).expanduser().absolute())
  maxtext.slice_name(_TOPOLOGY.value)
  versions = {"ours": our_versions(), "maxtext": maxtext.versions}
  text = lambda v: ", ".join(f"{k} {n}" for k, n in v.items())
  print(f"ours: {text(versions['ours'])}; MaxText: {text(versions['maxtext'])}", flush=True)
  result: dict[str, Any] = {}
  for row in _ROWS.value:
    try:
      result[row] = report(row, *compile_steps(row, maxtext), tpu)
    except estimate.DoesNotFit as e:
      raise UserError(
        f"our step of {row} does not fit a device ({e.bytes / 2**30:.1f} GiB of "
        f"{tpu.core_hbm_bytes / 2**30:.0f}); try --overrides=remat=full"
      ) from e
  print(json.dumps(result | {"versions": versions}))


if __name__ == "__main__":
  _cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  _ROWS = flags.DEFINE_list("rows", ["850M", "2.6B"], "Rows of configs/matlm.py.")
  _TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "CHIP:SHAPE.")
  _OVERRIDES = flags.DEFINE_list(
    "overrides",
    [],
    "Keys of our config, KEY=VALUE, e.g. remat=products,layers=scanned.",
  )
  _MAXTEXT_ENV = flags.DEFINE_string(
    "maxtext_env",
    str(_cache / "matformer_jax" / "maxtext"),
    f"Environment with MaxText; {maxtext_peer.REQUIREMENT} is installed where there is none.",
  )
  _MAXTEXT_REMAT = flags.DEFINE_list(
    "maxtext_remat",
    ["full", "minimal", "minimal_with_context"],
    "MaxText's remat policies; the fastest counts.",
  )
  _MAXTEXT_OPTIONS = flags.DEFINE_list(
    "maxtext_options", [], "More of MaxText's options, KEY=VALUE."
  )
  cli.run(main)
