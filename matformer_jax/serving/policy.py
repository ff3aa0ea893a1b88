"""Which size answers a request that leaves it open: smaller ones as the queue grows."""

from __future__ import annotations

from collections.abc import Sequence

from matformer_jax import granularity as gran


def choose(sizes: Sequence[gran.Granularity], waiting: int, slots: int) -> gran.Granularity:
  """The size for the request that is about to start.

  Args:
    sizes: smallest first.
    waiting: requests behind it that find no slot, those of the same call aside.
    slots: how many are answered at a time.

  Returns:
    The largest size where nobody waits, and one size less for every `slots` requests waiting,
    or part of them.
  """
  down = -(-waiting // slots)
  return sizes[max(len(sizes) - 1 - down, 0)]
