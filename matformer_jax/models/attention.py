"""Attention with a hand-written gradient, causal or not, and attention to a cache.

All arrays are head-major, [B, A, N, T, H]: batch, head group, head, token, width. There may be
R times as many heads of queries as of keys and values (grouped-query attention); those of a
key come one after the other, and are taken as R times as many rows.
Queries are taken in blocks, each against only the keys it may see, so a causal mask's
triangle is mostly not computed and a block's scores stay in cache. The gradient
recomputes the probabilities from the saved log-sum-exp, and forms the gradients
of keys and values transposed ([H, S]): XLA's CPU matmul is 8x slower on the
direct form, whose left operand is contracted along its rows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from matformer_jax import sharding


def self_attention(q, k, v, causal: bool, execution, origin_BxT=None) -> jax.Array:
  """Attention of [B, A, N, T, H] to itself, by what suits the device; see `blocked_attention`."""
  if runs_kernel(q.shape[3], execution):
    return flash_attention(q, k, v, causal, execution, origin_BxT)
  return blocked_attention(q, k, v, causal, execution.attention_block, origin_BxT)


def runs_kernel(length: int, execution) -> bool:
  """Whether attention to that many tokens is `flash_attention`."""
  return execution.kernels is not None and length % 128 == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def blocked_attention(q, k, v, causal: bool, block: int, origin_BxT=None) -> jax.Array:
  """softmax(q k^T) v, softmax in float32.

  Args:
    q: [B, A, N * R, T, H], already scaled by H**-0.5.
    k, v: [B, A, N, T, H].
    causal: query t attends to keys 0..t only.
    block: queries taken at a time.
    origin_BxT: int32, where the document of each token begins in its row, from
      `ops.document_origins`; tokens see their own document only. None: one document a row.

  Returns:
    [B, A, N * R, T, H] in v's dtype.
  """
  return _forward(q, k, v, causal, block, origin_BxT)[0]


def _blocks(length: int, causal: bool, block: int) -> list[tuple[int, int, int]]:
  """(first query, end of queries, end of the keys that they may see)."""
  if not isinstance(length, int):  # symbolic, see exporting/stablehlo.py
    return [(0, length, length)]
  stops = [(i, min(i + block, length)) for i in range(0, length, block)]
  return [(start, stop, stop if causal else length) for start, stop in stops]


def _by_key(x, k):
  """[B, A, N * R, t, H] as [B, A, N, R * t, H]: the rows that attend to each of N keys."""
  heads, (_, _, count, rows, width) = k.shape[2], x.shape
  return x if count == heads else x.reshape(x.shape[:2] + (heads, count // heads * rows, width))


def _by_query(x, q):
  """The inverse of `_by_key`, for the heads of q."""
  return x if x.shape[2] == q.shape[2] else x.reshape(q.shape[:3] + (-1, x.shape[-1]))


def _for_rows(visible, scores):
  """[..., t, S] repeated for the R * t rows of scores."""
  repeats = scores.shape[-2] // visible.shape[-2]
  if repeats == 1:
    return visible
  return jnp.tile(visible, (1,) * (visible.ndim - 2) + (repeats, 1))


def _scores(q, k, origin_BxT, causal: bool, start: int, stop: int, seen: int) -> jax.Array:
  scores = jnp.einsum(
    "banth,bansh->bants",
    _by_key(q[..., start:stop, :], k),
    k[..., :seen, :],
    preferred_element_type=jnp.float32,
  )
  visible = None
  if causal:
    visible = jnp.arange(start, stop)[:, None] >= jnp.arange(seen)
  if origin_BxT is not None:
    own_BxTxS = origin_BxT[:, start:stop, None] == origin_BxT[:, None, :seen]
    own_Bx1x1xTxS = own_BxTxS[:, None, None]
    visible = own_Bx1x1xTxS if visible is None else visible & own_Bx1x1xTxS
  if visible is None:
    return scores
  return jnp.where(_for_rows(visible, scores), scores, jnp.finfo(jnp.float32).min)


def _forward(q, k, v, causal, block, origin_BxT):
  outs, lses = [], []
  for start, stop, seen in _blocks(q.shape[3], causal, block):
    scores = _scores(q, k, origin_BxT, causal, start, stop, seen)
    top = jnp.max(scores, -1, keepdims=True)
    exp = jnp.exp(scores - top)
    total = jnp.sum(exp, -1, keepdims=True)
    out = jnp.einsum(
      "bants,bansh->banth",
      exp.astype(v.dtype),
      v[..., :seen, :],
      preferred_element_type=jnp.float32,
    )
    outs.append(_by_query((out / total).astype(v.dtype), q))
    lses.append(_by_query(top + jnp.log(total), q))
  return _join(outs), _join(lses)


def _join(pieces):
  return jnp.concatenate(pieces, axis=3) if len(pieces) > 1 else pieces[0]


def _attention_fwd(q, k, v, causal, block, origin_BxT):
  out, lse = _forward(q, k, v, causal, block, origin_BxT)
  return out, (q, k, v, origin_BxT, out, lse)


def _attention_bwd(causal, block, residuals, d_out):
  q, k, v, origin_BxT, out, lse = residuals
  d_out = jax.lax.optimization_barrier(d_out)  # transpose to head-major once, before use
  # A product with ones: on CPU 10x faster than a fused row sum.
  dot = jnp.matmul(
    d_out.astype(jnp.float32) * out.astype(jnp.float32),
    jnp.ones((out.shape[-1], 1)),
    precision="highest",
  )
  d_q = []
  d_k_HxS = d_v_HxS = jnp.zeros(k.shape[:3] + (k.shape[4], k.shape[3]), jnp.float32)
  for start, stop, seen in _blocks(q.shape[3], causal, block):
    rows = lambda x: _by_key(x[..., start:stop, :], k)
    p = jnp.exp(_scores(q, k, origin_BxT, causal, start, stop, seen) - rows(lse))
    d_p = jnp.einsum(
      "banth,bansh->bants", rows(d_out), v[..., :seen, :], preferred_element_type=jnp.float32
    )
    d_s = (p * (d_p - rows(dot))).astype(q.dtype)
    d_q.append(_by_query(jnp.einsum("bants,bansh->banth", d_s, k[..., :seen, :]), q))
    d_k_HxS = d_k_HxS.at[..., :seen].add(jnp.einsum("banth,bants->banhs", rows(q), d_s))
    d_v_HxS = d_v_HxS.at[..., :seen].add(
      jnp.einsum("banth,bants->banhs", rows(d_out), p.astype(d_out.dtype))
    )
  swap = lambda x, like: jnp.swapaxes(x, -1, -2).astype(like.dtype)
  grads = jax.lax.optimization_barrier((_join(d_q), swap(d_k_HxS, k), swap(d_v_HxS, v)))
  return *grads, None


blocked_attention.defvjp(_attention_fwd, _attention_bwd)


def flash_attention(
  q, k, v, causal: bool, execution, origin_BxT=None, interpret: bool = False
) -> jax.Array:
  """As `blocked_attention`, by JAX's Pallas kernel for TPU v4 and later: no scores in HBM.

  At 78M, 64 x 1024 tokens on a TPU v5e core, XLA's own estimate of a step's cycles is 54%
  attention without it. T must be a multiple of 128.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  def heads(qkv, origin_bxT):
    """[b, n, T, H] of the heads and rows that are here."""
    q = qkv[0]
    _, count, length, width = q.shape
    block, fused = kernel_block(length, width)
    unused = ("block_q_dq", "block_kv_dq") if fused else ()
    names = [f.name for f in dataclasses.fields(splash.BlockSizes)]
    blocks: Any = {n: block for n in names if n.startswith("block_") and n not in unused}
    # As XLA's products write them, with tokens along the lanes: else each is copied.
    by_token = splash.QKVLayout.SEQ_MINOR
    layouts = {f"{name}_layout": by_token for name in "qkv"}
    sizes = splash.BlockSizes(use_fused_bwd_kernel=fused, **blocks, **layouts)
    mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
    kernel: Any = splash.make_splash_mha(
      masks.MultiHeadMask([mask] * count),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name="attention",
      interpret=interpret,
    )
    if origin_bxT is None:
      return jax.vmap(kernel)(*qkv)
    # An origin is as good a number for a document as any.
    return jax.vmap(kernel)(*qkv, segment_ids=splash.SegmentIds(origin_bxT, origin_bxT))

  heads = sharding.on_head_shards(heads, execution)
  merged = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
  out = heads((merged(q), merged(k), merged(v)), origin_BxT)
  return out.reshape(q.shape).astype(v.dtype)


def kernel_block(length: int, head_dim: int) -> tuple[int, bool]:
  """(tokens in a block of the kernel, whether one kernel makes all gradients).

  By the instructions that the compiler schedules for a layer of 850M on a v5p, 1.25 ms with one
  block of 1024, 1.54 with separate kernels for gradients, and 1.62 with blocks of 512, of which
  a causal mask skips a quarter. One kernel for several blocks writes a float32 gradient of the
  queries for each of them; wide heads leave no room for blocks of 1024.
  """
  sizes = (1024, 512, 256, 128) if head_dim <= 128 else (512, 256, 128)
  block = next(b for b in sizes if length % b == 0)
  return block, block == length


def kernel_width(head_dim: int) -> int:
  """To which the kernel pads heads."""
  return -(-head_dim // 128) * 128


def cached_attention(q, k, v, start, origin_BxT=None) -> jax.Array:
  """Attention of T new tokens to a cache that already holds their keys and values.

  Args:
    q: [B, A, N * R, T, H] of the new tokens, already scaled by H**-0.5.
    k, v: [B, A, N, S, H]; query t of row b attends to positions 0 to start[b] + t.
    start: [B] int32.
    origin_BxT: int32 [B, T] or [B, 1], the first position that a query may see; None: 0.

  Returns:
    [B, A, N * R, T, H] in v's dtype.
  """
  scores = jnp.einsum("banth,bansh->bants", _by_key(q, k), k, preferred_element_type=jnp.float32)
  position = start[:, None] + jnp.arange(q.shape[3])
  visible = position[:, None, None, :, None] >= jnp.arange(k.shape[3])
  if origin_BxT is not None:
    visible &= origin_BxT[:, None, None, :, None] <= jnp.arange(k.shape[3])
  visible = _for_rows(visible, scores)
  weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min))
  return _by_query(jnp.einsum("bants,bansh->banth", weights.astype(v.dtype), v), q)


def write_cache(old, new, start, layer) -> jax.Array:
  """Puts [B, A, n, T, H] into a cache at each row's own position start[b].

  Args:
    old: [B, A, N, S, H], or [L, B, A, N, S, H] with `layer` the index to write.
    start: [B] int32; None writes at position 0.
  """
  new = new.astype(old.dtype)
  leading = () if layer is None else (layer,)
  if start is None:
    window = new if layer is None else new[None]
    return jax.lax.dynamic_update_slice(old, window, leading + (0,) * 5)
  batch, _, _, length, _ = old.shape[-5:]
  if batch == 1:
    # A second index, out of bounds and so dropped: of a scatter with a single one XLA
    # makes a dynamic-update-slice, which its CPU backend fuses into every reader of the
    # cache, giving each a copy.
    start = jnp.concatenate([start, jnp.full(1, length, start.dtype)])
    new = jnp.concatenate([new, new])
  row = jnp.minimum(jnp.arange(start.size), batch - 1)
  index = jnp.stack([*(jnp.full_like(start, i) for i in leading), row, start], axis=1)
  rank, rows = old.ndim, len(leading)  # rows: the axis of B
  windows = jnp.expand_dims(new, tuple(range(1, rows + 2)))  # [B, (1,) 1, A, n, T, H]
  whole = jax.lax.ScatterDimensionNumbers(
    update_window_dims=tuple(range(1, rank + 1)),
    inserted_window_dims=(),
    scatter_dims_to_operand_dims=(*range(rows + 1), rank - 2),
  )
  return jax.lax.scatter(
    old, index, windows, whole, unique_indices=True, mode=jax.lax.GatherScatterMode.FILL_OR_DROP
  )
