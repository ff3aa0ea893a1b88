"""What a checkpoint says of its arrays: shapes, dtypes and checksums, for a restore to verify.

Every leaf has a checksum, and so has every segment of a stack of layers: what each size adds
to the next smaller one, layer by layer. A submodel's part of a leaf is the sum of segments, so
it can be read, and verified, without reading the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax.checkpoints import checksums
from matformer_jax.config import ModelConfig, Span
from matformer_jax.sharding import logical_axes, path_names


def of(tree, format: int = checksums.FORMAT) -> dict[str, dict[str, Any]]:
  """{leaf path: {shape, dtype, checksum}} of a tree of arrays, as a checkpoint's format has it."""
  sums = jax.device_get(_whole(tree, format))
  return {
    name: {**described, "checksum": checksums.to_hex(checksum)}
    for (name, described), checksum in zip(describe(tree).items(), jax.tree.leaves(sums))
  }


def describe(tree) -> dict[str, dict[str, Any]]:
  """{leaf path: {shape, dtype}} of a tree of arrays, or of what only has their shapes."""
  return {
    "/".join(path_names(path)): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def of_segments(params, config: ModelConfig) -> dict[str, list[list[str]]]:
  """{leaf path: checksums by `[layer][segment]`} of the leaves that are stacks of layers."""
  tables = jax.device_get(_by_segment(params, config))
  return {
    name: [[checksums.to_hex(sums) for sums in layer] for layer in np.moveaxis(table, 0, -1)]
    for name, table in tables.items()
  }


class Segments(NamedTuple):
  """Where a stack of layers is cut: segment i is what size i adds to size i-1."""

  name: str  # of the nested axis, "neurons" or "heads"; empty without one
  axis: int | None  # its number, layers being 0
  cuts: tuple[int, ...]  # positions along it

  def checksums(self, leaf: jax.Array) -> jax.Array:
    """uint32 [2, layers, segments]."""
    others = tuple(i for i in range(1, leaf.ndim) if i != self.axis)
    result = []
    for terms in checksums.terms(leaf, leaf.shape, (0,) * leaf.ndim):
      table = jnp.sum(terms, others, dtype=jnp.uint32).reshape(leaf.shape[0], -1)
      parts = jnp.split(table, self.cuts, axis=1)
      result.append(jnp.stack([jnp.sum(part, 1, dtype=jnp.uint32) for part in parts], axis=1))
    return jnp.stack(result)

  def among_first(self, lengths: Mapping[str, int]) -> int:
    """How many segments lie within `ModelConfig.slice_lengths` of a size."""
    return 1 + sum(cut < lengths[self.name] for cut in self.cuts)


def segments(names: tuple[str, ...], shape: Sequence[int], config: ModelConfig) -> Segments:
  """Of the leaf at the path `names`, a stack of layers."""
  sizes = [config.slice_lengths(Span(1, i, i)) for i in range(config.num_granularities)]
  for axis, name in enumerate(logical_axes(names)):
    if name in sizes[0]:
      cuts = sorted({lengths[name] for lengths in sizes if lengths[name] < shape[axis]})
      return Segments(name, axis, tuple(cuts))
  return Segments("", None, ())


@functools.partial(jax.jit, static_argnums=1)
def _whole(tree, format: int):
  return jax.tree.map(lambda leaf: checksums.whole(leaf, format), tree)


@functools.partial(jax.jit, static_argnums=1)
def _by_segment(params, config: ModelConfig):
  result = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = path_names(path)
    if logical_axes(names)[0] == "layers":
      result["/".join(names)] = segments(names, leaf.shape, config).checksums(leaf)
  return result
