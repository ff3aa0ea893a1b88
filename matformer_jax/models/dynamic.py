"""One program for every submodel: the granularity of each layer as an array.

A static granularity compiles a program of its own, which is fastest where few are
used. To score thousands of mixes, or to redraw each layer's size at every step, the
sizes are traced: a scan over the layers, and in it a switch over statically sliced
branches, so that a narrow layer costs what a narrow layer costs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution, MatLMConfig, Span
from matformer_jax.models import layers, matlm, ops, slicing


def apply_dynamic(
  params,
  tokens_BxT,
  layer_indices,
  *,
  config: MatLMConfig,
  execution: Execution = Execution(),
  return_hidden: bool = False,
  segments_BxT=None,
):
  """As MatLM, with the granularity traced: one program for all g^L submodels.

  Equal to the static program up to float rounding; differentiable, with a layer
  recomputed in the backward pass. Map over many configurations with `jax.lax.map`:
  `jax.vmap` would run every branch.

  Args:
    params: the stored parameters.
    tokens_BxT: int32 token ids.
    layer_indices: [L] int32, granularity index per layer (`Granularity.ffn`); where
      heads are nested they follow. An index above a layer's stored width is cut to it.
    config: of the stored model.
    return_hidden: return what the chunked loss needs instead of logits.
    segments_BxT: int32, the document of each token, as for MatLM.

  Returns:
    float32 logits [B, T, V], or (hidden [B, T, D], output head [V, D]) in the compute dtype.
  """
  ends = {
    name: sharding.gather(leaf, sharding.LOGICAL_AXES[name], execution)
    for name, leaf in matlm.ends(params).items()
  }
  head_VxD = matlm.output_head(ends)
  x_BxTxD = matlm.embed(ends["embedding"], tokens_BxT, config)
  origin_BxT = None if segments_BxT is None else ops.document_origins(segments_BxT)
  first = 0
  for i, span in enumerate(config.spans):
    sizes = range(max(span.ffn, span.heads) + 1)
    branches = [_branch(config, execution, span, size) for size in sizes]

    def layer(x, xs, branches=branches):
      layer_params, index = xs
      return jax.lax.switch(index, branches, x, layer_params, origin_BxT), None

    indices = layer_indices[first : first + span.num_layers]
    x_BxTxD, _ = jax.lax.scan(layer, x_BxTxD, (params["blocks"][str(i)], indices))
    first += span.num_layers
  x_BxTxD = ops.rms_norm(x_BxTxD, params["final_norm"]["scale"], config.norm_eps)
  if return_hidden:
    return x_BxTxD, head_VxD
  return jnp.einsum("btd,vd->btv", x_BxTxD, head_VxD, preferred_element_type=jnp.float32)


def _branch(config: MatLMConfig, execution: Execution, stored: Span, size: int):
  heads = min(size, stored.heads) if config.nested_heads else stored.heads
  span = Span(1, min(size, stored.ffn), heads)
  block = layers.Block(config, execution, span, parent=None)

  # Inside the branch: outside, every branch's intermediate values would be kept.
  @functools.partial(jax.checkpoint, policy=layers.REMAT["full"], prevent_cse=False)
  def apply(x, layer_params, origin_BxT):
    sliced = slicing.slice_widths(layer_params, config, span)
    return block.apply({"params": sliced}, x, origin_BxT=origin_BxT)[0]

  return apply


def layer_indices(granularity: gran.Granularity) -> jax.Array:
  """`apply_dynamic`'s [L] int32 for a granularity whose heads follow its FFNs."""
  return jnp.asarray(granularity.ffn, jnp.int32)
