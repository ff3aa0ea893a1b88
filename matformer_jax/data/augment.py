"""What is done to an image before a model sees it: resizing, cropping, RandAugment.

Every operation maps a Pillow image to a Pillow image; its randomness comes from a NumPy
generator that the caller seeds. A transform is written as in
`inception_crop(224)|flip|randaugment(2,15)`.
"""

from __future__ import annotations

from collections.abc import Callable
import math
import re

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from matformer_jax.errors import UserError, did_you_mean

BILINEAR = Image.Resampling.BILINEAR
GREY = 128  # what moves into the picture when it is moved
MAX_LEVEL = 10  # RandAugment's magnitudes are given in tenths of these operations' ranges


class Transform:
  """A chain of operations, parsed from text. Picklable.

  Args:
    text: e.g. `resize_small(256)|center_crop(224)`; empty leaves images as they are.
    size: side of the square that must come out.
    name: of the config key, for errors.

  Attributes:
    steps: (name, arguments) of each operation.

  Raises:
    UserError: for an unknown operation or arguments that are not its own.
  """

  def __init__(self, text: str, size: int, name: str = "transform"):
    self.text, self.size, self._name = text, size, name
    self.steps = [self._parse(part.strip()) for part in text.split("|") if part.strip()]

  def _parse(self, part: str) -> tuple[str, tuple[float, ...]]:
    match = re.fullmatch(r"(\w+)(?:\(([0-9., ]*)\))?", part)
    if not match or match[1] not in OPERATIONS:
      raise UserError(
        f"{self._name}={self.text!r}: {part!r} is not an operation"
        f"{did_you_mean(match[1] if match else part, OPERATIONS)}"
      )
    try:
      args = tuple(float(a) for a in (match[2] or "").split(",") if a.strip())
      low, high = ARGUMENTS[match[1]]
      if not low <= len(args) <= high:
        raise ValueError
    except ValueError:
      raise UserError(
        f"{self._name}={self.text!r}: wrong arguments in {part!r}; {OPERATIONS[match[1]].__doc__}"
      ) from None
    return match[1], tuple(int(a) if a == int(a) else a for a in args)

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """uint8 [size, size, channels]. Raises UserError where the size comes out differently."""
    for name, args in self.steps:
      image = OPERATIONS[name](image, rng, *args)
    if image.size != (self.size, self.size):
      raise UserError(
        f"{self._name}={self.text!r} gives images of {image.size[0]} x "
        f"{image.size[1]} pixels, and the model takes {self.size} x {self.size}; "
        f"add |resize({self.size})"
      )
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


# -------------------------------------------------------------- size and place


def resize(image, rng, size):
  """resize(SIZE): to SIZE x SIZE, whatever the shape."""
  return image.resize((size, size), BILINEAR)


def resize_small(image, rng, size):
  """resize_small(SIZE): the shorter side to SIZE, in proportion."""
  scale = size / min(image.size)
  return image.resize(tuple(max(size, round(n * scale)) for n in image.size), BILINEAR)


def center_crop(image, rng, size):
  """center_crop(SIZE): the middle SIZE x SIZE pixels."""
  left, top = ((n - size) // 2 for n in image.size)
  return image.crop((left, top, left + size, top + size))


def inception_crop(image, rng, size, min_area=0.05):
  """inception_crop(SIZE, MIN_AREA=0.05): a random part of at least that share of the area and
  an aspect ratio of 3/4 to 4/3, resized to SIZE x SIZE (Szegedy et al. 2015)."""
  width, height = image.size
  for _ in range(10):
    area = rng.uniform(min_area, 1) * width * height
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return image.resize((size, size), BILINEAR, box=(left, top, left + w, top + h))
  side = min(width, height)
  return resize(center_crop(image, rng, side), rng, size)


def pad_crop(image, rng, pixels):
  """pad_crop(PIXELS): shifted by up to PIXELS each way; black moves in."""
  x, y = (int(n) for n in rng.integers(-pixels, pixels + 1, 2))
  return image.crop((x, y, x + image.size[0], y + image.size[1]))


def flip(image, rng):
  """flip: mirrored left to right, every other time."""
  return ImageOps.mirror(image) if rng.random() < 0.5 else image


# ------------------------------------------------------------------ RandAugment


def randaugment(image, rng, count, magnitude):
  """randaugment(COUNT, MAGNITUDE): COUNT operations one after the other, each drawn from 16
  (Cubuk et al. 2020); MAGNITUDE is in tenths of an operation's range."""
  for _ in range(count):
    name = list(RANDAUGMENT)[int(rng.integers(len(RANDAUGMENT)))]
    image = RANDAUGMENT[name](image, magnitude / MAX_LEVEL, rng)
  return image


def _affine(image, *coefficients):
  """Output (x, y) shows input (ax + by + c, dx + ey + f)."""
  return image.transform(
    image.size,
    Image.Transform.AFFINE,
    coefficients,
    Image.Resampling.NEAREST,
    fillcolor=_grey(image),
  )


def _grey(image):
  return GREY if image.mode == "L" else (GREY,) * 3


def _either_way(rng, value):
  return value if rng.random() < 0.5 else -value


def _enhance(enhancer):
  return lambda image, level, rng: enhancer(image).enhance(level * 1.8 + 0.1)


def _solarize_add(image, level, rng):
  """Adds to the darker half of all values."""
  amount = int(level * 110)
  return image.point(
    [min(v + amount, 255) if v < 128 else v for v in range(256)] * len(image.getbands())
  )


def _cutout(image, level, rng):
  """A grey square around a random pixel."""
  reach = int(level * 40)
  x, y = (int(rng.integers(n)) for n in image.size)
  image = image.copy()
  image.paste(
    _grey(image),
    (
      max(x - reach, 0),
      max(y - reach, 0),
      min(x + reach, image.size[0]),
      min(y + reach, image.size[1]),
    ),
  )
  return image


# Each takes (image, level, rng); level 1 is the whole range of AutoAugment's (Cubuk et al.
# 2019, Table 6), with RandAugment's own way of choosing the sign.
RANDAUGMENT: dict[str, Callable] = {
  "autocontrast": lambda image, level, rng: ImageOps.autocontrast(image),
  "equalize": lambda image, level, rng: ImageOps.equalize(image),
  "invert": lambda image, level, rng: ImageOps.invert(image),
  "rotate": lambda image, level, rng: image.rotate(
    _either_way(rng, level * 30), Image.Resampling.NEAREST, fillcolor=_grey(image)
  ),
  "posterize": lambda image, level, rng: ImageOps.posterize(image, min(max(int(level * 4), 1), 8)),
  "solarize": lambda image, level, rng: ImageOps.solarize(image, min(int(level * 256), 256)),
  "color": _enhance(ImageEnhance.Color),
  "contrast": _enhance(ImageEnhance.Contrast),
  "brightness": _enhance(ImageEnhance.Brightness),
  "sharpness": _enhance(ImageEnhance.Sharpness),
  "shear_x": lambda image, level, rng: _affine(image, 1, _either_way(rng, level * 0.3), 0, 0, 1, 0),
  "shear_y": lambda image, level, rng: _affine(image, 1, 0, 0, _either_way(rng, level * 0.3), 1, 0),
  "translate_x": lambda image, level, rng: _affine(
    image, 1, 0, _either_way(rng, level * 100), 0, 1, 0
  ),
  "translate_y": lambda image, level, rng: _affine(
    image, 1, 0, 0, 0, 1, _either_way(rng, level * 100)
  ),
  "cutout": _cutout,
  "solarize_add": _solarize_add,
}

OPERATIONS: dict[str, Callable] = {
  f.__name__: f
  for f in (resize, resize_small, center_crop, inception_crop, pad_crop, flip, randaugment)
}
ARGUMENTS = {
  "resize": (1, 1),
  "resize_small": (1, 1),
  "center_crop": (1, 1),
  "inception_crop": (1, 2),
  "pad_crop": (1, 1),
  "flip": (0, 0),
  "randaugment": (2, 2),
}
