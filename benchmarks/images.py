"""How many images a second a core decodes and augments at 224 pixels.

  python benchmarks/images.py --images_per_s=2700

Reads scikit-learn's two sample photographs (JPEG, 640 x 427, about the size of ImageNet's)
again and again, as training would read different ones from a warm disk. --images_per_s is
what the accelerators of a host consume (`pod_plan` estimates it): the last column is the
cores that the host needs to keep up.
"""

from __future__ import annotations

import os
import time

from absl import app, flags
import numpy as np

from matformer_jax import tables
from matformer_jax.data import image_sources
from matformer_jax.data.augment import Transform

_SECONDS = flags.DEFINE_float("seconds", 4.0, "To measure each pipeline for.", lower_bound=0.1)
_RATE = flags.DEFINE_float("images_per_s", 2700.0, "What a host's accelerators consume.")

PIPELINES = {
  "evaluation": "resize_small(256)|center_crop(224)",
  "crop and flip": "inception_crop(224)|flip",
  "AugReg": "inception_crop(224)|flip|randaugment(2,15)",
}


class Photographs:
  """Encoded photographs, read as often as asked."""

  def __init__(self):
    from sklearn import datasets

    folder = os.path.join(os.path.dirname(datasets.__file__), "images")
    self._files = [
      open(os.path.join(folder, name), "rb").read() for name in ("china.jpg", "flower.jpg")
    ]

  def __call__(self, index):
    return image_sources.Example(self._files[index % 2], (0,))


def rate(source: image_sources.Images, transform: Transform, seconds: float) -> float:
  """Images per second of one thread."""
  done, started = 0, time.process_time()
  while time.process_time() - started < seconds:
    image, _ = source.decode(done)
    transform(image, np.random.default_rng(done))
    done += 1
  return done / (time.process_time() - started)


def main(argv) -> None:
  source = image_sources.Images("photographs", ("any",), "", 10**6, Photographs(), str)
  rows = [("decoding alone", rate(source, lambda image, rng: None, _SECONDS.value))]
  rows += [
    (f"{name}: {text}", rate(source, Transform(text, 224), _SECONDS.value))
    for name, text in PIPELINES.items()
  ]
  print(
    tables.table(
      ("JPEG 640 x 427, to 224 x 224", "images/s a core", f"cores for {_RATE.value:,.0f}/s"),
      [(name, f"{r:,.0f}", f"{_RATE.value / r:.0f}") for name, r in rows],
    )
  )


if __name__ == "__main__":
  app.run(main)
