"""Optimizer steps of the sampled slice alone: `optim.scope=sliced`.

What a size does not have keeps its parameters and moments, bit for bit: they do not decay, and
its momentum does not move them. So an update costs what the slice costs. By default the
optimizer sees the whole tree, with gradients of zero beyond the slice, as the paper's pseudocode
has it (Appendix A).
"""

from __future__ import annotations

from typing import Any

import jax

from matformer_jax import granularity as gran
from matformer_jax.config import ModelConfig
from matformer_jax.models import slicing
from matformer_jax.sharding import path_names


def take(tree: Any, params: Any, config: ModelConfig, granularity: gran.Granularity) -> Any:
  """`tree` with every copy of a parameter cut to the slice of a trained size.

  Args:
    tree: parameters, or what an optimizer keeps of them. A leaf whose path ends with a
      parameter's and that has its shape is a copy of it; others, such as counts, stay.
    params: the stored parameters, or their shapes.
    granularity: one of `gran.trained`, which cut every stored span once, from its start.
  """
  cut = jax.eval_shape(lambda p: slicing.slice_params(p, config, granularity), params)
  shapes = {
    path_names(path): (leaf.shape, small.shape)
    for (path, leaf), small in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(cut), strict=True
    )
  }

  def cut_copy(path, leaf):
    names = path_names(path)
    for start in range(len(names)):
      whole, small = shapes.get(names[start:], (None, ()))
      if whole == leaf.shape:
        return leaf[tuple(map(slice, small))]
    return leaf

  return jax.tree_util.tree_map_with_path(cut_copy, tree)


def put(tree: Any, cut: Any) -> Any:
  """`tree` with what `take` cut out of it replaced."""

  def replace(leaf, small):
    if leaf.shape == small.shape:
      return small
    return jax.lax.dynamic_update_slice(leaf, small, (0,) * leaf.ndim)

  return jax.tree.map(replace, tree, cut)
