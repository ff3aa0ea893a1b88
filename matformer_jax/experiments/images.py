"""Images that every machine can make, hard enough that a wider model is a better one.

Letters and digits in all text fonts that matplotlib carries, each image turned, sheared, scaled
and moved at random, with strokes across it, on a gradient, in noise. Written as MNIST-format
files, which `data.source=idx:DIR` reads.
"""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from matformer_jax import runtime, storage

# No two that look alike in some font, and none that is another one turned or scaled.
CHARACTERS = "ABDEFGHJKLMNPQRTUVWXYZabdefghijkmnqrtuy123456789"
FONTS = (
  *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
  *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
  *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
  *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
SIZE = 28  # pixels
_GLYPH = 48  # pixels that a character is rendered in


def write(directory: pathlib.Path, classes: int, train: int, test: int) -> str:
  """Writes the images, where they are not there yet; returns them as a `data.source`.

  Args:
    classes: the first so many of CHARACTERS.
    train, test: images.
  """
  last = directory / "t10k-labels-idx1-ubyte"
  if not last.exists():
    directory.mkdir(parents=True, exist_ok=True)
    glyphs = _glyphs(CHARACTERS[:classes])
    for seed, (prefix, number) in enumerate((("train", train), ("t10k", test))):
      rng = np.random.default_rng(seed)
      labels = rng.integers(classes, size=number)
      images = np.stack([_distorted(glyphs[rng.integers(len(FONTS))][i], rng) for i in labels])
      _write_idx(directory / f"{prefix}-images-idx3-ubyte", images)
      _write_idx(directory / f"{prefix}-labels-idx1-ubyte", labels.astype(np.uint8))
    runtime.say(f"{directory}: {train + test:,} images of {classes} characters")
  return f"idx:{directory}"


def _glyphs(characters: str) -> list[list[Image.Image]]:
  """White on black, by font and character, in the middle."""
  import matplotlib

  fonts = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
  rendered = []
  for name in FONTS:
    font = ImageFont.truetype(str(fonts / f"{name}.ttf"), 32)
    rendered.append([])
    for character in characters:
      image = Image.new("L", (_GLYPH, _GLYPH))
      middle = (_GLYPH / 2, _GLYPH / 2)
      ImageDraw.Draw(image).text(middle, character, fill=255, font=font, anchor="mm")
      rendered[-1].append(image)
  return rendered


def _distorted(glyph: Image.Image, rng: np.random.Generator) -> np.ndarray:
  """uint8 [SIZE, SIZE]."""
  angle = rng.uniform(-0.25, 0.25)
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  shear = np.array([[1, rng.uniform(-0.2, 0.2)], [0, 1]])
  scale = np.diag(rng.uniform(1.0, 1.4, 2))  # pixels of the glyph to one of the image
  matrix = turn @ shear @ scale
  middle = matrix @ (np.full(2, SIZE / 2) + rng.uniform(-2, 2, 2))
  shift = _GLYPH / 2 - middle
  affine = (*matrix[0], shift[0], *matrix[1], shift[1])
  image = glyph.transform((SIZE, SIZE), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
  draw = ImageDraw.Draw(image)
  if rng.random() < 0.5:
    draw.line([tuple(p) for p in rng.uniform(0, SIZE, (2, 2))], fill=int(rng.integers(256)))
  ink = np.asarray(image, np.float32) / 255
  y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
  slope = rng.normal(0, 15, 2)
  paper = rng.uniform(20, 80) + slope[0] * x + slope[1] * y
  pixels = paper + rng.uniform(100, 160) * ink + rng.normal(0, 14, (SIZE, SIZE))
  return np.clip(pixels, 0, 255).astype(np.uint8)


def _write_idx(path: pathlib.Path, array: np.ndarray) -> None:
  """The format of MNIST: a magic number, the shape, then the bytes."""
  header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
  storage.replace_file(path, header + array.tobytes())
