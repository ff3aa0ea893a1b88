"""What layers are made of: initializers, norms, dropout, rotary positions, matrix products.

Functions of arrays; the modules that call them are in layers.py, whose shape letters they use.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax.config import Execution, ModelConfig, rope_scale

ACTIVATION: dict[str, Callable] = {
  "gelu": nn.gelu,  # tanh approximation
  "relu2": lambda x: jnp.square(nn.relu(x)),  # Primer's squared ReLU
  "silu": nn.silu,
  "relu": nn.relu,
}

# ------------------------------------------------------- initializers


def scaled_normal(fan_in: int, gain: float = 1.0):
  """Initializer: normal with standard deviation gain / sqrt(fan_in)."""
  return nn.initializers.normal(gain * fan_in**-0.5)


def glorot_uniform(fan_in: int, fan_out: int):
  """Initializer: uniform within sqrt(6 / (fan_in + fan_out)), whatever the array's shape."""
  bound = (6 / (fan_in + fan_out)) ** 0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def projection_init(config: ModelConfig, fan_in: int, fan_out: int, residual: bool = False):
  """Initializer of a block's projection; `residual`: its output is added to the stream."""
  if config.glorot:
    return glorot_uniform(fan_in, fan_out)
  return scaled_normal(fan_in, (2 * config.num_layers) ** -0.5 if residual else 1.0)


# -------------------------------------------------------------- norms


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(x, scale_D, eps: float, fuse: bool = False):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, in x's dtype.

  Args:
    fuse: leave it to XLA what to fuse: right for accelerators, several times slower on CPU.
  """
  return _rms_norm_fwd(x, scale_D, eps, fuse)[0]


def _rms_norm_fwd(x, scale_D, eps, fuse):
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
  return (x32 * inverse * scale_D).astype(x.dtype), (x, scale_D, inverse)


def _rms_norm_bwd(eps, fuse, residuals, g):
  x, scale_D, inverse = residuals
  row_mean = (lambda y: jnp.mean(y, -1, keepdims=True)) if fuse else _row_mean
  # Not fused with the product that makes it: on TPU these sums would slow that down by a third.
  g = jax.lax.optimization_barrier(g).astype(jnp.float32)
  unit = x.astype(jnp.float32) * inverse
  g_unit = g * scale_D
  d_x = inverse * (g_unit - unit * row_mean(g_unit * unit))
  product = g * unit
  if not fuse:  # XLA's CPU backend would compute it again inside a strided sum
    product = jax.lax.optimization_barrier(product)
  d_scale = jnp.sum(product, tuple(range(x.ndim - 1)))
  return d_x.astype(x.dtype), d_scale


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def layer_norm(x, scale_D, bias_D, eps: float, fuse: bool = False):
  """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in x's dtype."""
  x32 = x.astype(jnp.float32)
  mean = jnp.mean(x32, -1, keepdims=True) if fuse else _row_mean(x32)
  return (rms_norm(x32 - mean, scale_D, eps, fuse) + bias_D).astype(x.dtype)


def _row_mean(x32) -> jax.Array:
  """Mean over the last axis, kept: as a product, 10x faster than a fused row sum on CPU."""
  return jnp.matmul(x32, jnp.full((x32.shape[-1], 1), 1 / x32.shape[-1]), precision="highest")


# ------------------------------------------------------------ dropout


def drop(x, rate, seeds_B, whole_rows: bool = False) -> jax.Array:
  """Dropout, scaled to keep the mean: of elements of x, or of all of a row (stochastic depth).

  What is dropped depends on a row's seed alone, not on the mesh. The numbers are a hash of
  seed and place: JAX's own generators cost more than the rest of the step (B/16 on TPU v3,
  XLA's estimate of XL: 5.1 s with them, 2.7 s without dropout).

  Args:
    x: [B, ...].
    rate: probability, may be traced.
    seeds_B: uint32, one per row.
  """
  shape = (1,) * (x.ndim - 1) if whole_rows else x.shape[1:]
  place, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    stride *= shape[axis]
  bits = mix_bits(mix_bits(place) + seeds_B.reshape((-1,) + (1,) * len(shape)))
  keep = bits >= jnp.asarray(rate * 2.0**32, jnp.float32).astype(jnp.uint32)
  return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), 0)


def fold_seeds(seeds_B, data) -> jax.Array:
  """A new uint32 seed per row, for another use."""
  return mix_bits(mix_bits(seeds_B) + jnp.asarray(data).astype(jnp.uint32))


def mix_bits(x) -> jax.Array:
  """A bijection of uint32 that mixes all bits (Wellons' `lowbias32`)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


# --------------------------------------------------- rotary positions


def rope_table(length: int, head_dim: int, base: float, scaling: tuple[float, ...] = ()):
  """sin, cos of shape [T, H/2] (Su et al. 2021), as constants of the program.

  Args:
    scaling: as MatLMConfig.rope_scaling.
  """
  frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
  if scaling:
    frequency = frequency * rope_scale(head_dim, base, scaling)
  angle_TxH = np.arange(length)[:, None] * frequency
  return np.sin(angle_TxH).astype(np.float32), np.cos(angle_TxH).astype(np.float32)


def document_origins(segments_BxT) -> jax.Array:
  """[B, T] int32: the place in its row of the first token of each token's document.

  Args:
    segments_BxT: the number of the document of each token; a document is a run of one number.
  """
  new_BxT = jnp.pad(segments_BxT[:, 1:] != segments_BxT[:, :-1], ((0, 0), (1, 0)))
  place_T = jnp.arange(segments_BxT.shape[1], dtype=jnp.int32)
  return jax.lax.cummax(jnp.where(new_BxT, place_T, 0), axis=1)


def apply_rope(x, sin, cos):
  """Rotates the two halves of the last axis of [..., T, H] by position."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return rotated.astype(x.dtype)


@jax.custom_vjp
def apply_rope_by_product(x, sin, cos):
  """The same, for matrix units: the halves change places in a product, not across lanes.

  XLA's estimate of attention without its kernel, 850M's on a TPU v5p, is 4.4 ms a layer with
  slices and 3.7 with products. The gradient is the rotation back, and so as cheap.
  """
  return _rotate(x, sin, cos)


def _rotate(x, sin, cos):
  half = x.shape[-1] // 2
  swap = np.zeros((2 * half, 2 * half), np.float32)  # (first, second) -> (-second, first)
  swap[half:, :half], swap[:half, half:] = -np.eye(half), np.eye(half)
  swapped = jnp.matmul(
    x, jnp.asarray(swap, x.dtype), precision="highest", preferred_element_type=jnp.float32
  )
  both = lambda table: jnp.concatenate([table, table], -1)
  return (x.astype(jnp.float32) * both(cos) + swapped * both(sin)).astype(x.dtype)


apply_rope_by_product.defvjp(
  lambda x, sin, cos: (_rotate(x, sin, cos), (sin, cos)),
  lambda tables, g: (_rotate(g, -tables[0], tables[1]), None, None),
)


# ---------------------------------------------------- matrix products


def project_in(x_BxTxD, weight, execution: Execution) -> jax.Array:
  """[B, T, D] times a neuron-major weight [..., D], to [B, T, ...]."""
  if execution.flat_weights:
    x_RxD, w_FxD = _rows(x_BxTxD, 2), _rows(weight, weight.ndim - 1)
    return flat_matmul_transposed(x_RxD, w_FxD).reshape(x_BxTxD.shape[:2] + weight.shape[:-1])
  return jax.lax.dot_general(x_BxTxD, weight, (((2,), (weight.ndim - 1,)), ((), ())))


def project_heads(x_BxTxD, weight) -> jax.Array:
  """[B, T, D] times [A, N, H, D], head-major: [B, A, N, T, H]."""
  return jnp.einsum("btd,anhd->banth", x_BxTxD, weight)


def project_out(y, weight, execution: Execution) -> jax.Array:
  """[B, T, ...] times a neuron-major weight [..., D], to [B, T, D]."""
  if execution.flat_weights:
    y_RxF, w_FxD = y.reshape(y.shape[0] * y.shape[1], -1), _rows(weight, weight.ndim - 1)
    return flat_matmul(y_RxF, w_FxD).reshape(y.shape[:2] + weight.shape[-1:])
  axes = tuple(range(weight.ndim - 1))
  return jax.lax.dot_general(y, weight, ((tuple(a + 2 for a in axes), axes), ((), ())))


def _rows(x, leading: int) -> jax.Array:
  """Merges the first `leading` axes."""
  return x.reshape((-1,) + x.shape[leading:])


# Weight gradients on CPU: XLA fuses the transposition of an operand into whatever
# produced it, and then walks memory with a stride. So the narrow operand (D wide)
# is transposed, never the wide one, and the product is transposed back.
# At T=512, D=256, F=1024: 4.5 ms -> 2.7 ms for the gradient of W_out.


def _weight_gradient(wide_RxF, narrow_RxD) -> jax.Array:
  """wide.T @ narrow, as (narrow.T @ wide).T."""
  barrier = jax.lax.optimization_barrier
  return barrier(barrier(narrow_RxD.T) @ wide_RxF).T


PART = 2**16  # weights that are worth a thread's while
MOST_PARTS = 8


@jax.custom_vjp
def flat_matmul(y_RxF, w_FxD):
  """y @ w with CPU-friendly gradients.

  XLA multiplies one row on one thread, and a batch of products on several: as a sum of such a
  batch, W_out at D=256, F=1024 makes a whole decoding step a quarter faster on two threads.
  """
  features, width = w_FxD.shape
  wanted = min(MOST_PARTS, max(1, w_FxD.size // PART))
  parts = math.gcd(features, 1 << wanted.bit_length() - 1)  # a power of two
  if y_RxF.shape[0] > 1 or parts == 1:
    return y_RxF @ w_FxD
  y_Px1xK = y_RxF.reshape(parts, 1, features // parts)
  return jnp.sum(y_Px1xK @ w_FxD.reshape(parts, features // parts, width), axis=0)


def _flat_matmul_bwd(residuals, g_RxD):
  y_RxF, w_FxD = residuals
  return g_RxD @ w_FxD.T, _weight_gradient(y_RxF, g_RxD)


flat_matmul.defvjp(lambda y, w: (y @ w, (y, w)), _flat_matmul_bwd)


FEW_ROWS = 64


@jax.custom_vjp
def flat_matmul_transposed(x_RxD, w_FxD):
  """x @ w.T with CPU-friendly gradients.

  With few rows, as in decoding, transposing the weight is what costs: at R=8, D=192,
  F=2048 this way takes 42 us and the direct one 85; even at 64 rows, direct for one.
  """
  if 1 < x_RxD.shape[0] <= FEW_ROWS:
    return jax.lax.optimization_barrier(w_FxD @ x_RxD.T).T
  return x_RxD @ w_FxD.T


def _flat_matmul_transposed_bwd(residuals, g_RxF):
  x_RxD, w_FxD = residuals
  return g_RxF @ w_FxD, _weight_gradient(g_RxF, x_RxD)


flat_matmul_transposed.defvjp(lambda x, w: (x @ w.T, (x, w)), _flat_matmul_transposed_bwd)
