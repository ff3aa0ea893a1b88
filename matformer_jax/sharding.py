"""Where sharding is written: leaf name -> logical axes -> mesh axes.

Logical axes also say what nesting slices: `neurons` and `heads` are the axes a
granularity shortens. Both are inside a group axis that tensor parallelism
shards, so a shorter slice stays on its device and costs no collective.

Mesh axes: `slices` (replicas in other slices, over the data-center network), `data` (replicas),
`fsdp` (parameters sharded along d_model, batch sharded too), `tensor` (groups of neurons and
heads, vocabulary).

Everything that trains or decodes takes its specs from here. Two computations that are not a
model's split their own arrays with these mesh axes: exact nearest-neighbour search
(evals/retrieval.py) and the comparison of replicas (checkpoints/replicas.py).
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import functools

import jax
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from matformer_jax.config import KINDS
from matformer_jax.errors import UserError

MESH_AXES = ("slices", "data", "fsdp", "tensor")
SLICES, DATA, FSDP, TENSOR = MESH_AXES
BATCH_AXES = (SLICES, DATA, FSDP)  # that a batch is split over
INNER_AXES = (DATA, FSDP, TENSOR)  # inside a slice

# The last two names of a leaf's path (or its last) -> its logical axes, outermost first: of the
# blocks here, of what is around them in each kind's record in config.py.
_FFN = ("layers", "ffn_groups", "neurons", "embed")
_QKV = ("layers", "qkv", "head_groups", "heads", "head_dim", "embed")
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
  "attention/qkv": _QKV,
  "attention/qkv_bias": _QKV[:-1],
  "attention/out": _QKV[:1] + _QKV[2:],
  "attention/q_norm": ("layers", "head_dim"),
  "attention/k_norm": ("layers", "head_dim"),
  "attention/out_bias": ("layers", "d"),
  "ffn/in": _FFN,
  "ffn/in_bias": _FFN[:-1],
  "ffn/gate": _FFN,
  "ffn/gate_bias": _FFN[:-1],
  "ffn/out": _FFN,
  "ffn/out_bias": ("layers", "d"),
  "attention_norm/scale": ("layers", "d"),
  "attention_norm/bias": ("layers", "d"),
  "ffn_norm/scale": ("layers", "d"),
  "ffn_norm/bias": ("layers", "d"),
  "final_norm/scale": ("d",),
  "final_norm/bias": ("d",),
}
for _kind in KINDS.values():
  LOGICAL_AXES |= _kind.axes

# Every logical axis -> the mesh axis that shards it; None is replicated.
RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": BATCH_AXES,
  "embed": FSDP,  # d_model, of a matrix
  "d": None,  # d_model, of what is not worth sharding: activations, scales, biases
  "ffn_groups": TENSOR,
  "head_groups": TENSOR,
  "vocab": TENSOR,
  "layers": None,
  "neurons": None,  # of a group; nested
  "heads": None,  # of a group; nested
  "head_dim": None,
  "qkv": None,
  "length": None,  # tokens
  "pixels": None,  # numbers in a patch
  "features": None,
  "classes": None,
}


def make_mesh(shape: Mapping[str, int], devices=None) -> Mesh:
  """A (slices, data, fsdp, tensor) mesh: the last three are inside a slice.

  Args:
    shape: size of each axis; one of data, fsdp and tensor may be -1, meaning the rest of a slice.
      `slices` 0 or missing takes the slices that the devices are of. Devices that are of none,
      such as CPUs, are split evenly, in the order of their processes.
    devices: defaults to all of them.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  slices = _by_slice(jax.devices() if devices is None else devices, int(shape.get(SLICES, 0)))
  count = len(slices[0])
  sizes = [int(shape.get(axis, 1)) for axis in INNER_AXES]
  known = int(np.prod([s for s in sizes if s != -1]))
  if sizes.count(-1) == 1 and known and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if min(sizes) < 1 or int(np.prod(sizes)) != count:
    where = f"each of {len(slices)} slices" if len(slices) > 1 else "here"
    raise UserError(
      f"mesh {dict(zip(INNER_AXES, sizes))} does not use the {count} devices {where}; "
      "the sizes must multiply to that number (one may be -1 for the rest)"
    )
  placed = np.stack([_place(sizes, slice_) for slice_ in slices])
  return Mesh(placed, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def _by_slice(devices, slices: int) -> list[list]:
  """The devices of each slice. Raises UserError where there are not `slices` (0: any number)."""
  found = collections.defaultdict(list)
  if all(device.platform == "tpu" for device in devices):
    for device in devices:
      found[getattr(device, "slice_index", 0)].append(device)
  else:
    size = max(len(devices) // max(slices, 1), 1)
    for place, device in enumerate(sorted(devices, key=lambda d: (d.process_index, d.id))):
      found[place // size].append(device)
  groups = [found[index] for index in sorted(found)]
  if slices not in (0, len(groups)) or len(set(map(len, groups))) > 1:
    raise UserError(
      f"mesh.slices={slices} does not fit the {len(devices)} devices here, which are of "
      f"{len(groups)} slices of {' and '.join(str(n) for n in sorted(set(map(len, groups))))}; "
      "set it to 0, for the slices there are"
    )
  return groups


def _place(sizes: Sequence[int], devices) -> np.ndarray:
  """Devices of a slice, so that neighbours on an axis are neighbours in the slice's torus."""
  try:
    return mesh_utils.create_device_mesh(sizes, devices)
  except NotImplementedError:  # an axis of the torus has to be split between two of ours
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def check_model_fits_mesh(config, mesh: Mesh) -> None:
  """Raises UserError where a sharded axis is not divisible by its mesh axis."""
  sizes = dict(mesh.shape)
  for name, logical_axis in config.axis_fields.items():
    value, axis = getattr(config, name), RULES[logical_axis]
    if value % sizes[axis]:
      raise UserError(
        f"model.{name}={value} is not divisible by mesh.{axis}={sizes[axis]}; "
        f"change model.{name} to a multiple, or mesh.{axis}"
      )


def check_batch(
  batch_size: int, grad_accum: int, mesh: Mesh, name: str = "batch_size", parts: int = 1
) -> None:
  """Raises UserError where a batch does not divide over the mesh, `parts` and micro-batches."""
  shards = batch_shards(mesh)
  if batch_size < 1 or grad_accum < 1:
    raise UserError(f"{name}={batch_size} and grad_accum={grad_accum} must be at least 1")
  if batch_size % (shards * grad_accum * parts):
    raise UserError(
      f"{name}={batch_size} is not divisible by {shards} batch shards (mesh slices x data x fsdp)"
      + (f" x grad_accum={grad_accum}" if grad_accum > 1 else "")
      + (f" x {parts} sizes a step" if parts > 1 else "")
      + f"; use a multiple of {shards * grad_accum * parts}"
    )


def logical_axes(path: tuple[str, ...]) -> tuple[str, ...]:
  """Logical axes of the parameter at `path`, e.g. ('blocks', '0', 'ffn', 'in')."""
  name = "/".join(path[-2:])
  axes = LOGICAL_AXES.get(name) or LOGICAL_AXES.get(path[-1])
  if axes is None:
    raise KeyError(f"no sharding rule for parameter {'/'.join(path)!r}")
  return axes


def spec(axes: tuple[str, ...], gathered: bool = False) -> PartitionSpec:
  """Mesh axes for logical axes; `gathered` leaves the fsdp axis out.

  Raises:
    KeyError: for an axis that is not in RULES.
  """
  mesh_axes = [RULES[a] for a in axes]
  if gathered:
    mesh_axes = [None if a == FSDP else a for a in mesh_axes]
  return PartitionSpec(*mesh_axes)


def constrain(x: jax.Array, axes: tuple[str, ...], execution) -> jax.Array:
  """Pins an activation's sharding where the partitioner chooses shardings."""
  if execution.mesh is None or execution.per_device:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(execution.mesh, spec(axes)))


def replicate(x: jax.Array, execution) -> jax.Array:
  """Gives every device, and so every host, all of a small result."""
  if execution.mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(execution.mesh, PartitionSpec()))


def stored_shape(shape: tuple[int, ...], axes: tuple[str, ...], execution) -> tuple[int, ...]:
  """The shape in which a program sees a stored weight: of its fsdp shard, if per device."""
  if not execution.per_device:
    return shape
  shards = execution.mesh.shape[FSDP]
  return tuple(n // shards if RULES[a] == FSDP else n for n, a in zip(shape, axes))


def gather(weight: jax.Array, axes: tuple[str, ...], execution) -> jax.Array:
  """Casts a (sliced) weight to the compute dtype, then all-gathers its fsdp shards, if any.

  In a train step (`execution.per_device`) the gradient is reduce-scattered, explicitly; the
  sum over `data` is left to the caller, once for all layers. Elsewhere, without gradients,
  the partitioner moves the shards.
  """
  dtype = jnp.dtype(execution.dtype)
  if execution.per_device and "embed" in axes:
    return _gather_shards(weight, axes, dtype, weight.dtype)
  weight = weight.astype(dtype)
  if execution.mesh is None or execution.per_device:
    return weight
  whole = NamedSharding(execution.mesh, spec(axes, gathered=True))
  return jax.lax.with_sharding_constraint(weight, whole)


def _on_tensor_shards(f, axes):
  """f on each tensor shard of an array with these axes, inside a per-device program.

  The partitioner, which has the tensor axis there, would gather what a collective of ours
  is given.
  """
  tensor_spec = spec(axes, gathered=True)
  return jax.shard_map(
    f, in_specs=tensor_spec, out_specs=tensor_spec, axis_names={TENSOR}, check_vma=False
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_shards(weight, axes, dtype, param_dtype):
  gather_ = functools.partial(
    jax.lax.all_gather, axis_name=FSDP, axis=axes.index("embed"), tiled=True
  )
  return _on_tensor_shards(gather_, axes)(weight.astype(dtype))


def _gather_shards_fwd(weight, axes, dtype, param_dtype):
  return _gather_shards(weight, axes, dtype, param_dtype), None


def _gather_shards_bwd(axes, dtype, param_dtype, _, cotangent):
  def scatter(whole):
    # XLA's TPU backend reduce-scatters the rows of a matrix, and makes an all-reduce of most
    # other forms: so embed by everything else, and its layout pinned.
    moved = jnp.moveaxis(whole, axes.index("embed"), 0)
    rows = jax.lax.psum_scatter(
      moved.reshape(moved.shape[0], -1), FSDP, scatter_dimension=0, tiled=True
    )
    rows = with_layout_constraint(rows, Layout((0, 1)))
    return jnp.moveaxis(rows.reshape((-1,) + moved.shape[1:]), 0, axes.index("embed"))

  return (_on_tensor_shards(scatter, axes)(cotangent).astype(param_dtype),)


_gather_shards.defvjp(_gather_shards_fwd, _gather_shards_bwd)


def on_head_shards(f, execution):
  """f of two trees, on each device's own rows and heads.

  For kernels, which the partitioner cannot split.

  Args:
    f: (arrays [batch, heads, ...], arrays [batch, ...] or None) -> arrays [batch, heads, ...].
  """
  if execution.mesh is None:
    return f
  # Inside a per-device program the batch axes are split already; the tensor axis is not.
  batch = None if execution.per_device else RULES["batch"]
  over = PartitionSpec(batch, RULES["head_groups"])
  return jax.shard_map(
    f,
    mesh=None if execution.per_device else execution.mesh,
    in_specs=(over, PartitionSpec(batch)),
    out_specs=over,
    axis_names={TENSOR} if execution.per_device else set(MESH_AXES),
    check_vma=False,
  )


def on_whole_vocabulary(f, execution):
  """f of arrays that a device of a train step has whole, for kernels, as `on_head_shards`."""
  if execution.mesh is None:
    return f
  whole = PartitionSpec()
  return jax.shard_map(f, in_specs=whole, out_specs=whole, axis_names={TENSOR}, check_vma=False)


def on_each_device(gradient, mesh: Mesh, dtype_across: str = ""):
  """Runs (params, rows, *frozen) -> (measured, gradients) on every device's shards and rows.

  Args:
    gradient: sees a `per_device` program's arrays. What it measures, a tree of scalars, are
      means over its rows; its gradients, to params, are already reduce-scattered where
      parameters are sharded. `frozen` are parameters that have no gradient.
    dtype_across: in which gradients are summed across slices; "" is their own.

  Returns:
    The same function of global arrays: means and gradients, sharded like params.
    The tensor axis is left to the partitioner.
  """
  shards = batch_shards(mesh)

  def reduce(path, grad):
    axes = logical_axes(path_names(path))
    inside = [a for a in ((DATA,) if "embed" in axes else (DATA, FSDP)) if mesh.shape[a] > 1]
    if inside:
      grad = _on_tensor_shards(functools.partial(jax.lax.psum, axis_name=inside), axes)(grad)
    if mesh.shape[SLICES] > 1:  # what is summed inside a slice crosses the slower network once
      # Flat: XLA would send the padding of a shard that is narrower than a tile.
      flat = lambda x: with_layout_constraint(x.reshape(-1), Layout((0,)))
      across = lambda x: flat(jax.lax.psum(flat(x), SLICES)).reshape(x.shape)
      part = (grad / shards).astype(dtype_across or grad.dtype)
      return _on_tensor_shards(across, axes)(part).astype(grad.dtype)
    return grad / shards

  def device(params, rows, *frozen):
    measured, grads = gradient(params, rows, *frozen)
    grads = jax.tree_util.tree_map_with_path(reduce, grads)
    return jax.lax.pmean(measured, BATCH_AXES), grads

  def specs(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: PartitionSpec(
        *(RULES[a] if a == "embed" else None for a in logical_axes(path_names(path)))
      ),
      params,
    )

  def over_mesh(params, rows, *frozen):
    return jax.shard_map(
      device,
      mesh=mesh,
      in_specs=(specs(params), PartitionSpec(BATCH_AXES), *map(specs, frozen)),
      out_specs=(PartitionSpec(), specs(params)),
      axis_names=set(BATCH_AXES),
      check_vma=False,
    )(params, rows, *frozen)

  return over_mesh


def path_names(path) -> tuple[str, ...]:
  """A jax key path as plain strings."""
  return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def param_shardings(params, mesh: Mesh):
  """A NamedSharding for every leaf of a parameter tree (arrays or shapes)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: NamedSharding(mesh, spec(logical_axes(path_names(path)))), params
  )


def state_shardings(state, params, mesh: Mesh):
  """Shardings for any tree that holds copies of the parameters, such as an optimizer's.

  A copy is sharded like its parameter; everything else (counts, factored moments) is replicated.
  """
  like = lambda names, _: NamedSharding(mesh, spec(logical_axes(names)))
  return map_copies(state, params, like, lambda _: NamedSharding(mesh, PartitionSpec()))


def map_copies(tree, params, copy, other):
  """Maps a tree that holds copies of the parameters, such as an optimizer's state.

  Args:
    copy: (names of a parameter's path, leaf) -> new leaf, for a leaf whose path ends with a
      parameter's path and that has its shape.
    other: leaf -> new leaf, for all others.
  """
  shapes = {
    path_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }

  def visit(path, leaf):
    names = path_names(path)
    for start in range(len(names)):
      if shapes.get(names[start:]) == leaf.shape:
        return copy(names[start:], leaf)
    return other(leaf)

  return jax.tree_util.tree_map_with_path(visit, tree)


def sizes(mesh: Mesh) -> dict[str, int]:
  """Of its axes; `slices` only where there are several."""
  return {axis: int(n) for axis, n in mesh.shape.items() if axis != SLICES or n > 1}


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of any array of a batch, [B, ...]."""
  return NamedSharding(mesh, spec(("batch",)))


def batch_shards(mesh: Mesh | None) -> int:
  """How many ways the batch axis is split."""
  return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
