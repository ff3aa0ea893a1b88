"""The plan of a training run on a slice: every size's step, their mean, what does not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.checkpoints import card as cards
from matformer_jax.config import MatLMConfig
from matformer_jax.config_keys import Config
from matformer_jax.errors import UserError
from matformer_jax.models import attention, losses
from matformer_jax.planning.estimate import plan_decode, plan_step
from matformer_jax.planning.slices import parse_mesh, topology_devices
from matformer_jax.tasks import make_task_without_data
from matformer_jax.tpu import chips
from matformer_jax.training import methods, metrics
from matformer_jax.training.trainer import Trainer


def open_trainer(
  config: Config, topology: str, mesh_sizes: str = "", slices: int = 1
) -> tuple[Trainer, chips.Tpu]:
  """The trainer of a config on a slice, without its data.

  Args:
    mesh_sizes: as `--mesh`; empty takes config.mesh.
    slices: equal ones that train together.

  Raises:
    UserError: for an unknown slice, or sizes that do not divide over it.
  """
  tpu, devices = topology_devices(topology, slices)
  mesh = sharding.make_mesh(parse_mesh(mesh_sizes, config.mesh), devices)
  config = cards.with_model_of_init(config)
  task = make_task_without_data(config)
  sharding.check_model_fits_mesh(task.model_config, mesh)
  if methods.of(config) != "sampled":
    raise UserError(
      f"method={methods.of(config)!r}: plans are of steps of one size; plan with "
      "--config.method=sampled"
    )
  methods.check_batch(config, task.model_config, mesh)
  return Trainer(task, config, mesh), tpu


def make_plan(
  config,
  topology: str,
  mesh_sizes: str = "",
  granularities=(),
  decode_batch: int = 0,
  say=lambda message: None,
  top: int = 0,
  slices: int = 1,
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
    slices: equal ones that train together.
  """
  trainer, tpu = open_trainer(config, topology, mesh_sizes, slices)
  mesh, task = trainer.mesh, trainer.task
  model_config = task.model_config
  if decode_batch and not model_config.causal:
    raise UserError(
      f"--decode_batch={decode_batch}: a model of task {config.task!r} does not decode"
    )
  if decode_batch:
    sharding.check_batch(decode_batch, 1, mesh, "--decode_batch")
  names = list(granularities) or trainer.names
  count = mesh.size // tpu.cores_per_chip
  flash = attention.runs_kernel(model_config.num_tokens, trainer.execution)
  plan: dict[str, Any] = {
    "topology": topology,
    "chips": count,
    "cores": mesh.size,
    "mesh": sharding.sizes(mesh),
    "batch_size": config.batch_size,
    "tokens_per_step": task.examples_per_step,
    "unit": task.examples_unit,
    "grad_accum": config.grad_accum,
    "dtype": trainer.execution.dtype,
    "remat": trainer.execution.remat,
    "attention": "flash" if flash else "blocks",
    "layers": "scanned" if trainer.execution.scan_layers else "unrolled",
    "loss": _loss_in_words(trainer),
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


def loss_cut(trainer: Trainer) -> tuple[int, Any]:
  """(chunks of the logits on a device, tiles of the loss's kernels or None)."""
  config = trainer.task.model_config
  if not isinstance(config, MatLMConfig):
    return 1, None
  parts = sharding.batch_shards(trainer.mesh) * trainer.config.grad_accum
  shape = (trainer.config.batch_size // parts, config.num_tokens, config.d_model)
  execution = dataclasses.replace(trainer.execution, per_device=True)
  dtype, distilled = jnp.dtype(execution.dtype), trainer.distillation is not None
  return losses.cut(shape, config.vocab_size, dtype, execution, distilled)


def _loss_in_words(trainer: Trainer) -> str:
  chunks, tiles = loss_cut(trainer)
  teacher = " with a teacher" if trainer.distillation is not None else ""
  return f"{chunks} chunk{'s'[: chunks > 1]}, {'kernels' if tiles else 'XLA'}{teacher}"


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
      f"{name} needs {row['hbm_bytes_per_core'] / chips.GIB:.2f} GiB a core, "
      f"{missing / chips.GIB:.2f} more than there is: "
    )
    if kept > row["hbm_capacity"] / 2:
      what += (
        f"parameters and optimizer take {kept / chips.GIB:.2f}; raise mesh.fsdp="
        f"{plan['mesh']['fsdp']}"
        + ("" if config.optim.name == "adafactor" else ", or use --config.optim.name=adafactor")
      )
    else:
      ways = [f"--config.grad_accum={2 * plan['grad_accum']}"]
      ways += ["--config.remat=full"] if plan["remat"] != "full" else []
      ways += ["a larger slice, or a smaller --config.batch_size"]
      what += f"activations take {hbm['temporaries'] / chips.GIB:.2f}; try {', '.join(ways)}"
    result.append(what)
  return result
