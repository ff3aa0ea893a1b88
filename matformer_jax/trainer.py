"""The train step of each granularity, and what it needs on a mesh: shapes, shardings, programs."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from matformer_jax import granularity as gran
from matformer_jax import optim, sharding
from matformer_jax.config import Execution
from matformer_jax.runtime import say
from matformer_jax.tasks import Task


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=("params", "opt_state"), meta_fields=())
@dataclasses.dataclass
class TrainState:
  """Universal parameters and optimizer state; the step is the loop's."""

  params: Any
  opt_state: Any


def make_train_step(task: Task, execution: Execution, optimizer: optax.GradientTransformation,
                    granularity: gran.Granularity, grad_accum: int = 1):
  """The update of one granularity: (state, batch) -> (state, metrics).

  The gradient is taken, and accumulated over `grad_accum` micro-batches, on the
  sliced tree; slicing's transpose pads it with exact zeros, and the optimizer is
  applied to the full tree. Where loss or gradient is not finite, parameters and
  optimizer state are returned unchanged, bit for bit.
  """
  sub_config = gran.submodel_config(task.model_config, granularity)
  sharded = sharding.batch_shards(execution.mesh) > 1
  loss_fn = functools.partial(task.loss, sub_config,
                              dataclasses.replace(execution, per_device=sharded))

  def gradient(params, batch):
    (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
    return loss, grads

  accumulated = functools.partial(_accumulate, gradient, grad_accum)
  if sharded:
    accumulated = sharding.on_each_device(accumulated, execution.mesh)

  def train_step(state: TrainState, batch: jax.Array):
    slice_ = functools.partial(task.slice, granularity=granularity)
    sub_params, unslice = jax.vjp(slice_, state.params)
    loss, sub_grads = accumulated(sub_params, batch)
    grad_norm = optax.tree.norm(sub_grads)
    (grads,) = unslice(sub_grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = TrainState(optax.apply_updates(state.params, updates), opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return state, {"loss": loss, "grad_norm": grad_norm, "finite": finite}

  return train_step


def _accumulate(gradient, parts: int, params, batch):
  """Mean loss and gradient over `parts` micro-batches."""
  if parts == 1:
    return gradient(params, batch)
  micro = batch.reshape((batch.shape[0] // parts, parts) + batch.shape[1:]).swapaxes(0, 1)

  def add(sums, micro_batch):
    return jax.tree.map(jnp.add, sums, gradient(params, micro_batch)), None

  zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  sums, _ = jax.lax.scan(add, zeros, micro)
  return jax.tree.map(lambda x: x / parts, sums)


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A task on a mesh: shapes, shardings and compiled steps."""

  task: Task
  config: Any
  mesh: jax.sharding.Mesh

  @functools.cached_property
  def execution(self) -> Execution:
    device = self.mesh.devices.flat[0]
    return Execution.for_platform(device.platform, self.mesh, self.config.dtype, self.config.remat,
                                  device.device_kind)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    return optim.make_optimizer(self.config.optim, self.config.steps)

  @functools.cached_property
  def granularities(self) -> list[gran.Granularity]:
    return gran.uniform(self.task.model_config)

  @functools.cached_property
  def probabilities(self) -> tuple[float, ...]:
    """One per granularity; a model that stores fewer than g gives its last the rest."""
    p = gran.sampling_probabilities(self.config.sampling, self.task.model_config)
    last = len(self.granularities) - 1
    return p[:last] + (sum(p[last:]),)

  @functools.cached_property
  def names(self) -> list[str]:
    """Text of the granularities."""
    return [gran.to_text(g, self.task.model_config) for g in self.granularities]

  def _init(self, rng) -> TrainState:
    params = self.task.init(rng)
    return TrainState(params, self.optimizer.init(params))

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(self._init, jax.random.key(0))
    shardings = TrainState(
        sharding.param_shardings(shapes.params, self.mesh),
        sharding.state_shardings(shapes.opt_state, shapes.params, self.mesh))
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
                        shapes, shardings)

  @property
  def _state_shardings(self):
    return jax.tree.map(lambda s: s.sharding, self.abstract_state)

  def init(self, seed: int) -> TrainState:
    """A fresh state; its values do not depend on the mesh."""
    return jax.jit(self._init, out_shardings=self._state_shardings)(jax.random.key(seed))

  def put(self, read: Callable[[range], np.ndarray], batch_size: int | None = None) -> jax.Array:
    """A global batch, of which each process reads the rows that its devices hold.

    Args:
      read: rows of the global batch -> int32 [rows, T+1].
      batch_size: B; default the training batch.

    Returns:
      int32 [B, T+1], sharded over the batch axes.
    """
    shape = self._batch_shape(batch_size or self.config.batch_size)
    shards = {}

    def shard(index):
      rows = range(shape[0])[index[0]]
      if rows not in shards:  # devices of a tensor group hold the same rows
        shards[rows] = read(rows)
      return shards[rows]

    return jax.make_array_from_callback(shape, sharding.batch_sharding(self.mesh), shard)

  def batch(self, step: int) -> jax.Array:
    """The training batch that step `step + 1` consumes."""
    return self.put(functools.partial(self.task.batch, step))

  def local_rows(self) -> list[range]:
    """Which rows of a training batch this process reads."""
    shape = self._batch_shape(self.config.batch_size)
    places = sharding.batch_sharding(self.mesh).addressable_devices_indices_map(shape)
    rows = {range(shape[0])[index[0]] for index in places.values()}
    return sorted(rows, key=lambda r: r.start)

  def _batch_shape(self, batch_size: int) -> tuple[int, int]:
    return (batch_size, self.task.model_config.seq_len + 1)

  def trace(self, granularity: gran.Granularity):
    """The jitted step of a granularity, traced for the shapes of this run."""
    step = make_train_step(self.task, self.execution, self.optimizer, granularity,
                           self.config.grad_accum)
    replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0,
                     out_shardings=(self._state_shardings, replicated))
    batch = jax.ShapeDtypeStruct(self._batch_shape(self.config.batch_size), jnp.int32,
                                 sharding=sharding.batch_sharding(self.mesh))
    return jitted.trace(self.abstract_state, batch)

  def lower(self, granularity: gran.Granularity):
    """The same, lowered."""
    return self.trace(granularity).lower()

  def compile(self) -> dict[int, Callable]:
    """Compiles the step of every granularity that is sampled, in parallel."""
    wanted = [i for i, p in enumerate(self.probabilities) if p > 0]
    started = time.perf_counter()
    programs = {}
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
      futures = {pool.submit(lambda i=i: self.lower(self.granularities[i]).compile()): i
                 for i in wanted}
      while len(programs) < len(wanted):
        # A bounded wait lets signal handlers run on the main thread.
        done, _ = concurrent.futures.wait(futures, 0.2, concurrent.futures.FIRST_COMPLETED)
        for future in done:
          index = futures.pop(future)
          programs[index] = future.result()
          say(f"compiled {self.names[index]} ({len(programs)}/{len(wanted)}) after "
              f"{time.perf_counter() - started:.1f} s")
    return programs
