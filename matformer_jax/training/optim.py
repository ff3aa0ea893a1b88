"""Learning-rate schedules and optimizers, all from optax."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from matformer_jax.config import ModelConfig
from matformer_jax.config_keys import OptimKeys
from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.sharding import logical_axes, path_names
from matformer_jax.training import muon

OPTIMIZERS = ("adamw", "adafactor", "sgd", "muon")
SCHEDULES = ("cosine", "rsqrt", "constant")
SCOPES = ("full", "sliced")
MUON_BLOCKS = ("whole", "nested")


def make_schedule(config: OptimKeys, total_steps: int) -> optax.Schedule:
  """Learning rate by the number of updates already made: 0 gives that of the first update.

  Args:
    config: `config.optim`: schedule, peak_lr, warmup_steps, final_lr_ratio.
    total_steps: length of the run; the cosine ends there. A run not longer than
      its warm-up warms up over its first half instead.

  Returns:
    The first update has peak_lr / warmup, update number `warmup` has peak_lr. From there on,
    with updates numbered from 1:
    cosine: a cosine that reaches final_lr_ratio * peak_lr at the last update.
    rsqrt: peak_lr * sqrt(warmup / number) (Adafactor, T5).
    constant: peak_lr.
  """
  warmup = warmup_steps(config, total_steps)
  if config.schedule == "cosine":
    by_number = optax.warmup_cosine_decay_schedule(
      0.0,
      config.peak_lr,
      warmup,
      max(total_steps, warmup + 1),
      config.peak_lr * config.final_lr_ratio,
    )
  elif config.schedule in ("rsqrt", "constant"):
    rise = optax.linear_schedule(0.0, config.peak_lr, warmup)
    fall = lambda after: config.peak_lr * jnp.sqrt(warmup / (jnp.maximum(after, 0) + warmup))
    rest = fall if config.schedule == "rsqrt" else optax.constant_schedule(config.peak_lr)
    by_number = optax.join_schedules([rise, rest], [warmup])
  else:
    raise UserError(
      f"optim.schedule={config.schedule!r} is unknown"
      f"{did_you_mean(str(config.schedule), SCHEDULES)}"
    )
  return lambda updates_made: by_number(updates_made + 1)


def warmup_steps(config: OptimKeys, total_steps: int) -> int:
  """`config.warmup_steps`, or half of a run that is not longer than that; at least 1."""
  asked = max(1, int(config.warmup_steps))
  return asked if asked < total_steps else max(1, total_steps // 2)


def updates_slice(config: OptimKeys) -> bool:
  """Whether an update touches only the sampled slice; see sliced.py. Runs made before there was a
  choice did not.

  Raises:
    UserError: for an unknown scope, or an optimizer that has no slices.
  """
  scope = getattr(config, "scope", "full")
  if scope not in SCOPES:
    raise UserError(f"optim.scope={scope!r} is unknown{did_you_mean(str(scope), SCOPES)}")
  if scope == "sliced" and config.name == "adafactor":
    raise UserError(
      "optim.scope='sliced' cannot be of Adafactor, whose factored moments are sums over all "
      "neurons; use optim.name=adamw, sgd or muon"
    )
  return scope == "sliced"


def is_matrix(params):
  """True for what weight decay applies to: matrices, not scales, biases and positions.

  A matrix is what has a sharded axis of d_model, "embed" in sharding.py.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "embed" in logical_axes(path_names(path)), params
  )


def muon_or_adamw(params):
  """Which of the two `optim.name=muon` gives each leaf: "muon" to the blocks' matrices."""
  return jax.tree_util.tree_map_with_path(
    lambda path, matrix: "muon" if matrix and path_names(path)[0] == "blocks" else "adamw",
    is_matrix(params),
  )


def make_optimizer(
  config: OptimKeys, total_steps: int, model: ModelConfig | None = None
) -> optax.GradientTransformation:
  """Global-norm clipping, then one of `OPTIMIZERS`, decaying matrices only.

  SGD has momentum. Muon, which muon.py describes, updates the blocks' matrices, and AdamW, with
  the same learning rate and weight decay, everything else.

  Args:
    config: `config.optim`, see configs/matlm.py and configs/matvit.py for its keys.
    total_steps: length of the run.
    model: what is trained; `muon_blocks=nested` needs it.

  Raises:
    UserError: for an unknown optimizer or schedule, or Muon's options out of range.
  """
  schedule = make_schedule(config, total_steps)
  adamw = optax.adamw(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=is_matrix,
  )
  if config.name == "adamw":
    update = adamw
  elif config.name == "muon":
    update = optax.partition(
      {"muon": _muon(config, schedule, model), "adamw": adamw}, muon_or_adamw
    )
  elif config.name == "adafactor":
    # optax decays by weight_decay_rate per step, not times the learning rate.
    # Attention matrices are stored per head, so their inner dimensions are small.
    update = optax.adafactor(
      schedule,
      min_dim_size_to_factor=32,
      weight_decay_mask=is_matrix,
      weight_decay_rate=config.weight_decay or None,
    )
  elif config.name == "sgd":
    update = optax.chain(
      optax.add_decayed_weights(config.weight_decay, is_matrix),
      optax.sgd(schedule, config.momentum),
    )
  else:
    raise UserError(
      f"optim.name={config.name!r} is unknown{did_you_mean(str(config.name), OPTIMIZERS)}"
    )
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  return optax.chain(*clip, update)


def _muon(
  config: OptimKeys, schedule: optax.Schedule, model: ModelConfig | None
) -> optax.GradientTransformation:
  if not 0 <= config.muon_momentum < 1:
    raise UserError(
      f"optim.muon_momentum={config.muon_momentum!r} must be at least 0 and below 1, e.g. 0.95"
    )
  if not 0 <= config.muon_rms < math.inf:
    raise UserError(
      f"optim.muon_rms={config.muon_rms!r} must be positive, e.g. 0.2, or 0 for Jordan's scale"
    )
  blocks = getattr(config, "muon_blocks", "whole")  # runs made before there was a choice
  if blocks not in MUON_BLOCKS:
    raise UserError(
      f"optim.muon_blocks={blocks!r} is unknown{did_you_mean(str(blocks), MUON_BLOCKS)}"
    )
  cuts = muon.nested_cuts(model) if blocks == "nested" and model else None
  return optax.chain(
    muon.scale_by_block_muon(config.muon_momentum, config.muon_rms, cuts),
    optax.add_decayed_weights(config.weight_decay),
    optax.scale_by_learning_rate(schedule),
  )
