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
import numpy as np
import optax

from matformer_jax import granularity as gran
from matformer_jax import models, sharding, tables
from matformer_jax.config import Execution, ModelConfig
from matformer_jax.config_keys import Config
from matformer_jax.hosts.multihost import Hosts
from matformer_jax.models import slicing
from matformer_jax.runtime import say
from matformer_jax.tasks import Task
from matformer_jax.training import auto, distill, methods, optim, sliced
from matformer_jax.training.distill import Distillation
from matformer_jax.training.methods import StepKind


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
  kind: StepKind,
  grad_accum: int = 1,
  distillation: Distillation | None = None,
  update_slice: bool = False,
):
  """The update of one kind of step: (state, batch, *told, *parent) -> (state, metrics).

  `told` are int32 [L], the sizes of the layers, for a layerwise step only. `parent` are a
  parent's parameters, where the run distils from one. A size that has a teacher runs it forward
  in the same program.

  The gradient of a size is taken, and accumulated over `grad_accum` micro-batches, on the
  sliced tree; slicing's transpose pads it with exact zeros, and the optimizer is applied to
  the full tree, to the mean of the gradients of all sizes of the step; with `update_slice` only
  to the slice of the one size. Where loss, gradient or what the update would leave is not
  finite, parameters and optimizer state are returned unchanged, bit for bit.

  Metrics are means over the batch: `loss`, `kl` over what has a teacher, and where a step has
  several sizes their `losses`, in the order of `kind`.
  """
  model = task.model_config
  sharded = sharding.batch_shards(execution.mesh) > 1
  execution = dataclasses.replace(execution, per_device=sharded)

  def is_taught(granularity: gran.Granularity) -> bool:
    if distillation is None:
      return False
    return kind.layerwise or distillation.teaches(granularity)

  def gradient_of(granularity: gran.Granularity):
    """(params, batch, *told, *teacher's) -> (measured, gradient, its norm)."""
    sub_config = gran.submodel_config(model, granularity)

    def on_rows(told, params, batch, *teacher_params):
      teacher = distillation.teacher(*teacher_params) if distillation and teacher_params else None
      loss = functools.partial(task.loss, sub_config, execution, teacher=teacher, **told)
      (_, measured), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
      return measured, grads

    def gradient(params, batch, *rest):
      told = {"layer_indices": rest[0]} if kind.layerwise else {}
      accumulated = functools.partial(_accumulate, functools.partial(on_rows, told), grad_accum)
      if sharded:
        accumulated = sharding.on_each_device(
          accumulated, execution.mesh, execution.slice_grad_dtype
        )
      sub_params, unslice = jax.vjp(
        lambda params: slicing.slice_params(params, model, granularity), params
      )
      teacher_params = (rest[len(told) :] or (params,)) if is_taught(granularity) else ()
      measured, sub_grads = accumulated(sub_params, batch, *teacher_params)
      norm = optax.tree.norm(sub_grads)
      return measured, sub_grads if update_slice else unslice(sub_grads)[0], norm

    return gradient

  gradients = [gradient_of(g) for g in kind.granularities or (gran.full(model),)]

  def train_step(state: TrainState, batch, *rest):
    batch = task.preprocess(batch)
    if len(gradients) == 1:
      measured, grads, grad_norm = gradients[0](state.params, batch, *rest)
    else:
      taught = sum(map(is_taught, kind.granularities))
      measured, grads = _mean_gradient(gradients, taught, state.params, batch, *rest)
      grad_norm = optax.tree.norm(grads)
    old = state
    if update_slice:
      old = sliced.take(state, state.params, model, kind.granularities[0])
    updates, opt_state = optimizer.update(grads, old.opt_state, old.params)
    new = TrainState(optax.apply_updates(old.params, updates), opt_state)
    finite = jnp.isfinite(measured["loss"]) & jnp.isfinite(grad_norm) & _is_sane(new)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
    new = sliced.put(state, new) if update_slice else new
    return new, measured | {"grad_norm": grad_norm, "finite": finite}

  return train_step


def _mean_gradient(gradients, taught: int, params, batch, *rest):
  """(measured, gradient): each of `gradients` on its part of the batch, one after the other.

  A loop, not a sequence, whose sizes XLA would interleave: so the activations of one size are
  held at a time.

  Args:
    taught: how many of the sizes have a teacher.
  """
  parts = len(gradients)
  # Row r is of part r % parts, so that every device has its share of each.
  split = jax.tree.map(lambda x: x.reshape((-1, parts) + x.shape[1:]).swapaxes(0, 1), batch)

  def branch(gradient):
    def run(part):
      measured, grads, _ = gradient(params, part, *rest)
      return measured["loss"], measured.get("kl", jnp.zeros(())), grads

    return run

  branches = list(map(branch, gradients))

  def add(total, xs):
    index, part = xs
    loss, kl, grads = jax.lax.switch(index, branches, part)
    return jax.tree.map(jnp.add, total, grads), (loss, kl)

  zeros = jax.tree.map(jnp.zeros_like, params)
  total, (losses, kl) = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
  measured = {"loss": jnp.mean(losses), "losses": losses}
  if taught:
    measured["kl"] = jnp.sum(kl) / taught
  return measured, jax.tree.map(lambda x: x / parts, total)


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
    """FLOPs of a sampled step on all devices, without recomputation: what MFU counts.

    Three forward passes of the granularity, and where it has a teacher one of the teacher.
    """
    model = self.task.model_config
    flops = gran.count(model, granularity).train_flops
    if self.distillation is not None:
      flops += self.distillation.flops(granularity, model.num_tokens)
    return flops * self.task.examples_per_step

  def step_flops(self, kind: StepKind) -> float:
    """The same of any kind of step; of a layerwise one, what is expected."""
    return methods.mean_cost(kind, self.granularities, self.probabilities, self.model_flops)

  def budget(self) -> str:
    """What the whole run takes, beside its largest size trained alone on as many examples."""
    task, steps = self.task, self.config.steps
    flops = steps * sum(kind.probability * self.step_flops(kind) for kind in self.kinds)
    examples = steps * task.examples_per_step
    alone = gran.count(task.model_config, self.granularities[-1]).train_flops * examples
    return (
      f"budget: {methods.of(self.config)}, {steps:,} steps, {tables.si(examples)} "
      f"{task.examples_unit}, {flops:.3g} FLOPs: {flops / alone:.2f}x of {self.names[-1]} alone"
    )

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    return optim.make_optimizer(self.config.optim, self.config.steps, self.task.model_config)

  @functools.cached_property
  def granularities(self) -> list[gran.Granularity]:
    return gran.trained(self.task.model_config)

  @functools.cached_property
  def probabilities(self) -> tuple[float, ...]:
    """`config.sampling`, one per granularity."""
    return methods.size_probabilities(self.config, self.task.model_config)

  @functools.cached_property
  def kinds(self) -> tuple[StepKind, ...]:
    """The kinds of steps, by `config.method`; those of `sampled` are the granularities."""
    return methods.step_kinds(self.config, self.task.model_config)

  def draw(self, step: int) -> tuple[int, tuple[np.ndarray, ...]]:
    """(which of `kinds` a step is, what its program is told beside the batch)."""
    seed = self.config.seed
    index = gran.sample_index(seed, step, [kind.probability for kind in self.kinds])
    if not self.kinds[index].layerwise:
      return index, ()
    num_layers = self.task.model_config.num_layers
    return index, (gran.sample_layers(seed, step, self.probabilities, num_layers),)

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

  def trace(self, kind: gran.Granularity | StepKind):
    """The jitted step of a kind, or of one granularity, traced for the shapes of this run."""
    if isinstance(kind, gran.Granularity):
      kind = StepKind(gran.to_text(kind, self.task.model_config), (kind,), 1.0)
    step = make_train_step(
      self.task,
      self.execution,
      self.optimizer,
      kind,
      self.config.grad_accum,
      self.distillation,
      optim.updates_slice(self.config.optim),
    )
    jitted = jax.jit(
      step, donate_argnums=0, out_shardings=(self._state_shardings, self._replicated)
    )
    place = sharding.batch_sharding(self.mesh)
    batch = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
      self.task.batch_shapes(self.config.batch_size),
    )
    layers = jax.ShapeDtypeStruct(
      (self.task.model_config.num_layers,), jnp.int32, sharding=self._replicated
    )
    told = (layers,) if kind.layerwise else ()
    return jitted.trace(self.abstract_state, batch, *told, *self.abstract_parent)

  @property
  def _replicated(self):
    return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

  def lower(self, kind: gran.Granularity | StepKind):
    """The same, lowered."""
    return self.trace(kind).lower()

  def compile(self) -> dict[int, Callable]:
    """Compiles the kinds of steps that occur, in parallel."""
    wanted = [i for i, kind in enumerate(self.kinds) if kind.probability > 0]
    started = time.perf_counter()
    programs = {}
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
      futures = {pool.submit(lambda i=i: self.lower(self.kinds[i]).compile()): i for i in wanted}
      while len(programs) < len(wanted):
        # A bounded wait lets signal handlers run on the main thread.
        done, _ = concurrent.futures.wait(futures, 0.2, concurrent.futures.FIRST_COMPLETED)
        for future in done:
          index = futures.pop(future)
          programs[index] = future.result()
          say(
            f"compiled {self.kinds[index].name} ({len(programs)}/{len(wanted)}) after "
            f"{time.perf_counter() - started:.1f} s"
          )
    return programs
