"""The attention cache, and a stack of blocks that reads and extends it.

A cache is a list of {"k", "v"}, laid out as the layers are run: one [B, A, N, S, H]
pair per layer where layers are unrolled, one [l, B, A, N, S, H] pair per stored span
where they are scanned. A layer writes its new tokens first and then attends to the
result: in the other order XLA copies the cache. Attention is not nested unless the
config says so, so one cache serves every granularity.
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

  def zeros(shape):
    leaf = jnp.zeros(shape, execution.dtype)
    return sharding.constrain(leaf, logical_axes(leaf), execution)

  cache = []
  for span in config.spans:
    heads = config.slice_lengths(span)["heads"]
    shape = (batch, config.head_groups, heads, length, config.head_dim)
    copies = 1 if execution.scan_layers else span.num_layers
    if execution.scan_layers:
      shape = (span.num_layers,) + shape
    cache += [{"k": zeros(shape), "v": zeros(shape)} for _ in range(copies)]
  return cache


def lay_out(blocks: layers.Params, execution: Execution) -> layers.Params:
  """Stored stacks as `extend` takes them: in the compute dtype, and per layer where
  layers are unrolled. `slicing.slice_blocks` takes either form."""
  blocks = jax.tree.map(lambda x: x.astype(execution.dtype), blocks)
  if execution.scan_layers:
    return blocks
  return {span: layers.unstack(stack) for span, stack in blocks.items()}


def extend(
  blocks: list[tuple[gran.Slice, layers.Params]],
  config: MatLMConfig,
  execution: Execution,
  x_BxTxD,
  cache: Cache,
  start,
  block_class=layers.Block,
  origin_BxT=None,
):
  """Runs a submodel's layers on T new tokens and adds them to the cache.

  Args:
    blocks: the submodel's, from `slicing.slice_blocks` of what `lay_out` returns.
    config: of the model whose layout the cache has.
    x_BxTxD: embedded tokens.
    start: [B] int32, their first position; rows below it must be in the cache. None:
      the tokens are positions 0 to T-1, and the cache is not read.
    block_class: what a layer is.
    origin_BxT: int32 [B, T] or [B, 1], the position at which the document of each token
      begins, as in layers.Attention; keys are cached rotated by their place in it.

  Returns:
    ([B, T, D], cache).
  """
  cache = list(cache)
  first = 0
  for part, params in blocks:
    block = block_class(config, execution, part.span, parent=None)
    if execution.scan_layers:

      def step(carry, xs, block=block):
        layer_params, layer = xs
        out = block.apply({"params": layer_params}, *carry, start, layer, origin_BxT=origin_BxT)
        return out, None

      (x_BxTxD, cache[part.source]), _ = jax.lax.scan(
        step, (x_BxTxD, cache[part.source]), (params, jnp.arange(part.start, part.stop))
      )
    else:
      for layer_params in params:
        x_BxTxD, cache[first] = block.apply(
          {"params": layer_params}, x_BxTxD, cache[first], start, origin_BxT=origin_BxT
        )
        first += 1
  return x_BxTxD, cache


def branch(
  blocks: list[tuple[gran.Slice, layers.Params]],
  config: MatLMConfig,
  execution: Execution,
  x_RxTxD,
  cache: Cache,
  start,
  owner,
):
  """Runs a submodel's layers on R rows of T tokens, each of which continues a row of a cache.

  Several may continue the same one; the cache stays as it is.

  Args:
    blocks, config: as for `extend`.
    x_RxTxD: embedded tokens.
    start: [R] int32, how much of its cached row each continues.
    owner: int32 [shards, R / shards], the cached row that each continues, counted within the
      batch shard that both are on.

  Returns:
    [R, T, D].
  """
  shards, length = owner.shape[0], x_RxTxD.shape[1]

  def continued(leaf):
    """[B, A, N, S, H] to [R, A, N, S + T, H]."""
    rows = leaf.reshape(shards, -1, *leaf.shape[1:])
    rows = jax.vmap(lambda rows, own: jnp.take(rows, own, axis=0))(rows, owner)
    rows = rows.reshape(-1, *leaf.shape[1:])
    rows = jnp.pad(rows, ((0, 0),) * 3 + ((0, length), (0, 0)))
    return sharding.constrain(rows, logical_axes(rows), execution)

  first = 0
  for part, params in blocks:
    block = layers.Block(config, execution, part.span, parent=None)

    def step(x, xs, block=block):
      layer_params, layer_cache = xs
      layer_cache = jax.tree.map(continued, layer_cache)
      return block.apply({"params": layer_params}, x, layer_cache, start)[0], None

    if execution.scan_layers:
      own = jax.tree.map(lambda leaf: leaf[part.start : part.stop], cache[part.source])
      x_RxTxD, _ = jax.lax.scan(step, x_RxTxD, (params, own))
    else:
      for layer_params in params:
        x_RxTxD, _ = step(x_RxTxD, (layer_params, cache[first]))
        first += 1
  return x_RxTxD


def logical_axes(leaf) -> tuple[str, ...]:
  """Of an array of a cache, stacked or of one layer; see sharding.py."""
  axes = ("batch", "head_groups", "heads", "length", "head_dim")
  return ("layers",) * (leaf.ndim - len(axes)) + axes
