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
from matformer_jax import sharding
from matformer_jax.config import ModelConfig
from matformer_jax.models import slicing


def take(tree: Any, params: Any, config: ModelConfig, granularity: gran.Granularity) -> Any:
  """`tree` with every copy of a parameter cut to the slice of a trained size.

  Args:
    tree: parameters, or what an optimizer keeps of them; see `sharding.map_copies`.
    params: the stored parameters, or their shapes.
    granularity: one of `gran.trained`, which cut every stored span once, from its start.
  """
  cut = jax.eval_shape(lambda p: slicing.slice_params(p, config, granularity), params)
  shapes = {
    sharding.path_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(cut)
  }
  lead = lambda names, leaf: leaf[tuple(map(slice, shapes[names]))]
  return sharding.map_copies(tree, params, lead, lambda leaf: leaf)


def put(tree: Any, cut: Any) -> Any:
  """`tree` with what `take` cut out of it replaced."""

  def replace(leaf, small):
    if leaf.shape == small.shape:
      return small
    return jax.lax.dynamic_update_slice(leaf, small, (0,) * leaf.ndim)

  return jax.tree.map(replace, tree, cut)
