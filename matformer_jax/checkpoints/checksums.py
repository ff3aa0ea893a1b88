"""Checksums of arrays, computed on device from the bits and positions of their elements.

They are sums, so those of a leaf's parts add up to the leaf's: they do not depend on how,
or on how many hosts, the leaf is sharded. What is summed is a hash of an element's position and
bits. Those of formats 1 and 2 summed bits x hash(position), where two elements that change sign
cancel: 2^31 times any two odd numbers is 0 in 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax.models.ops import mix_bits

FORMAT = 3  # of checkpoints and model cards as they are written now; formats 1 and 2 sum alike


def terms(
  x: jax.Array, shape: Sequence[int], start: Sequence[int], format: int = FORMAT
) -> list[jax.Array]:
  """What a checksum sums: hashes of position and bits, under two seeds; uint32 like x.

  Args:
    x: the part of a leaf of `shape` that begins at `start`, so the sums of a leaf's
      parts add up to the leaf's.
    format: of the checkpoint, as its meta says.
  """
  itemsize = np.dtype(x.dtype).itemsize
  if itemsize == 8:
    halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return terms(halves, (*shape, 2), (*start, 0), format)
  bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[itemsize])
  bits = bits.astype(jnp.uint32)
  position, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.uint32(start[axis])
    position += iota * np.uint32(stride % 2**32)
    stride *= shape[axis]
  result = []
  for seed in (0x9E3779B9, 0x85EBCA6B):
    place = mix_bits(position ^ np.uint32(seed))
    result.append(bits * (place | 1) if format < 3 else mix_bits(bits ^ place))
  return result


def whole(x: jax.Array, format: int = FORMAT) -> jax.Array:
  """uint32 [2] of an array; a flipped bit changes both."""
  return _sums(x, x.shape, (0,) * x.ndim, format)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def part(
  x: jax.Array, shape: Sequence[int], start: Sequence[int], format: int = FORMAT
) -> jax.Array:
  """uint32 [2] of the part x, beginning at `start`, of a leaf of `shape`."""
  return _sums(x, shape, start, format)


def _sums(x, shape, start, format):
  return jnp.stack([jnp.sum(t, dtype=jnp.uint32) for t in terms(x, shape, start, format)])


def to_hex(checksum) -> str:
  """16 digits."""
  return f"{int(checksum[0]):08x}{int(checksum[1]):08x}"


def add(parts: Iterable[str]) -> str:
  """The checksum of a whole from those of its parts, as `to_hex` writes them."""
  parts = list(parts)
  return to_hex([sum(int(text[i : i + 8], 16) for text in parts) % 2**32 for i in (0, 8)])
