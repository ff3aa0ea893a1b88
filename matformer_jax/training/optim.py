"""Learning-rate schedules and optimizers, all from optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from matformer_jax.config_keys import OptimKeys
from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.sharding import logical_axes, path_names

OPTIMIZERS = ("adamw", "adafactor", "sgd")
SCHEDULES = ("cosine", "rsqrt", "constant")


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


def is_matrix(params):
  """True for what weight decay applies to: matrices, not scales, biases and positions.

  A matrix is what has a sharded axis of d_model, "embed" in sharding.py.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "embed" in logical_axes(path_names(path)), params
  )


def make_optimizer(config: OptimKeys, total_steps: int) -> optax.GradientTransformation:
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
