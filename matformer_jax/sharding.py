"""Where sharding is written: leaf name -> logical axes -> mesh axes.

Logical axes also say what nesting slices: `neurons` and `heads` are the axes a
granularity shortens. Both are inside a group axis that tensor parallelism
shards, so a shorter slice stays on its device and costs no collective.

Mesh axes: `data` (replicas), `fsdp` (parameters sharded along d_model, batch
sharded too), `tensor` (groups of neurons and heads, vocabulary).
"""

from __future__ import annotations

import functools
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from matformer_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# The last two names of a leaf's path -> its logical axes, outermost first.
_FFN = ("layers", "ffn_groups", "neurons", "embed")
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "embed"),
    "attention/qkv": ("layers", "qkv", "head_groups", "heads", "head_dim", "embed"),
    "attention/out": ("layers", "head_groups", "heads", "head_dim", "embed"),
    "ffn/in": _FFN,
    "ffn/gate": _FFN,
    "ffn/out": _FFN,
    "attention_norm/scale": ("layers", "norm"),
    "ffn_norm/scale": ("layers", "norm"),
    "final_norm/scale": ("norm",),
}

# Logical axis -> mesh axis; axes not listed are replicated.
RULES: dict[str, Any] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "ffn_groups": "tensor",
    "head_groups": "tensor",
    "vocab": "tensor",
}


def make_mesh(shape: Mapping[str, int], devices=None) -> Mesh:
  """A (data, fsdp, tensor) mesh.

  Args:
    shape: size of each axis; one of them may be -1, meaning the rest.
    devices: defaults to all of them.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
  known = int(np.prod([s for s in sizes if s != -1]))
  if sizes.count(-1) == 1 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
    raise UserError(
        f"mesh {dict(zip(MESH_AXES, sizes))} does not use the {len(devices)} devices here; "
        "the sizes must multiply to that number (one may be -1 for the rest)")
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=auto, devices=devices)


def check_model_fits_mesh(config, mesh: Mesh) -> None:
  """Raises UserError where a sharded axis is not divisible by its mesh axis."""
  sizes = dict(mesh.shape)
  for name, value, axis in (("ffn_groups", config.ffn_groups, "tensor"),
                            ("head_groups", config.head_groups, "tensor"),
                            ("vocab_size", config.vocab_size, "tensor"),
                            ("d_model", config.d_model, "fsdp")):
    if value % sizes[axis]:
      raise UserError(f"model.{name}={value} is not divisible by mesh.{axis}={sizes[axis]}; "
                      f"change model.{name} to a multiple, or mesh.{axis}")


def logical_axes(path: tuple[str, ...]) -> tuple[str, ...]:
  """Logical axes of the parameter at `path`, e.g. ('blocks', '0', 'ffn', 'in')."""
  name = "/".join(path[-2:])
  axes = LOGICAL_AXES.get(name) or LOGICAL_AXES.get(path[-1])
  if axes is None:
    raise KeyError(f"no sharding rule for parameter {'/'.join(path)!r}")
  return axes


def spec(axes: tuple[str, ...], gathered: bool = False) -> PartitionSpec:
  """Mesh axes for logical axes; `gathered` leaves the fsdp axis out."""
  mesh_axes = [RULES.get(a) for a in axes]
  if gathered:
    mesh_axes = [None if a == "fsdp" else a for a in mesh_axes]
  return PartitionSpec(*mesh_axes)


def constrain(x: jax.Array, axes: tuple[str, ...], mesh: Mesh | None) -> jax.Array:
  """Pins an activation's sharding; does nothing without a mesh."""
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes)))


def gather(weight: jax.Array, axes: tuple[str, ...], mesh: Mesh | None, dtype) -> jax.Array:
  """Casts a (sliced) weight to the compute dtype, then all-gathers its fsdp shards.

  The cotangent is pinned to the sharded layout, so gradients are reduce-scattered;
  the transpose of a plain constraint would all-reduce them.
  """
  if mesh is None:
    return weight.astype(dtype)
  return _gather(weight, axes, mesh, jnp.dtype(dtype), weight.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(weight, axes, mesh, dtype, _):
  sharding = NamedSharding(mesh, spec(axes, gathered=True))
  return jax.lax.with_sharding_constraint(weight.astype(dtype), sharding)


def _gather_fwd(weight, axes, mesh, dtype, param_dtype):
  return _gather(weight, axes, mesh, dtype, param_dtype), None


def _gather_bwd(axes, mesh, dtype, param_dtype, _, cotangent):
  sharding = NamedSharding(mesh, spec(axes))
  return (jax.lax.with_sharding_constraint(cotangent, sharding).astype(param_dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def path_names(path) -> tuple[str, ...]:
  """A jax key path as plain strings."""
  return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def param_shardings(params, mesh: Mesh):
  """A NamedSharding for every leaf of a parameter tree (arrays or shapes)."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: NamedSharding(mesh, spec(logical_axes(path_names(path)))), params)


def state_shardings(state, params, mesh: Mesh):
  """Shardings for any tree that holds copies of the parameters, such as an optimizer's.

  A leaf whose path ends with a parameter's path and has its shape is sharded like
  it; everything else (counts, factored moments) is replicated.
  """
  by_path = {path_names(path): (leaf.shape, NamedSharding(mesh, spec(logical_axes(path_names(path)))))
             for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  longest = max(len(p) for p in by_path)
  replicated = NamedSharding(mesh, PartitionSpec())

  def sharding(path, leaf):
    names = path_names(path)
    for length in range(min(longest, len(names)), 0, -1):
      shape, found = by_path.get(names[-length:], (None, None))
      if found is not None and shape == leaf.shape:
        return found
    return replicated

  return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of a [B, T] batch of tokens."""
  return NamedSharding(mesh, spec(("batch", "length")))


def batch_shards(mesh: Mesh | None) -> int:
  """How many ways the batch axis is split."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
