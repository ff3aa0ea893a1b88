"""One set-up for every plot: matplotlib without a display, one look."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import io
import os
from typing import Any

from matformer_jax import storage


@contextlib.contextmanager
def figure(path: str | os.PathLike, size: tuple[float, float] = (7, 4.5)) -> Iterator[Any]:
  """Axes to draw on; written to `path` as a PNG when the block ends.

  Args:
    size: inches.
  """
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  fig, axes = plt.subplots(figsize=size, layout="constrained")
  try:
    yield axes
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    fig.savefig(image, dpi=140, format=os.path.splitext(path)[1][1:] or "png")
    storage.path(path).write_bytes(image.getvalue())
  finally:
    plt.close(fig)


def bits_per_byte_axis(axes, bits_per_nat: float) -> None:
  """A second scale at the right of a plot of losses: bits per byte of the same text.

  Args:
    bits_per_nat: bits per byte for each nat per token; one number for one text.
  """
  scale = (lambda loss: loss * bits_per_nat, lambda bits: bits / bits_per_nat)
  axes.secondary_yaxis("right", functions=scale).set_ylabel("bits per byte")
