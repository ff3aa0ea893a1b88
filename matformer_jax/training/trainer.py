"""The train step of each granularity, and what it needs on a mesh: shapes, shardings, programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from matformer_jax import granularity as gran
from matformer_jax import models, sharding
from matformer_jax.config import Execution, ModelConfig
from matformer_jax.config_keys import Config
from matformer_jax.hosts.multihost import Hosts
from matformer_jax.models import slicing
from matformer_jax.runtime import say
from matformer_jax.tasks import Task
from matformer_jax.training import auto, distill, optim
from matformer_jax.training.distill import Distillation


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("params", "opt_state"), meta_fields=()
)
@dataclasses.dataclass
class TrainState:
  """Universal parameters and optimizer state; the step is the loop's."""

  params: Any
  opt_state: Any


def make_train_step(
  task: Task,
  execution: Execution,
  optimizer: optax.GradientTransformation,
  granularity: gran.Granularity,
  grad_accum: int = 1,
  distillation: Distillation | None = None,
):
  """The update of one granularity: (state, batch, *parent) -> (state, metrics).

  `parent` are a parent's parameters, where the run distils from one. A size that has a teacher
  runs it forward in the same program.

  The gradient is taken, and accumulated over `grad_accum` micro-batches, on the
  sliced tree; slicing's transpose pads it with exact zeros, and the optimizer is
  applied to the full tree. Where loss, gradient or what the update would leave is not
  finite, parameters and optimizer state are returned unchanged, bit for bit.
  """
  sub_config = gran.submodel_config(task.model_config, granularity)
  sharded = sharding.batch_shards(execution.mesh) > 1
  loss_fn = functools.partial(
    task.loss, sub_config, dataclasses.replace(execution, per_device=sharded)
  )

  def gradient(params, batch, *teacher_params):
    teacher = distillation.teacher(*teacher_params) if distillation and teacher_params else None
    value_and_grad = jax.value_and_grad(functools.partial(loss_fn, teacher=teacher), has_aux=True)
    (_, measured), grads = value_and_grad(params, batch)
    return measured, grads

  accumulated = functools.partial(_accumulate, gradient, grad_accum)
  if sharded:
    accumulated = sharding.on_each_device(accumulated, execution.mesh)

  def train_step(state: TrainState, batch, *parent):
    sub_params, unslice = jax.vjp(
      lambda params: slicing.slice_params(params, task.model_config, granularity), state.params
    )
    teaches = distillation is not None and distillation.teaches(granularity)
    teacher_params = (parent or (state.params,)) if teaches else ()
    measured, sub_grads = accumulated(sub_params, task.preprocess(batch), *teacher_params)
    grad_norm = optax.tree.norm(sub_grads)
    (grads,) = unslice(sub_grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = TrainState(optax.apply_updates(state.params, updates), opt_state)
    finite = jnp.isfinite(measured["loss"]) & jnp.isfinite(grad_norm) & _is_sane(updated)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return state, measured | {"grad_norm": grad_norm, "finite": finite}

  return train_step


def _is_sane(state: TrainState) -> jax.Array:
  """Whether a state can be trained on: no infinity or NaN, and parameters of finite norm.

  XLA fuses the sums with the update that writes these arrays.
  """
  moments = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
  total = sum((jnp.sum(x, dtype=jnp.float32) for x in moments), jnp.float32(0))
  return jnp.isfinite(total) & jnp.isfinite(optax.tree.norm(state.params))


def _accumulate(gradient, parts: int, params, batch, *frozen):
  """Mean of what is measured and of the gradient over `parts` micro-batches."""
  if parts == 1:
    return gradient(params, batch, *frozen)
  split = lambda x: x.reshape((x.shape[0] // parts, parts) + x.shape[1:]).swapaxes(0, 1)

  def add(sums, micro_batch):
    return jax.tree.map(jnp.add, sums, gradient(params, micro_batch, *frozen)), None

  one = lambda batch: gradient(params, jax.tree.map(lambda x: split(x)[0], batch), *frozen)
  measured, _ = jax.eval_shape(one, batch)
  zeros = (jax.tree.map(lambda _: jnp.zeros(()), measured), jax.tree.map(jnp.zeros_like, params))
  sums, _ = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
  return jax.tree.map(lambda x: x / parts, sums)


def _with_shardings(shapes, shardings):
  return jax.tree.map(
    lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings
  )


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A task on a mesh: shapes, shardings and compiled steps."""

  task: Task
  config: Config
  mesh: jax.sharding.Mesh

  @functools.cached_property
  def execution(self) -> Execution:
    """How the steps run."""
    return auto.choose_execution(
      self.config, self.task.model_config, self.mesh, self.abstract_state, self.stored_parent
    )

  @functools.cached_property
  def distillation(self) -> Distillation | None:
    """How the sizes learn from a teacher. Raises UserError as `distill.from_config`."""
    return distill.from_config(self.config, self.task.model_config, self.mesh)

  @functools.cached_property
  def stored_parent(self) -> Any:
    """Shapes, dtypes and shardings of a parent's parameters in its checkpoint; None without."""
    distillation = self.distillation
    if distillation is None or not distillation.parent:
      return None
    return self.abstract_params(distillation.model)

  @functools.cached_property
  def abstract_parent(self) -> tuple[Any, ...]:
    """The same, as the steps take it as their last argument; () without a parent."""
    if self.stored_parent is None:
      return ()
    return (distill.abstract_parent(self.stored_parent, self.execution.dtype),)

  def load_parent(self, hosts: Hosts) -> tuple[tuple[Any, ...], str]:
    """(the steps' last argument, fingerprint of a parent's weights or "")."""
    if self.distillation is None or self.stored_parent is None:
      return (), ""
    params, fingerprint = distill.load_parent(
      self.distillation, self.stored_parent, self.execution.dtype, hosts
    )
    return (params,), fingerprint

  def model_flops(self, granularity: gran.Granularity) -> int:
    """FLOPs of a step on all devices, without recomputation: what MFU counts.

    Three forward passes of the granularity, and where it has a teacher one of the teacher.
    """
    model = self.task.model_config
    flops = gran.count(model, granularity).train_flops
    if self.distillation is not None:
      flops += self.distillation.flops(granularity, model.num_tokens)
    return flops * self.task.examples_per_step

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    return optim.make_optimizer(self.config.optim, self.config.steps)

  @functools.cached_property
  def granularities(self) -> list[gran.Granularity]:
    return gran.trained(self.task.model_config)

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
    params = models.init_params(self.task.model_config, rng)
    return TrainState(params, self.optimizer.init(params))

  def abstract_params(self, model_config: ModelConfig) -> Any:
    """Shapes, dtypes and shardings of any model's parameters on this mesh."""
    shapes = jax.eval_shape(lambda: models.init_params(model_config, jax.random.key(0)))
    return _with_shardings(shapes, sharding.param_shardings(shapes, self.mesh))

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(self._init, jax.random.key(0))
    shardings = TrainState(
      sharding.param_shardings(shapes.params, self.mesh),
      sharding.state_shardings(shapes.opt_state, shapes.params, self.mesh),
    )
    return _with_shardings(shapes, shardings)

  @property
  def _state_shardings(self):
    return jax.tree.map(lambda s: s.sharding, self.abstract_state)

  def init(self, seed: int) -> TrainState:
    """A fresh state; its values do not depend on the mesh."""
    return jax.jit(self._init, out_shardings=self._state_shardings)(jax.random.key(seed))

  def put(self, read: Callable[[range], Any], batch_size: int | None = None) -> Any:
    """A global batch, of which each process reads the rows that its devices hold.

    Args:
      read: rows of the global batch -> a tree of arrays [rows, ...].
      batch_size: B; default the training batch.

    Returns:
      The same tree with arrays [B, ...], sharded over the batch axes.
    """
    size: int = batch_size or self.config.batch_size
    place = sharding.batch_sharding(self.mesh)
    parts = {rows: read(rows) for rows in self.local_rows(size)}
    leaves = {rows: jax.tree.leaves(part) for rows, part in parts.items()}
    some = next(iter(parts.values()))
    return jax.tree.unflatten(
      jax.tree.structure(some),
      [
        jax.make_array_from_callback(
          (size, *leaf.shape[1:]),
          place,
          lambda index, i=i: leaves[range(size)[index[0]]][i],
        )
        for i, leaf in enumerate(jax.tree.leaves(some))
      ],
    )

  def batches(self, first: int) -> Iterator[Any]:
    """The training batches that step `first + 1` and the following ones consume."""
    rows = self.local_rows()
    for parts in self.task.batches(first, self.config.steps - 1, rows):
      yield self.put(dict(zip(rows, parts)).__getitem__)

  def batch(self, step: int) -> Any:
    """The training batch that step `step + 1` consumes."""
    return self.put(functools.partial(self.task.batch, step))

  def local_rows(self, batch_size: int | None = None) -> list[range]:
    """Which rows of a batch (default: of the training batch) this process reads."""
    shape = (batch_size or self.config.batch_size,)
    places = sharding.batch_sharding(self.mesh).addressable_devices_indices_map(shape)
    # Devices of a tensor group hold the same rows.
    return sorted({range(shape[0])[index[0]] for index in places.values()}, key=lambda r: r.start)

  def trace(self, granularity: gran.Granularity):
    """The jitted step of a granularity, traced for the shapes of this run."""
    step = make_train_step(
      self.task,
      self.execution,
      self.optimizer,
      granularity,
      self.config.grad_accum,
      self.distillation,
    )
    replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(self._state_shardings, replicated))
    place = sharding.batch_sharding(self.mesh)
    batch = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
      self.task.batch_shapes(self.config.batch_size),
    )
    return jitted.trace(self.abstract_state, batch, *self.abstract_parent)

  def lower(self, granularity: gran.Granularity):
    """The same, lowered."""
    return self.trace(granularity).lower()

  def compile(self) -> dict[int, Callable]:
    """Compiles the step of every granularity that is sampled, in parallel."""
    wanted = [i for i, p in enumerate(self.probabilities) if p > 0]
    started = time.perf_counter()
    programs = {}
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
      futures = {
        pool.submit(lambda i=i: self.lower(self.granularities[i]).compile()): i for i in wanted
      }
      while len(programs) < len(wanted):
        # A bounded wait lets signal handlers run on the main thread.
        done, _ = concurrent.futures.wait(futures, 0.2, concurrent.futures.FIRST_COMPLETED)
        for future in done:
          index = futures.pop(future)
          programs[index] = future.result()
          say(
            f"compiled {self.names[index]} ({len(programs)}/{len(wanted)}) after "
            f"{time.perf_counter() - started:.1f} s"
          )
    return programs
