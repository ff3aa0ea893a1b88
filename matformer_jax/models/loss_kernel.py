"""The cross-entropy of a large vocabulary in two Pallas kernels, for TPU v4 and later.

The first multiplies rows by the embedding and, while a tile of logits is at hand, adds it to the
log-sum-exp; the second makes the logits' gradient from them and multiplies it by the embedding.
So neither the softmax nor its gradient reads or writes memory of its own.

Shape letters: R rows (tokens), D d_model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from matformer_jax.tpu import chips

_LANES = 128
_LEAST_VOCAB = 256  # of a tile: sums of narrower ones take longer than their products
_VMEM_SPARE = 2 * 2**20  # of what the chip has, for the compiler


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How the kernels cut their work.

  Attributes:
    rows, vocab: of a tile of logits; they divide R and V.
    keep_logits: write float32 logits to memory for the gradient to read. Otherwise they are
      computed again, which is faster where D is small.
    vmem_bytes: that a kernel may use.
    interpret: run on CPU, as a test.
  """

  rows: int
  vocab: int
  keep_logits: bool
  vmem_bytes: int
  interpret: bool = False


def choose_tiles(rows: int, vocab: int, width: int, tpu: chips.Tpu) -> Tiles | None:
  """Tiles for bf16 operands that fit a chip; None where the sizes do not divide into any."""
  limit = tpu.vmem_bytes - _VMEM_SPARE
  fitting = [
    (r, v)
    for r in (512, 256, _LANES)
    for v in range(2048, _LEAST_VOCAB - 1, -_LANES)
    if rows % r == 0 and vocab % v == 0 and _tile_bytes(r, v, width) <= limit
  ]
  if not fitting:
    return None
  # Each tile of rows reads the whole embedding. With as many rows as the chip multiplies and adds
  # in the time that it reads a byte, that takes as long as the product.
  enough = tpu.peak_flops / tpu.hbm_bytes_per_s
  r, v = max(fitting, key=lambda tile: (min(tile[0], enough), tile[0] * tile[1]))
  return Tiles(r, v, keep_logits(width, tpu), limit)


def keep_logits(width: int, tpu: chips.Tpu) -> bool:
  """Whether moving a logit to memory and back takes less time than a second product."""
  flops_per_byte = tpu.peak_flops / tpu.hbm_bytes_per_s
  product = 2 * width
  # Written by the first kernel; read by the second, which writes a bf16 gradient.
  kept = max(product, 4 * flops_per_byte) + max(product, 6 * flops_per_byte)
  return kept <= product + max(2 * product, 2 * flops_per_byte)


def _tile_bytes(rows: int, vocab: int, width: int) -> int:
  """VMEM of the second kernel, the larger one: what is moved is there twice."""
  moved = 2 * width * (2 * rows + vocab) + rows * vocab * (4 + 2) + 2 * 4 * _LANES * rows
  scratch = 4 * rows * width + 3 * 4 * rows * vocab
  return 2 * moved + scratch


def logits_sums(x_RxD, embedding_VxD, targets_R, tiles: Tiles):
  """What the loss needs of logits = x @ embedding.T.

  Returns:
    (log-sum-exp [R], logits of the targets [R], logits [R, V] where they are kept), float32.
  """
  (rows, width), vocab, keep = x_RxD.shape, embedding_VxD.shape[0], tiles.keep_logits
  grid = (rows // tiles.rows, vocab // tiles.vocab)
  of_rows, of_vocab, tile, per_row = _blocks(tiles, width)
  column = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
  whole = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
  lse, target, *logits = pl.pallas_call(
    functools.partial(_sums_kernel, keep),
    grid=grid,
    in_specs=[of_rows, of_vocab, per_row],
    out_specs=[per_row, per_row] + [tile] * keep,
    out_shape=[column, column] + [whole] * keep,
    scratch_shapes=[pltpu.VMEM((tiles.rows, _LANES), jnp.float32)] * 3,
    cost_estimate=pl.CostEstimate(
      flops=2 * rows * vocab * width,
      transcendentals=rows * vocab,
      bytes_accessed=2 * grid[0] * vocab * width + 2 * rows * width + 4 * rows * vocab * keep,
    ),
    **_options(tiles),
    name="logits_sums",
  )(x_RxD, embedding_VxD, targets_R[:, None])
  return lse[:, 0], target[:, 0], logits[0] if keep else None


def _sums_kernel(keep, x_ref, embedding_ref, targets_ref, lse_ref, target_ref, *rest):
  (logits_ref,), sums = (rest[:1], rest[1:]) if keep else ((None,), rest)
  top_ref, total_ref, hit_ref = sums  # one for each lane until the last tile
  tile, last = pl.program_id(1), pl.num_programs(1) - 1

  @pl.when(tile == 0)
  def _():
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    hit_ref[...] = jnp.zeros_like(hit_ref)

  logits = _product(x_ref[...], embedding_ref[...])
  if keep:
    logits_ref[...] = logits
  hits = _by_lane(jnp.where(_is_target(targets_ref, logits), logits, 0.0))
  hit_ref[...] = functools.reduce(jnp.add, hits, hit_ref[...])
  columns = _by_lane(logits)
  top = functools.reduce(jnp.maximum, columns, top_ref[...])
  total = total_ref[...] * jnp.exp(top_ref[...] - top)
  total_ref[...] = functools.reduce(lambda sum_, x: sum_ + jnp.exp(x - top), columns, total)
  top_ref[...] = top

  @pl.when(tile == last)
  def _():
    row_top = jnp.max(top_ref[...], axis=1, keepdims=True)
    total = jnp.sum(total_ref[...] * jnp.exp(top_ref[...] - row_top), axis=1, keepdims=True)
    lse_ref[...] = row_top + jnp.log(total)
    target_ref[...] = jnp.sum(hit_ref[...], axis=1, keepdims=True)


def _by_lane(tile) -> list[jax.Array]:
  """[rows, n * 128] as n of [rows, 128]."""
  return jnp.split(tile, tile.shape[1] // _LANES, axis=1)


def gradients(x_RxD, embedding_VxD, targets_R, lse_R, logits_RxV, scale, z_loss, tiles: Tiles):
  """The gradient of scale * sum(lse - target + z_loss * lse**2).

  Args:
    logits_RxV: from `logits_sums`; None computes them again.

  Returns:
    (of the logits [R, V], of x [R, D]) in x's dtype.
  """
  (rows, width), vocab = x_RxD.shape, embedding_VxD.shape[0]
  grid = (rows // tiles.rows, vocab // tiles.vocab)
  of_rows, of_vocab, tile, per_row = _blocks(tiles, width)
  kept = logits_RxV is not None
  products = 1 if kept else 2
  return pl.pallas_call(
    functools.partial(_gradients_kernel, kept, scale, z_loss),
    grid=grid,
    in_specs=[tile if kept else of_rows, of_vocab, per_row, per_row],
    out_specs=[tile, of_rows],
    out_shape=[
      jax.ShapeDtypeStruct((rows, vocab), x_RxD.dtype),
      jax.ShapeDtypeStruct(x_RxD.shape, x_RxD.dtype),
    ],
    scratch_shapes=[pltpu.VMEM((tiles.rows, width), jnp.float32)],
    cost_estimate=pl.CostEstimate(
      flops=products * 2 * rows * vocab * width,
      transcendentals=rows * vocab,
      bytes_accessed=2 * grid[0] * vocab * width + 4 * rows * width + rows * vocab * (2 + 4 * kept),
    ),
    **_options(tiles),
    name="logits_gradients",
  )(logits_RxV if kept else x_RxD, embedding_VxD, targets_R[:, None], lse_R[:, None])


def _gradients_kernel(
  kept, scale, z_loss, left_ref, embedding_ref, targets_ref, lse_ref, d_logits_ref, d_x_ref, sum_ref
):
  tile, last = pl.program_id(1), pl.num_programs(1) - 1

  @pl.when(tile == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  logits = left_ref[...] if kept else _product(left_ref[...], embedding_ref[...])
  lse = lse_ref[...]
  slope = scale * (1.0 + 2.0 * z_loss * lse)
  hit = jnp.where(_is_target(targets_ref, logits), scale, 0.0)
  d_logits = (jnp.exp(logits - lse) * slope - hit).astype(d_logits_ref.dtype)
  d_logits_ref[...] = d_logits
  sum_ref[...] += jnp.dot(d_logits, embedding_ref[...], preferred_element_type=jnp.float32)

  @pl.when(tile == last)
  def _():
    d_x_ref[...] = sum_ref[...].astype(d_x_ref.dtype)


def _product(x, embedding) -> jax.Array:
  """x @ embedding.T in float32."""
  over_width = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(x, embedding, over_width, preferred_element_type=jnp.float32)


def _is_target(targets_ref, logits) -> jax.Array:
  """Which of a tile's logits are those of the targets."""
  first = pl.program_id(1) * logits.shape[1]
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets_ref[...] - first


def _blocks(tiles: Tiles, width: int) -> tuple[pl.BlockSpec, ...]:
  """Of rows [R, D], of the embedding [V, D], of logits [R, V], and of a number a row [R, 1]."""
  return (
    pl.BlockSpec((tiles.rows, width), lambda i, j: (i, 0)),
    pl.BlockSpec((tiles.vocab, width), lambda i, j: (j, 0)),
    pl.BlockSpec((tiles.rows, tiles.vocab), lambda i, j: (i, j)),
    pl.BlockSpec((tiles.rows, 1), lambda i, j: (i, 0)),
  )


def _options(tiles: Tiles) -> dict:
  return dict(
    interpret=tiles.interpret,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
    ),
  )
