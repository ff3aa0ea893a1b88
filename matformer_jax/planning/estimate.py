"""Compiles one program for a TPU and reads memory, collectives and time out of the result."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import math
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import MatLMConfig, ModelConfig
from matformer_jax.decoding.decode import Decoder, State
from matformer_jax.models import attention
from matformer_jax.models import cache as kv
from matformer_jax.tpu import chips, hlo
from matformer_jax.training import auto
from matformer_jax.training.trainer import Trainer

# [T, T] x H products of the attention kernel; forward twice where its result is not kept.
KERNEL_FORWARD, KERNEL_BACKWARD, KERNEL_BACKWARD_FUSED = 2, 7, 5
KERNEL_KEPT = ("none", "products")  # remat policies


def matmul_flops(jaxpr) -> float:
  """FLOPs of all matrix products in a jaxpr; loops counted as often as they run."""
  return sum(times * _product_flops(eqn) for eqn, times in equations(jaxpr, "dot_general"))


def _product_flops(eqn) -> float:
  (contract, _), _ = eqn.params["dimension_numbers"]
  depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth


def equations(jaxpr, primitive: str, times: int = 1) -> Iterator[tuple[Any, int]]:
  """(equation, how often it runs) of a primitive, outside of kernels; in every branch."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == primitive:
      yield eqn, times
    elif eqn.primitive.name != "pallas_call":
      for value in eqn.params.values():
        for inner in _jaxprs(value):
          yield from equations(inner, primitive, times * eqn.params.get("length", 1))


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

  def seconds(self, tpu: chips.Tpu) -> float:
    """Attention at a core's peak; the loss at less, or at its memory's rate."""
    rate, bandwidth = loss_efficiency(tpu) * tpu.core_flops, tpu.core_hbm_bytes_per_s
    loss = sum(max(flops / rate, moved / bandwidth) for flops, moved in self.loss)
    return self.attention / tpu.core_flops + loss


def loss_efficiency(tpu: chips.Tpu) -> float:
  """Of the peak, that the loss's kernels are taken to reach.

  The instructions that the compiler schedules for a tile fit into the time of its products at
  peak where d_model is 1536 or more, and take 1.13 times as long where it is 256; 1.4 times on
  a v4, whose tiles are small. Waiting for memory is not in them.
  """
  return 0.85 if tpu.vmem_bytes >= 64 * chips.MIB else 0.7


def work(trainer: Trainer, granularity: gran.Granularity, jaxpr) -> tuple[Kernels, float]:
  """(kernels, FLOPs of all products) of a traced step on one device."""
  own = kernels(trainer, granularity, jaxpr)
  return own, matmul_flops(jaxpr) / trainer.mesh.shape[sharding.TENSOR] + own.flops


def kernels(trainer: Trainer, granularity: gran.Granularity, jaxpr) -> Kernels:
  """The kernels of a traced step."""
  calls = [
    (eqn.params["cost_estimate"], times)
    for eqn, times in equations(jaxpr, "pallas_call")
    if eqn.params["cost_estimate"] and "splash" not in str(eqn.params["name"])
  ]
  loss = [(c.flops, c.bytes_accessed) for c, times in calls for _ in range(times)]
  return Kernels(attention_flops(trainer, granularity), loss)


def attention_flops(
  trainer: Trainer, granularity: gran.Granularity, blocks: tuple[int, bool] | None = None
) -> float:
  """Of the attention kernel: of the blocks that it does not skip, heads padded to 128 lanes.

  Args:
    blocks: as from `attention.kernel_block`, which is the default.
  """
  config = trainer.task.model_config
  length = config.num_tokens
  if not attention.runs_kernel(length, trainer.execution):
    return 0.0

  def products(model: ModelConfig, size: gran.Granularity, block: int, count: int) -> float:
    """FLOPs of `count` products in every head."""
    area = product_area(length, block, model.causal)
    heads = sum(model.head_counts[i] for i in size.heads)
    return heads * count * 2 * area * attention.kernel_width(model.head_dim)

  block, fused = blocks or attention.kernel_block(length, config.head_dim)
  forward = KERNEL_FORWARD * (1 if trainer.execution.remat in KERNEL_KEPT else 2)
  backward = KERNEL_BACKWARD_FUSED if fused else KERNEL_BACKWARD
  flops = products(config, granularity, block, forward + backward)
  distillation = trainer.distillation
  if distillation is not None and distillation.teaches(granularity):
    teacher = distillation.model
    block, _ = attention.kernel_block(length, teacher.head_dim)
    flops += products(teacher, gran.full(teacher), block, KERNEL_FORWARD)
  rows = trainer.config.batch_size / sharding.batch_shards(trainer.mesh)
  return rows * flops / trainer.mesh.shape[sharding.TENSOR]


def product_area(length: int, block: int, causal: bool) -> float:
  """Scores that attention in blocks computes of [T, T]."""
  blocks = length // block
  return length**2 * ((blocks + 1) / (2 * blocks) if causal else 1.0)


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


def least_seconds(trainer: Trainer, granularity: gran.Granularity, tpu: chips.Tpu) -> float:
  """A step's matrix products at the chip's peak: known before anything is compiled."""
  _, flops = work(trainer, granularity, trainer.trace(granularity).jaxpr.jaxpr)
  return flops / tpu.core_flops


def plan_step(
  trainer: Trainer, granularity: gran.Granularity, tpu: chips.Tpu, top: int = 0
) -> dict[str, Any]:
  """Memory, communication and time of one granularity's train step on one device.

  With `top`, also that many of its dearest operations, and of the collectives nothing hides.
  """
  state, capacity = trainer.abstract_state, tpu.core_hbm_bytes
  parts = {
    "parameters": auto.tree_bytes(state.params),
    "optimizer": auto.tree_bytes(state.opt_state),
  }
  if trainer.abstract_parent:
    parts["teacher"] = auto.tree_bytes(trainer.abstract_parent)
  arguments = sum(parts.values())
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
  parts["batch and other"] = used["arguments"] + used["outputs"] - arguments
  own, flops = work(trainer, granularity, traced.jaxpr.jaxpr)
  timed = timing(text, own, flops, used, tpu, trainer.mesh.shape[sharding.SLICES])
  useful = trainer.model_flops(granularity)
  return result | {
    "fits": sum(parts.values()) <= capacity,
    "hbm_bytes_per_core": sum(parts.values()),
    **timed,
    "flops_per_core": flops,
    "model_flops": useful,
    "mfu": useful / timed["step_time_s"] / (trainer.mesh.size * tpu.core_flops),
    "tokens_per_s": trainer.task.examples_per_step / timed["step_time_s"],
    "compile_s": time.perf_counter() - started,
    **({"top": dearest(text, tpu, top)} if top else {}),
  }


def timing(
  text: str, own: Kernels, flops: float, used: dict[str, int], tpu: chips.Tpu, slices: int = 1
) -> dict[str, Any]:
  """Communication and time of one run of a program on one device.

  Args:
    text: its optimized HLO.
    own: its Pallas kernels.
    flops: of its matrix products and kernels.
    used: its `memory`.
    tpu: the chip it was compiled for.
    slices: that run it together.
  """
  collectives = hlo.collectives(text)
  kinds = {kind: [c for c in collectives if c.kind == kind] for kind in hlo.KINDS}
  wire = sum(c.wire_bytes for c in collectives)
  exposed = sum(c.wire_bytes for c in collectives if not c.hidden)
  moved = used["arguments"] + used["outputs"] + 2 * used["temporaries"]
  bounds = {
    "compute_s": flops / tpu.core_flops,
    # Every live byte is written and read at least once.
    "memory_s": moved / tpu.core_hbm_bytes_per_s,
    "network_s": wire / (tpu.links * tpu.link_bytes_per_s / tpu.cores_per_chip),
  }
  crossing = sum(c.wire_bytes for c in hlo.crossings(text, slices))
  # Where the rate is not published the estimate is without it.
  between_s = crossing / tpu.core_dcn_bytes_per_s if tpu.dcn_bytes_per_s else 0.0
  cycles = hlo.estimated_cycles(text)
  busy = cycles / tpu.clock_hz + own.seconds(tpu)
  busy = max(busy, bounds["compute_s"], bounds["memory_s"])
  # Around one ring, both ways: what XLA does not hide behind computation adds to the step.
  # Slices wait for each other, too, as if nothing hid that.
  step_time = busy + exposed / tpu.core_ring_bytes_per_s + between_s
  return {
    "collective_bytes": {k: sum(c.bytes * c.times for c in v) for k, v in kinds.items() if v},
    "collective_count": {k: sum(c.arrays * c.times for c in v) for k, v in kinds.items() if v},
    "wire_bytes": int(wire),
    "exposed_wire_bytes": int(exposed),
    "slice_wire_bytes": int(crossing),
    "slice_s": between_s,
    "estimated_cycles": cycles,
    "bounds": bounds,
    "step_time_s": step_time,
  }


def dearest(text: str, tpu: chips.Tpu, top: int) -> dict[str, list[dict[str, Any]]]:
  """The `top` operations of a program by estimated time, and collectives that nothing hides."""
  ring = tpu.core_ring_bytes_per_s
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
  # A loaded model's layers are a loop on TPU, however they were trained.
  execution = dataclasses.replace(trainer.execution, remat="none", scan_layers=True)
  decoder = Decoder(config, execution, granularity)
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
  capacity = tpu.core_hbm_bytes
  try:
    compiled, text = compile_program(Decoder._advance.lower(decoder, weights, state, jnp.int32(1)))
  except DoesNotFit as e:
    return {"fits": False, "hbm_bytes_per_core": e.bytes, "hbm_capacity": capacity}
  used = memory(compiled)
  # One pass through the loop; what is read must be read once a token.
  exposed = sum(c.wire_bytes for c in hlo.collectives(text))
  seconds = max(
    hlo.estimated_cycles(text) / tpu.clock_hz,
    used["arguments"] / tpu.core_hbm_bytes_per_s,
  )
  seconds += exposed / tpu.core_ring_bytes_per_s
  return {
    "fits": sum(used.values()) <= capacity,
    "hbm_bytes_per_core": sum(used.values()),
    "hbm_capacity": capacity,
    "token_time_s": seconds,
    "tokens_per_s": batch / seconds,
  }
