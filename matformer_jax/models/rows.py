"""Sequences of different sizes in one batch: the granularity of each row as an array.

The sizes are nested, so a batch of them costs no more than its largest: what size i adds to
size i-1 (rows m_{i-1} to m_i of W_in and W_out in Eq. 1) is computed where a row has that
size, and skipped where none has. One program serves every mix of sizes.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from matformer_jax.config import Execution, MatLMConfig, Span
from matformer_jax.models import cache as kv
from matformer_jax.models import layers

Params = Any


class _Attend(layers.Block):
  """A block's attention half."""

  @nn.compact
  def __call__(self, x_BxTxD, cache, start, layer, heads_B):
    return self.attend(x_BxTxD, cache, start, layer, None, None, heads_B)


class _Norm(layers.Block):
  """The norm before a block's FFN."""

  @nn.compact
  def __call__(self, x_BxTxD):
    return layers.Norm(self.config, self.execution, name="ffn_norm")(x_BxTxD)


def lay_out(blocks: Params, config: MatLMConfig, execution: Execution) -> Params:
  """Stored stacks as `extend` takes them: as of cache.lay_out, each FFN cut where sizes end."""

  def cut(layer: Params, span: Span) -> Params:
    bounds = [width // config.ffn_groups for width in (0, *config.ffn_widths[: span.ffn + 1])]
    piece = lambda leaf, i: leaf[..., bounds[i] : bounds[i + 1], :]  # of [..., G, K, D]
    pieces = [
      {name: piece(leaf, i) for name, leaf in layer["ffn"].items()} for i in range(span.ffn + 1)
    ]
    return {**layer, "ffn": pieces}

  laid_out = kv.lay_out(blocks, execution)
  return {
    str(i): [cut(layer, span) for layer in laid_out[str(i)]]
    if isinstance(laid_out[str(i)], list)
    else cut(laid_out[str(i)], span)
    for i, span in enumerate(config.spans)
  }


def extend(
  blocks: Params,
  config: MatLMConfig,
  execution: Execution,
  x_BxTxD: jax.Array,
  cache: kv.Cache,
  start: jax.Array,
  ffn_LxB: jax.Array,
  heads_LxB: jax.Array,
) -> tuple[jax.Array, kv.Cache]:
  """As cache.extend, for rows of different sizes.

  Args:
    blocks: from `lay_out`.
    ffn_LxB, heads_LxB: int32, granularity index of each layer of each row; -1 for a row
      that nobody reads. One above a layer's stored width is cut to it.
  """
  cache = list(cache)
  first, at = 0, 0  # of the layers, and of the cache's arrays
  for i, span in enumerate(config.spans):
    stored = blocks[str(i)]
    sizes = slice(first, first + span.num_layers)
    ffn, heads = ffn_LxB[sizes], heads_LxB[sizes]
    if isinstance(stored, list):
      for layer_params, ffn_B, heads_B in zip(stored, ffn, heads):
        layer = _Layer(config, execution, span)
        x_BxTxD, cache[at] = layer(layer_params, x_BxTxD, cache[at], start, None, ffn_B, heads_B)
        at += 1
    else:

      def step(carry, xs, layer=_Layer(config, execution, span)):
        x_BxTxD, cache = carry
        layer_params, number, ffn_B, heads_B = xs
        return layer(layer_params, x_BxTxD, cache, start, number, ffn_B, heads_B), None

      numbers = jnp.arange(span.num_layers)
      carry, _ = jax.lax.scan(step, (x_BxTxD, cache[at]), (stored, numbers, ffn, heads))
      x_BxTxD, cache[at] = carry
      at += 1
    first += span.num_layers
  return x_BxTxD, cache


class _Layer:
  """One layer of a span, for rows of sizes of their own."""

  def __init__(self, config: MatLMConfig, execution: Execution, span: Span):
    self._config, self._execution, self._span = config, execution, span
    self._attend: Any = _Attend(config, execution, span, parent=None)
    self._norm: Any = _Norm(config, execution, span, parent=None)

  def __call__(self, params, x_BxTxD, cache, start, layer, ffn_B, heads_B):
    rest = {name: leaf for name, leaf in params.items() if name != "ffn"}
    heads_B = self._head_counts(heads_B)
    x_BxTxD, cache = self._attend.apply({"params": rest}, x_BxTxD, cache, start, layer, heads_B)
    y_BxTxD = self._norm.apply({"params": rest}, x_BxTxD)
    for size, piece in enumerate(params["ffn"]):
      x_BxTxD += self._added(size, piece, y_BxTxD, ffn_B)
    return x_BxTxD, cache

  def _head_counts(self, heads_B):
    """Heads per row; None where heads are not nested."""
    if not self._config.nested_heads:
      return None
    counts = jnp.asarray(self._config.head_counts, jnp.int32)
    return counts[jnp.clip(heads_B, 0, self._span.heads)]

  def _added(self, size: int, piece: Params, y_BxTxD, ffn_B):
    """What a size adds to the one below it, in the rows that have it."""
    width = piece["in"].shape[-2] * self._config.ffn_groups
    ffn: Any = layers.NestedFFN(self._config, self._execution, width, parent=None)
    rows = ffn_B >= size
    run = lambda: jnp.where(rows[:, None, None], ffn.apply({"params": piece}, y_BxTxD), 0)
    return jax.lax.cond(jnp.any(rows), run, lambda: jnp.zeros_like(y_BxTxD))
