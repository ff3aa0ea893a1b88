"""The attention cache, and a stack of blocks that reads and extends it.

A cache is a list of {"k", "v"}, laid out as the layers are run: one [B, A, N, S, H]
pair per layer where layers are unrolled, one [l, B, A, N, S, H] pair per stored run
where they are scanned. A layer writes its new tokens first and then attends to the
result: in the other order XLA copies the cache. Attention is not nested unless the
config says so, hence one cache serves every granularity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.models import layers

Cache = list  # of {"k": array, "v": array}


def init_cache(config: MatLMConfig, execution: Execution, batch: int, length: int) -> Cache:
  """An empty cache of `length` positions, in the compute dtype."""
  cache = []
  for run in config.runs:
    heads = config.slice_lengths(run)["heads"]
    shape = (batch, config.head_groups, heads, length, config.head_dim)
    copies = 1 if execution.scan_layers else run.num_layers
    if execution.scan_layers:
      shape = (run.num_layers,) + shape
    zeros = lambda: _constrain(jnp.zeros(shape, execution.dtype), execution)
    cache += [{"k": zeros(), "v": zeros()} for _ in range(copies)]
  return cache


def lay_out(blocks: layers.Params, execution: Execution) -> layers.Params:
  """Stored stacks as `extend` takes them: in the compute dtype, per layer where unrolled."""
  blocks = jax.tree.map(lambda x: x.astype(execution.dtype), blocks)
  if execution.scan_layers:
    return blocks
  return {run: layers.unstack(stack) for run, stack in blocks.items()}


def narrow(
  blocks: layers.Params, config: MatLMConfig, execution: Execution, granularity: gran.Granularity
) -> layers.Params:
  """`lay_out` of the submodel, from `lay_out` of the model; its own runs, as slice_blocks."""
  if execution.scan_layers:
    return layers.slice_blocks(blocks, config, granularity)
  return {
    str(i): [
      layers.narrow(layer, config, part.run)
      for layer in blocks[str(part.source)][part.start : part.stop]
    ]
    for i, part in enumerate(gran.slices(config, granularity))
  }


def extend(
  blocks: layers.Params,
  config: MatLMConfig,
  execution: Execution,
  granularity: gran.Granularity,
  x_BxTxD,
  cache: Cache,
  start,
  block_class=layers.Block,
):
  """Runs a submodel's layers on T new tokens and adds them to the cache.

  Args:
    blocks: from `narrow`, for this granularity.
    config: of the model whose layout the cache has.
    x_BxTxD: embedded tokens.
    start: [B] int32, their first position; rows below it must be in the cache. None:
      the tokens are positions 0 to T-1, and the cache is not read.
    block_class: what a layer is.

  Returns:
    ([B, T, D], cache).
  """
  cache = list(cache)
  first = 0
  for i, part in enumerate(gran.slices(config, granularity)):
    block = block_class(config, execution, part.run, parent=None)
    params = blocks[str(i)]
    if execution.scan_layers:

      def step(carry, xs, block=block):
        layer_params, layer = xs
        return block.apply({"params": layer_params}, *carry, start, layer), None

      (x_BxTxD, cache[part.source]), _ = jax.lax.scan(
        step, (x_BxTxD, cache[part.source]), (params, jnp.arange(part.start, part.stop))
      )
    else:
      for layer in range(part.run.num_layers):
        x_BxTxD, cache[first] = block.apply({"params": params[layer]}, x_BxTxD, cache[first], start)
        first += 1
  return x_BxTxD, cache


def _constrain(leaf, execution: Execution):
  axes = ("batch", "head_groups", "heads", "length", "head_dim")
  return sharding.constrain(leaf, ("layers",) * (leaf.ndim - 5) + axes, execution)
