"""Are copies of the same values on several devices still the same?

A flipped bit in one device's memory changes one replica, silently: the others keep
training, and the copies drift apart. Checksums of what every device really holds tell.
"""

from __future__ import annotations

import collections
import functools
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from matformer_jax.checkpoints import checksums
from matformer_jax.sharding import MESH_AXES, path_names


class ReplicasDiffer(RuntimeError):
  """Names the leaf, the device and the process that differ from the majority."""


def check(tree: Any, mesh: Mesh) -> None:
  """Compares every leaf's copies on the mesh, bit for bit.

  Args:
    tree: sharded arrays; checked along every mesh axis that does not shard them.

  Raises:
    ReplicasDiffer: on all processes alike.
  """
  if mesh.size == 1:
    return
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  specs = tuple(leaf.sharding.spec for _, leaf in leaves)
  table = np.asarray(_local_checksums([leaf for _, leaf in leaves], specs, mesh))
  for i, ((path, _), spec) in enumerate(zip(leaves, specs)):
    odd = _odd_devices(table[:, i], spec, mesh)
    if odd:
      names = ", ".join(f"device {d.id} of process {d.process_index}" for d in odd)
      raise ReplicasDiffer(
        f"copies of {'/'.join(path_names(path))} differ between devices: {names} "
        "does not hold what the others do (a hardware fault?)"
      )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _local_checksums(leaves, specs, mesh):
  """uint32 [devices, leaves, 2] of what each device holds, in mesh order, on every device."""
  local = lambda leaves: jax.numpy.stack([checksums.whole(leaf) for leaf in leaves])[None]
  table = jax.shard_map(
    local, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(MESH_AXES), check_vma=False
  )(leaves)
  return jax.lax.with_sharding_constraint(table, jax.sharding.NamedSharding(mesh, PartitionSpec()))


def _odd_devices(sums: np.ndarray, spec: PartitionSpec, mesh: Mesh) -> list:
  """Devices whose checksum is not the commonest one among the copies of their shard."""
  used = {axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
  shard_axes = [i for i, axis in enumerate(MESH_AXES) if axis in used]
  groups = collections.defaultdict(list)
  for place, device in np.ndenumerate(mesh.devices):
    value = tuple(sums.reshape(mesh.devices.shape + (2,))[place])
    groups[tuple(place[i] for i in shard_axes)].append((value, device))
  odd = []
  for copies in groups.values():
    commonest = collections.Counter(value for value, _ in copies).most_common(1)[0][0]
    odd += [device for value, device in copies if value != commonest]
  return odd
