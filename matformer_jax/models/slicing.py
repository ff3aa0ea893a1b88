"""Where a weight is sliced: the one idea of MatFormer (Section 3.1).

A granularity is applied once, to the stored parameters, by taking the leading part of every
nested axis; modules then see weights of exactly the submodel's widths. So a slice costs what
a dense model of that size costs, and an extracted submodel runs the same program. There are
no masks. Which axes nest is written in sharding.py, how much of them in
`ModelConfig.slice_lengths`.
"""

from __future__ import annotations

from typing import Any

import jax

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import ModelConfig, Span

Params = Any

# Sliced layers may be passed into jitted functions: where they lie is part of the program.
jax.tree_util.register_static(gran.Slice)


def slice_params(params: Params, config: ModelConfig, granularity: gran.Granularity) -> Params:
  """The submodel's own parameter tree, for `granularity.submodel_config`.

  Differentiable; the transpose pads gradients with exact zeros.
  """
  sliced = slice_blocks(params["blocks"], config, granularity)
  return {**params, "blocks": {str(i): layers for i, (_, layers) in enumerate(sliced)}}


def slice_blocks(
  blocks: Params, config: ModelConfig, granularity: gran.Granularity
) -> list[tuple[gran.Slice, Params]]:
  """The submodel's layers, one entry per stretch of equal widths.

  Args:
    blocks: {stored span: its layers}, each a stack of shape [l, ...] or a list of l layers.

  Returns:
    [(where the layers lie and how wide they are, their parameters)], in order of depth.
  """
  result = []
  for part in gran.slices(config, granularity):
    layers = blocks[str(part.source)]
    if isinstance(layers, list):
      chosen = [slice_widths(layer, config, part.span) for layer in layers[part.start : part.stop]]
    else:
      chosen = jax.tree.map(lambda leaf: leaf[part.start : part.stop], layers)
      chosen = slice_widths(chosen, config, part.span)
    result.append((part, chosen))
  return result


def slice_widths(params: Params, config: ModelConfig, span: Span) -> Params:
  """A layer's parameters, or a stack's, cut to the widths of `span`: W[:m_i] of Eq. 1."""
  lengths = config.slice_lengths(span)

  def cut(path, leaf):
    axes = sharding.logical_axes(sharding.path_names(path))[-leaf.ndim :]
    return leaf[tuple(slice(lengths.get(axis)) for axis in axes)]

  return jax.tree_util.tree_map_with_path(cut, params)
