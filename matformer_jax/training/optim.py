"""Learning-rate schedules and optimizers, all from optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.sharding import logical_axes, path_names

OPTIMIZERS = ("adamw", "adafactor", "sgd")
SCHEDULES = ("cosine", "rsqrt", "constant")


def make_schedule(config, total_steps: int) -> optax.Schedule:
  """Learning rate by step.

  Args:
    config: `config.optim`: schedule, peak_lr, warmup_steps, final_lr_ratio.
    total_steps: length of the run; the cosine ends there. A run not longer than
      its warm-up warms up over its first half instead.

  Returns:
    cosine: linear warm-up, then cosine to final_lr_ratio * peak_lr.
    rsqrt: linear warm-up, then peak_lr * sqrt(warmup / step) (Adafactor, T5).
    constant: linear warm-up, then peak_lr.
  """
  warmup = warmup_steps(config, total_steps)
  if config.schedule == "cosine":
    return optax.warmup_cosine_decay_schedule(
      0.0,
      config.peak_lr,
      warmup,
      max(total_steps, warmup + 1),
      config.peak_lr * config.final_lr_ratio,
    )
  rise = optax.linear_schedule(0.0, config.peak_lr, warmup)
  if config.schedule == "rsqrt":
    fall = lambda step: config.peak_lr * jnp.sqrt(warmup / jnp.maximum(step + warmup, 1))
    return optax.join_schedules([rise, fall], [warmup])
  if config.schedule == "constant":
    return optax.join_schedules([rise, optax.constant_schedule(config.peak_lr)], [warmup])
  raise UserError(
    f"optim.schedule={config.schedule!r} is unknown{did_you_mean(str(config.schedule), SCHEDULES)}"
  )


def warmup_steps(config, total_steps: int) -> int:
  """`config.warmup_steps`, or half of a run that is not longer than that; at least 1."""
  asked = max(1, int(config.warmup_steps))
  return asked if asked < total_steps else max(1, total_steps // 2)


def is_matrix(params):
  """True for what weight decay applies to: matrices, not scales, biases and positions.

  A matrix is what has a sharded axis of d_model, "embed" in sharding.py.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "embed" in logical_axes(path_names(path)), params
  )


def make_optimizer(config, total_steps: int) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW, Adafactor or SGD with momentum, decaying matrices only.

  Args:
    config: `config.optim`, see configs/matlm.py and configs/matvit.py for its keys.
    total_steps: length of the run.

  Raises:
    UserError: for an unknown optimizer or schedule.
  """
  schedule = make_schedule(config, total_steps)
  if config.name == "adamw":
    update = optax.adamw(
      schedule,
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=is_matrix,
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
