"""What training will need and cost on a TPU slice, from the real TPU compiler, with no TPU.

  python -m matformer_jax.pod_plan --config=configs/matlm.py:850M --topology=v3:16x16
  python -m matformer_jax.pod_plan --config=configs/matlm.py:78M --topology=v5e:4x4 \\
      --mesh=fsdp:4,tensor:2
  python -m matformer_jax.pod_plan --topology=list

Compiles the train step of every granularity ahead of time for the slice, on this CPU,
and reads memory, collectives and estimated cycles out of the result. Needs the extra
`tpu`. Figures are per JAX device: a core of a v3, a chip of later TPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp

from matformer_jax import cli, sharding, tables
from matformer_jax import granularity as gran
from matformer_jax.config import MatLMConfig
from matformer_jax.config_keys import Config
from matformer_jax.decoding.decode import Decoder, State
from matformer_jax.errors import UserError
from matformer_jax.models import cache as kv
from matformer_jax.tasks import make_task_without_data
from matformer_jax.tpu import chips, hlo
from matformer_jax.training import metrics
from matformer_jax.training.trainer import Trainer

# [T, T] x H products of the attention kernel; forward twice where its result is not kept.
KERNEL_FORWARD, KERNEL_BACKWARD = 2, 7
KERNEL_KEPT = ("none", "products")  # remat policies
_GIB = 2**30


# --------------------------------------------------------------- the slice


def topology_devices(topology: str) -> tuple[chips.Tpu, list]:
  """The devices of a slice such as `v5e:4x4`, to compile for.

  Raises:
    UserError: for an unknown chip or shape, or without the compiler library.
  """
  name, _, shape = topology.partition(":")
  tpu = chips.TPUS.get(name)
  if tpu is None or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
    raise UserError(
      f"--topology={topology!r} is not CHIP:SHAPE, e.g. v3:16x16; chips are "
      f"{', '.join(chips.TPUS)} (--topology=list)"
    )
  if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
    raise UserError("the TPU compiler is not installed; pip install 'matformer_jax[tpu]'")
  # These describe a machine that does not exist and stop the library from looking for one.
  os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE=tpu.accelerator_type,
  )
  jax.config.update("jax_platforms", "cpu")
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, chip_config_name=tpu.chip_config
    ).devices
  except Exception as e:
    raise UserError(
      f"--topology={topology!r}: the TPU compiler knows no such slice "
      f"({' '.join(str(e).split())[:200]}); try {tpu.example}"
    ) from e
  return tpu, devices


def parse_mesh(text: str, default) -> dict[str, int]:
  """`fsdp:16,tensor:2` as sizes; axes not named are 1, and data takes what remains."""
  if not text:
    return dict(default)
  sizes = {axis: 1 for axis in sharding.MESH_AXES} | {sharding.DATA: -1}
  for part in text.split(","):
    axis, _, size = part.partition(":")
    if axis not in sizes or not re.fullmatch(r"-1|\d+", size):
      raise UserError(
        f"--mesh={text!r}: {part!r} is not AXIS:SIZE with an axis of "
        f"{', '.join(sharding.MESH_AXES)}, e.g. fsdp:16,tensor:2"
      )
    sizes[axis] = int(size)
  return sizes


# ------------------------------------------------------------- one program


def matmul_flops(jaxpr) -> float:
  """FLOPs of all matrix products in a jaxpr; loops counted as often as they run."""
  return sum(times * _product_flops(eqn) for eqn, times in _equations(jaxpr, "dot_general"))


def _product_flops(eqn) -> float:
  (contract, _), _ = eqn.params["dimension_numbers"]
  depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth


def _equations(jaxpr, primitive: str, times: int = 1) -> Iterator[tuple[Any, int]]:
  """(equation, how often it runs) of a primitive, outside of kernels."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == primitive:
      yield eqn, times
    elif eqn.primitive.name != "pallas_call":
      for value in eqn.params.values():
        for inner in _jaxprs(value):
          yield from _equations(inner, primitive, times * eqn.params.get("length", 1))


def _jaxprs(value) -> list:
  if isinstance(value, (tuple, list)):
    return [j for v in value for j in _jaxprs(v)]
  value = getattr(value, "jaxpr", value)
  return [value] if hasattr(value, "eqns") else []


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The work of a step's Pallas kernels on one device, of which XLA gives no cycles.

  Attributes:
    attention: FLOPs.
    loss: (FLOPs, bytes to or from memory) of each call.
  """

  attention: float
  loss: list[tuple[float, float]]

  @property
  def flops(self) -> float:
    """Of all of them."""
    return self.attention + sum(flops for flops, _ in self.loss)

  def seconds(self, peak: float, bandwidth: float) -> float:
    """At a chip's peak FLOP/s or bytes/s, whichever takes longer."""
    loss = sum(max(flops / peak, moved / bandwidth) for flops, moved in self.loss)
    return self.attention / peak + loss


def kernels(trainer: Trainer, granularity: gran.Granularity, jaxpr) -> Kernels:
  """The kernels of a traced step."""
  calls = [
    (eqn.params["cost_estimate"], times)
    for eqn, times in _equations(jaxpr, "pallas_call")
    if eqn.params["cost_estimate"] and "splash" not in str(eqn.params["name"])
  ]
  loss = [(c.flops, c.bytes_accessed) for c, times in calls for _ in range(times)]
  return Kernels(attention_flops(trainer, granularity), loss)


def attention_flops(trainer: Trainer, granularity: gran.Granularity) -> float:
  """Of the attention kernel: half where causal, heads padded to 128 lanes."""
  config = trainer.task.model_config
  if not trainer.execution.kernels or config.num_tokens % 128:
    return 0.0
  heads = sum(config.head_counts[i] for i in granularity.heads)
  rows = trainer.config.batch_size / sharding.batch_shards(trainer.mesh)
  width = -(-config.head_dim // 128) * 128
  products = rows * heads * config.num_tokens**2 * width * (1 if config.causal else 2)
  forward = KERNEL_FORWARD * (1 if trainer.execution.remat in KERNEL_KEPT else 2)
  return (forward + KERNEL_BACKWARD) * products / trainer.mesh.shape[sharding.TENSOR]


def tree_bytes(tree) -> int:
  """Of one device's shards."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


class DoesNotFit(Exception):
  """The compiler found no way to run a program in the memory there is.

  Attributes:
    bytes: what it would take, or its temporaries alone would.
    temporaries_only: which of the two.
  """

  def __init__(self, size: str, unit: str | None, temporaries_only: bool):
    self.bytes = int(float(size) * 1024 ** " KMGT".index(unit or " "))
    self.temporaries_only = temporaries_only


def compile_program(lowered):
  """(compiled, optimized HLO text). Raises DoesNotFit where memory does not suffice."""
  with tempfile.TemporaryDirectory() as directory:
    try:
      # `as_text` cannot print what the compiler makes for a v5p; its own dump can.
      compiled = lowered.compile(compiler_options={"xla_dump_to": directory})
    except jax.errors.JaxRuntimeError as e:
      size = r"([\d.]+)([KMGT])?"
      used = re.search(f"Used {size} of .* hbm", str(e))
      temporaries = re.search(rf"HLO temporaries \({size}\) exceeds", str(e))
      if "RESOURCE_EXHAUSTED" not in str(e) or not (used or temporaries):
        raise
      raise DoesNotFit(*(used or temporaries).groups(), temporaries_only=not used) from e
    dumps = pathlib.Path(directory).glob("*.after_codegen.txt")
    return compiled, max(dumps, key=lambda path: path.stat().st_size).read_text()


def memory(compiled) -> dict[str, int]:
  """Bytes per device by purpose."""
  m = compiled.memory_analysis()
  return {
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "code": m.generated_code_size_in_bytes,
  }


def plan_step(
  trainer: Trainer, granularity: gran.Granularity, tpu: chips.Tpu, top: int = 0
) -> dict[str, Any]:
  """Memory, communication and time of one granularity's train step on one device.

  With `top`, also that many of its dearest operations, and of the collectives nothing hides.
  """
  cores = tpu.cores_per_chip
  state = trainer.abstract_state
  capacity = tpu.hbm_bytes // cores
  parts = {"parameters": tree_bytes(state.params), "optimizer": tree_bytes(state.opt_state)}
  result: dict[str, Any] = {"hbm_capacity": capacity, "hbm": parts}
  started = time.perf_counter()
  traced = trainer.trace(granularity)
  try:
    compiled, text = compile_program(traced.lower())
  except DoesNotFit as e:
    parts["temporaries"] = e.bytes - (0 if e.temporaries_only else sum(parts.values()))
    return result | {
      "fits": False,
      "hbm_bytes_per_core": sum(parts.values()),
      "compile_s": time.perf_counter() - started,
    }
  used = memory(compiled)
  parts |= {k: used[k] for k in ("temporaries", "code")}
  parts["batch and other"] = used["arguments"] + used["outputs"] - tree_bytes(state)
  collectives = hlo.collectives(text)
  kinds = {kind: [c for c in collectives if c.kind == kind] for kind in hlo.KINDS}
  wire = sum(c.wire_bytes for c in collectives)
  exposed = sum(c.wire_bytes for c in collectives if not c.hidden)
  tensor = trainer.mesh.shape[sharding.TENSOR]
  own = kernels(trainer, granularity, traced.jaxpr.jaxpr)
  flops = matmul_flops(traced.jaxpr.jaxpr) / tensor + own.flops
  peak, bandwidth = tpu.peak_flops / cores, tpu.hbm_bytes_per_s / cores
  bounds = {
    "compute_s": flops / peak,
    # Every live byte is written and read at least once.
    "memory_s": (used["arguments"] + used["outputs"] + 2 * used["temporaries"]) / bandwidth,
    "network_s": wire / (tpu.links * tpu.link_bytes_per_s / cores),
  }
  cycles = hlo.estimated_cycles(text)
  busy = cycles / tpu.clock_hz + own.seconds(peak, bandwidth)
  busy = max(busy, bounds["compute_s"], bounds["memory_s"])
  # Around one ring, both ways: what XLA does not hide behind computation adds to the step.
  step_time = busy + exposed / (2 * tpu.link_bytes_per_s / cores)
  config = trainer.task.model_config
  model_flops = gran.count(config, granularity).train_flops * trainer.task.examples_per_step
  return result | {
    "fits": sum(parts.values()) <= capacity,
    "hbm_bytes_per_core": sum(parts.values()),
    "collective_bytes": {k: sum(c.bytes * c.times for c in v) for k, v in kinds.items() if v},
    "collective_count": {k: sum(c.arrays * c.times for c in v) for k, v in kinds.items() if v},
    "wire_bytes": int(wire),
    "exposed_wire_bytes": int(exposed),
    "flops_per_core": flops,
    "model_flops": model_flops,
    "estimated_cycles": cycles,
    "bounds": bounds,
    "step_time_s": step_time,
    "mfu": model_flops / step_time / (peak * trainer.mesh.size),
    "tokens_per_s": trainer.task.examples_per_step / step_time,
    "compile_s": time.perf_counter() - started,
    **({"top": dearest(text, tpu, top)} if top else {}),
  }


def dearest(text: str, tpu: chips.Tpu, top: int) -> dict[str, list[dict[str, Any]]]:
  """The `top` operations of a program by estimated time, and collectives that nothing hides."""
  ring = 2 * tpu.link_bytes_per_s / tpu.cores_per_chip
  exposed = [c for c in hlo.collectives(text) if not c.hidden]
  exposed.sort(key=lambda c: -c.wire_bytes)
  return {
    "operations": [
      {
        "ms": 1e3 * o.cycles / tpu.clock_hz,
        "times": o.times,
        "shape": o.shape,
        "op": o.op,
        "source": o.source,
      }
      for o in hlo.operations(text)[:top]
    ],
    "exposed": [
      {"ms": 1e3 * c.wire_bytes / ring, "times": c.times, "kind": c.kind, "bytes": c.bytes}
      for c in exposed[:top]
    ],
  }


def plan_decode(
  trainer: Trainer, granularity: gran.Granularity, tpu: chips.Tpu, batch: int, length: int
) -> dict[str, Any]:
  """Memory and time of decoding one token of `batch` sequences with a cache of `length`."""
  mesh, config = trainer.mesh, trainer.task.model_config
  assert isinstance(config, MatLMConfig)
  decoder = Decoder(config, dataclasses.replace(trainer.execution, remat="none"), granularity)
  place = jax.sharding.NamedSharding(mesh, sharding.spec(("batch",)))
  row: Any = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=place)
  params = trainer.abstract_state.params
  weights = jax.tree.map(
    lambda s, like: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=like.sharding),
    jax.eval_shape(decoder.lay_out, params),
    params,
  )
  cache = jax.eval_shape(functools.partial(kv.init_cache, config, decoder.execution, batch, length))
  cache = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=jax.sharding.NamedSharding(mesh, sharding.spec(kv.logical_axes(leaf))),
    ),
    cache,
  )
  keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(batch, jnp.uint32)))
  state = State(
    row(jnp.int32, length),
    row(jnp.int32),
    row(jnp.int32),
    row(jnp.bool_),
    row(keys.dtype),
    cache,
    None,
    decoder.heads,
  )
  capacity = tpu.hbm_bytes // tpu.cores_per_chip
  try:
    compiled, text = compile_program(Decoder._advance.lower(decoder, weights, state, jnp.int32(1)))
  except DoesNotFit as e:
    return {"fits": False, "hbm_bytes_per_core": e.bytes, "hbm_capacity": capacity}
  used = memory(compiled)
  # One pass through the loop; what is read must be read once a token.
  exposed = sum(c.wire_bytes for c in hlo.collectives(text))
  seconds = max(
    hlo.estimated_cycles(text) / tpu.clock_hz,
    used["arguments"] / (tpu.hbm_bytes_per_s / tpu.cores_per_chip),
  )
  seconds += exposed / (2 * tpu.link_bytes_per_s / tpu.cores_per_chip)
  return {
    "fits": sum(used.values()) <= capacity,
    "hbm_bytes_per_core": sum(used.values()),
    "hbm_capacity": capacity,
    "token_time_s": seconds,
    "tokens_per_s": batch / seconds,
  }


# ------------------------------------------------------------------ the plan


def make_plan(
  config,
  topology: str,
  mesh_sizes: str = "",
  granularities=(),
  decode_batch: int = 0,
  say=lambda message: None,
  top: int = 0,
) -> dict[str, Any]:
  """The whole plan, ready for JSON.

  Args:
    config: a training config; its data is not touched.
    topology: e.g. `v3:16x16`.
    mesh_sizes: as `--mesh`; empty takes config.mesh.
    granularities: names; empty takes the trained ones.
    decode_batch: also plan decoding of this many sequences; 0 does not.
    say: called with progress messages.
    top: how many of each program's dearest operations to name.
  """
  tpu, devices = topology_devices(topology)
  mesh = sharding.make_mesh(parse_mesh(mesh_sizes, config.mesh), devices)
  task = make_task_without_data(config)
  model_config = task.model_config
  if decode_batch and not model_config.causal:
    raise UserError(
      f"--decode_batch={decode_batch}: a model of task {config.task!r} does not decode"
    )
  sharding.check_model_fits_mesh(model_config, mesh)
  sharding.check_batch(config.batch_size, config.grad_accum, mesh)
  trainer = Trainer(task, config, mesh)
  names = list(granularities) or trainer.names
  count = len(devices) // tpu.cores_per_chip
  plan: dict[str, Any] = {
    "topology": topology,
    "chips": count,
    "cores": len(devices),
    "mesh": {k: int(v) for k, v in mesh.shape.items()},
    "batch_size": config.batch_size,
    "tokens_per_step": task.examples_per_step,
    "unit": task.examples_unit,
    "grad_accum": config.grad_accum,
    "dtype": trainer.execution.dtype,
    "remat": trainer.execution.remat,
    "attention": "flash" if trainer.execution.kernels else "blocks",
    "optimizer": config.optim.name,
    "steps": config.steps,
    "granularities": {},
  }
  for name in names:
    say(
      f"compiling the step of {name} for {topology} ({len(plan['granularities']) + 1}/{len(names)})"
    )
    g = gran.parse(name, model_config)
    row = plan_step(trainer, g, tpu, top)
    plan["granularities"][name] = row | _totals(row, config.steps, count)
    if decode_batch:
      say(f"compiling decoding with {name}")
      plan["granularities"][name]["decode"] = plan_decode(
        trainer, g, tpu, decode_batch, model_config.num_tokens
      )
  plan["mean"] = _mean(plan, trainer, config.steps, count)
  plan["fits"] = all(row["fits"] for row in plan["granularities"].values())
  plan["advice"] = advice(plan, config)
  return plan


def _totals(row, steps: int, count: int) -> dict[str, float]:
  if "step_time_s" not in row:
    return {}
  days = steps * row["step_time_s"] / 86_400
  return {"days": days, "chip_hours": 24 * days * count}


def _mean(plan, trainer: Trainer, steps: int, count: int) -> dict[str, float] | None:
  """Of the steps that sampling makes; None unless all sampled sizes were planned and fit."""
  rows = [
    (p, plan["granularities"].get(name))
    for name, p in zip(trainer.names, trainer.probabilities)
    if p > 0
  ]
  if any(row is None or "step_time_s" not in row for _, row in rows):
    return None
  seconds = sum(p * row["step_time_s"] for p, row in rows)
  peak = metrics.peak_flops(trainer.mesh)
  assert peak  # every chip that can be planned for is known
  row = {
    "step_time_s": seconds,
    "tokens_per_s": plan["tokens_per_step"] / seconds,
    "mfu": sum(p * row["model_flops"] for p, row in rows) / seconds / peak,
  }
  return row | _totals(row, steps, count)


def advice(plan, config: Config) -> list[str]:
  """What does not fit, and what to change."""
  result = []
  for name, row in plan["granularities"].items():
    if row["fits"]:
      continue
    hbm, missing = row["hbm"], row["hbm_bytes_per_core"] - row["hbm_capacity"]
    kept = hbm["parameters"] + hbm["optimizer"]
    what = (
      f"{name} needs {row['hbm_bytes_per_core'] / _GIB:.2f} GiB a core, "
      f"{missing / _GIB:.2f} more than there is: "
    )
    if kept > row["hbm_capacity"] / 2:
      what += (
        f"parameters and optimizer take {kept / _GIB:.2f}; raise mesh.fsdp="
        f"{plan['mesh']['fsdp']}"
        + ("" if config.optim.name == "adafactor" else ", or use --config.optim.name=adafactor")
      )
    else:
      ways = [f"--config.grad_accum={2 * plan['grad_accum']}"]
      ways += ["--config.remat=full"] if plan["remat"] != "full" else []
      ways += ["a larger slice, or a smaller --config.batch_size"]
      what += f"activations take {hbm['temporaries'] / _GIB:.2f}; try {', '.join(ways)}"
    result.append(what)
  return result


def _dearest_tables(name: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
  ms = lambda row: f"{row['ms']:,.2f}"
  return [
    f"{name}: the dearest operations of a step, without the attention kernel",
    tables.table(
      ["ms", "times", "result", "source", "operation"],
      [
        [ms(r), str(r["times"]), r["shape"][:32], r["source"], r["op"][-60:]]
        for r in found["operations"]
      ],
    ),
    f"{name}: the dearest collectives that are not hidden behind computation, around one ring",
    tables.table(
      ["ms", "times", "MiB of results", "kind"],
      [[ms(r), str(r["times"]), f"{r['bytes'] / 2**20:,.1f}", r["kind"]] for r in found["exposed"]],
    ),
  ]


def plan_tables(plan: dict[str, Any]) -> str:
  """Tables a person reads."""
  head = (
    f"{plan['topology']}: {plan['chips']} chips, {plan['cores']} cores, mesh {plan['mesh']}, "
    f"{plan['tokens_per_step']:,} {plan['unit']}/step, {plan['dtype']}, remat {plan['remat']}, "
    f"{plan['attention']} attention, {plan['optimizer']}"
  )
  gib = lambda value: f"{value / _GIB:.2f}"
  mib = lambda value: f"{value / 2**20:,.0f}"
  ms = lambda value: f"{1e3 * value:,.1f}"
  rows = plan["granularities"]
  purposes = list(dict.fromkeys(k for row in rows.values() for k in row["hbm"]))
  tables_ = [
    head,
    "HBM per core, GiB",
    tables.table(
      ["size", *purposes, "all", "of", "fits"],
      [
        [
          name,
          *(gib(row["hbm"].get(k, 0)) for k in purposes),
          gib(row["hbm_bytes_per_core"]),
          gib(row["hbm_capacity"]),
          "yes" if row["fits"] else "NO",
        ]
        for name, row in rows.items()
      ],
    ),
  ]
  timed = {name: row for name, row in rows.items() if "step_time_s" in row}
  for name, row in timed.items():
    if "top" in row:
      tables_ += _dearest_tables(name, row["top"])
  if timed:
    kinds = [k for k in hlo.KINDS if any(k in row["collective_bytes"] for row in timed.values())]
    tables_ += [
      "Collectives per step and core: arrays, MiB of results",
      tables.table(
        ["size", *kinds, "on the wire", "not hidden"],
        [
          [
            name,
            *(
              f"{row['collective_count'].get(k, 0)}, {mib(row['collective_bytes'].get(k, 0))}"
              for k in kinds
            ),
            mib(row["wire_bytes"]),
            mib(row["exposed_wire_bytes"]),
          ]
          for name, row in timed.items()
        ],
      ),
    ]
    mean = {"mean": plan["mean"]} if plan["mean"] else {}
    tables_ += [
      "Time: lower bounds and estimate, ms",
      tables.table(
        [
          "size",
          "TFLOP/core",
          "compute",
          "memory",
          "network",
          "estimate",
          "MFU",
          f"{plan['unit']}/s",
          "days",
          "chip-hours",
        ],
        [
          [
            name,
            f"{row['flops_per_core'] / 1e12:.2f}" if "bounds" in row else "",
            *(
              ms(row["bounds"][k]) if "bounds" in row else ""
              for k in ("compute_s", "memory_s", "network_s")
            ),
            ms(row["step_time_s"]),
            f"{100 * row['mfu']:.1f}%",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['days']:,.2f}",
            f"{row['chip_hours']:,.0f}",
          ]
          for name, row in (timed | mean).items()
        ],
      ),
    ]
  decoding = {name: row["decode"] for name, row in rows.items() if "decode" in row}
  if decoding:
    tables_ += [
      "Decoding",
      tables.table(
        ["size", "GiB/core", "ms/token", "tokens/s", "fits"],
        [
          [
            name,
            gib(d["hbm_bytes_per_core"]),
            ms(d["token_time_s"]) if "token_time_s" in d else "",
            f"{d['tokens_per_s']:,.0f}" if "token_time_s" in d else "",
            "yes" if d["fits"] else "NO",
          ]
          for name, d in decoding.items()
        ],
      ),
    ]
  note = (
    "Compute counts executed products, recomputation included, at peak; memory every live "
    "byte written and read once; network all links at once. The estimate adds XLA's cycle "
    "counts and what it does not hide of the communication, around one ring. MFU counts "
    "model FLOPs only. Days and chip-hours are for all steps of the config."
  )
  return "\n\n".join([*tables_, *plan["advice"], note])


def list_topologies() -> str:
  """A table of the known chips."""
  rows = [
    [
      tpu.name,
      str(tpu.cores_per_chip),
      f"{tpu.hbm_bytes / _GIB:.0f}",
      f"{tpu.peak_flops / 1e12:.0f}",
      f"{tpu.hbm_bytes_per_s / 1e9:,.0f}",
      str(tpu.links),
      f"{tpu.link_bytes_per_s / 1e9:.0f}",
      tpu.example,
    ]
    for tpu in chips.TPUS.values()
  ]
  return tables.table(
    [
      "chip",
      "JAX devices",
      "HBM GiB",
      "bf16 TFLOP/s",
      "HBM GB/s",
      "links",
      "GB/s each way",
      "example",
    ],
    rows,
  )


def main(argv) -> None:
  cli.check(argv)
  if _TOPOLOGY.value == "list":
    print(list_topologies())
    return
  config = cli.read_config(_CONFIG)
  if not _TOPOLOGY.value:
    raise UserError("--topology is missing; give e.g. --topology=v3:16x16, or list")
  plan = make_plan(
    config,
    _TOPOLOGY.value,
    _MESH.value,
    _GRANULARITIES.value,
    _DECODE_BATCH.value,
    lambda message: print(message, file=sys.stderr, flush=True),
    _TOP.value,
  )
  print(json.dumps(plan, indent=1) if _JSON.value else "\n" + plan_tables(plan))


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _TOPOLOGY = flags.DEFINE_string(
    "topology", None, "CHIP:SHAPE, e.g. v3:16x16, v5e:4x4, v5p:4x4x4; or list."
  )
  _MESH = flags.DEFINE_string(
    "mesh",
    "",
    "Sizes of mesh axes instead of the config's, e.g. fsdp:16,tensor:2; data takes what remains.",
  )
  _GRANULARITIES = flags.DEFINE_list(
    "granularities", [], "What to plan, e.g. S,XL; default all trained sizes."
  )
  _DECODE_BATCH = flags.DEFINE_integer(
    "decode_batch", 0, "Also plan decoding of this many sequences with a full cache.", lower_bound=0
  )
  _TOP = flags.DEFINE_integer(
    "top", 0, "Also name this many of each step's dearest operations.", lower_bound=0
  )
  _JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")
  flags.adopt_module_key_flags(cli)
  cli.run(main)
