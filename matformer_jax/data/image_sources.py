"""Images: sources with random access, and decoding.

source -> Images -> decoded, augmented (augment.py) -> batch (batches.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import errno
import functools
import gzip
import hashlib
import io
import json
import pathlib
import struct
from typing import Any, NamedTuple
import warnings

import numpy as np
from PIL import Image

from matformer_jax import storage
from matformer_jax.data import tfds_source
from matformer_jax.errors import UserError, import_extra

SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_PIXELS = 178_956_970  # Pillow's own limit
# Pillow warns of every image of half as many, which is still one that it reads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Example(NamedTuple):
  """An image as stored, and its classes: pixels (uint8 [Y, X] or [Y, X, 3]), an encoded file,
  or where that is."""

  image: np.ndarray | bytes | pathlib.Path
  labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Images:
  """A split of a source. Picklable, so that worker processes can read it.

  Attributes:
    name: source and split, for messages.
    class_names: one per class.
    fingerprint: changes when the images or labels do.
    size: number of images.
    read: index -> Example.
    where: index -> what to call an image in an error, such as its file.
    channels: 1 (grey) or 3 (RGB), whatever is stored.
    max_labels: the most classes an image has; training needs 1.
    max_pixels: of an encoded image; a larger one is taken for damaged or hostile, and not
      decoded. This process's Pillow gets the same limit.
  """

  name: str
  class_names: tuple[str, ...]
  fingerprint: str
  size: int
  read: Callable[[int], Example]
  where: Callable[[int], str]
  channels: int = 3
  max_labels: int = 1
  max_pixels: int = MAX_PIXELS

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def part(self, rows: range) -> Images:
    """These images only, numbered from 0."""
    shift = lambda f: _Shifted(f, rows.start)
    return dataclasses.replace(self, size=len(rows), read=shift(self.read), where=shift(self.where))

  def decode(self, index: int) -> tuple[Image.Image, tuple[int, ...]]:
    """(Pillow image, classes).

    Raises:
      CorruptImage: if it does not decode, or is gone.
      UserError: if the system refuses to read it, which says nothing about the image.
    """
    example = self.read(index)
    Image.MAX_IMAGE_PIXELS = self.max_pixels // 2  # it refuses images of more than twice this
    try:
      if isinstance(example.image, np.ndarray):
        image = Image.fromarray(example.image)
      else:
        encoded = example.image
        image = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
      return image.convert("L" if self.channels == 1 else "RGB"), example.labels
    except Image.DecompressionBombError as e:
      raise CorruptImage(
        f"{self.where(index)} of {self.name} is damaged or too large ({e}); where it is right, "
        "raise --config.data.max_pixels"
      ) from e
    except MemoryError:
      raise
    except Exception as e:  # Pillow raises many types for damaged files; OSError has no number then
      if isinstance(e, OSError) and e.errno not in (None, errno.ENOENT):
        raise UserError(f"{self.where(index)} of {self.name} cannot be read ({e.strerror})") from e
      raise CorruptImage(
        f"{self.where(index)} of {self.name} is no image that can be read "
        f"({' '.join(str(e).split())[:100]})"
      ) from e


@dataclasses.dataclass(frozen=True)
class _Shifted:
  f: Callable[[int], Any]
  start: int

  def __call__(self, index):
    return self.f(self.start + index)


class CorruptImage(UserError):
  """An image that does not decode."""


# ------------------------------------------------------------------- sources


def open_images(
  source: str,
  split: str,
  *,
  channels: int = 3,
  classes: Sequence[int] = (),
  data_dir: str | None = None,
  label: str = "label",
  max_pixels: int = MAX_PIXELS,
) -> Images:
  """Opens a split of a source.

  Args:
    source: `sklearn:digits`, `idx:DIR` (MNIST-format files, gzip or not), `folder:DIR`
      (DIR/SPLIT/CLASS/*.jpg, .png) or `tfds:NAME`.
    split: `train`, or what the source has for validation: `validation` or `test` for digits
      and idx, any subdirectory of a folder, any split of a TFDS dataset.
    channels: 1 or 3; images are converted.
    classes: keep only these classes, renumbered in this order; empty keeps all.
    data_dir: where TFDS datasets were prepared.
    label: the TFDS feature that holds the class or classes.
    max_pixels: images of more are corrupt.

  Raises:
    UserError: for an unknown kind, a limit below 1, or where nothing is found.
  """
  kind, _, rest = source.partition(":")
  openers = {
    "sklearn": _sklearn,
    "idx": _idx,
    "folder": _folder,
    "tfds": functools.partial(_tfds, data_dir=data_dir, label=label),
  }
  if kind not in openers or not rest:
    raise UserError(
      f"data.source={source!r} is not a source of images; use sklearn:digits, "
      "idx:DIR, folder:DIR or tfds:NAME"
    )
  if channels not in (1, 3):
    raise UserError(f"model.channels={channels} must be 1 (grey) or 3 (RGB)")
  if max_pixels < 1:
    raise UserError(f"data.max_pixels={max_pixels} must be a number of pixels, 1 or more")
  images = openers[kind](source, rest, split)
  images = dataclasses.replace(images, channels=channels, max_pixels=max_pixels)
  return _keep_classes(images, classes) if classes else images


@dataclasses.dataclass(frozen=True)
class _Arrays:
  """Images held in memory: uint8 [N, Y, X] or [N, Y, X, 3], int [N]."""

  images: np.ndarray
  labels: np.ndarray
  name: str

  def __call__(self, index):
    return Example(self.images[index], (int(self.labels[index]),))

  def where(self, index):
    return f"image {index}"

  def open(self, class_names: Sequence[str]) -> Images:
    digest = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
    digest.update(np.asarray(self.labels, np.int64).tobytes())
    return Images(
      self.name, tuple(class_names), digest.hexdigest()[:20], len(self.labels), self, self.where
    )


def _sklearn(source: str, rest: str, split: str) -> Images:
  if rest != "digits":
    raise UserError(f"data.source={source!r}: only sklearn:digits is embedded")
  datasets = import_extra("sklearn.datasets", f"data.source={source!r}", "digits")
  _one_of(source, split, ("train", "validation", "test"))
  digits = datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(digits.target))
  cut = round(0.8 * len(order))
  chosen = order[:cut] if split == "train" else order[cut:]
  pixels = np.minimum(digits.images[chosen] * 16, 255).astype(np.uint8)  # stored as 0..16
  return _Arrays(pixels, digits.target[chosen], f"{source} {split}").open("0123456789")


IDX_FILES = {"train": "train", "validation": "t10k", "test": "t10k"}


def _idx(source: str, rest: str, split: str) -> Images:
  _one_of(source, split, tuple(IDX_FILES))
  images, labels = (
    _read_idx(storage.path(rest), f"{IDX_FILES[split]}-{part}-ubyte")
    for part in ("images-idx3", "labels-idx1")
  )
  if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
    raise UserError(
      f"data.source={source!r}: {split} has images {images.shape} and labels "
      f"{labels.shape}, which do not belong together"
    )
  classes = _read_idx(storage.path(rest), "train-labels-idx1-ubyte").max() + 1
  return _Arrays(images, labels, f"{source} {split}").open([str(i) for i in range(classes)])


def _read_idx(directory: storage.Path, stem: str) -> np.ndarray:
  """An array from a file of LeCun's IDX format: 0, 0, type (8: uint8), rank, sizes, data."""
  found = [p for p in (directory / stem, directory / f"{stem}.gz") if p.exists()]
  if not found:
    raise UserError(f"data.source='idx:{directory}': there is no {stem} or {stem}.gz")
  content = found[0].read_bytes()
  try:
    if found[0].suffix == ".gz":
      content = gzip.decompress(content)
    zero, dtype, rank = struct.unpack_from(">HBB", content)
    shape = struct.unpack_from(f">{rank}I", content, 4)
    if zero or dtype != 8:
      raise ValueError("it does not start as an IDX file of bytes does")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
  except (ValueError, OSError, EOFError, struct.error) as e:
    raise UserError(f"{found[0]} is damaged: {e}") from e


@dataclasses.dataclass(frozen=True)
class _Files:
  """Image files below a directory."""

  root: storage.Path
  files: tuple[str, ...]
  labels: tuple[tuple[int, ...], ...]

  def __call__(self, index):
    path = self.root / self.files[index]
    return Example(path.read_bytes() if storage.is_bucket(path) else path, self.labels[index])

  def where(self, index):
    return str(self.root / self.files[index])


def _folder(source: str, rest: str, split: str) -> Images:
  root = storage.path(rest)
  splits = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
  _one_of(source, split, tuple(splits))
  root, train = root / split, root / "train"
  class_names = tuple(
    sorted(p.name for p in (train if train.is_dir() else root).iterdir() if p.is_dir())
  )
  found = {str(p.relative_to(root)): n for p, n in storage.sizes(root).items()}
  files = sorted(name for name in found if pathlib.PurePath(name).suffix.lower() in SUFFIXES)
  labels: list[tuple[int, ...]] = []
  answers = root.parent / f"{split}_labels.json"  # {file: [class names]}, as ImageNet ReaL has
  known = json.loads(answers.read_text()) if answers.exists() else {}
  for file in files:
    names = known.get(file, [pathlib.PurePath(file).parts[0]])
    try:
      labels.append(tuple(class_names.index(name) for name in names))
    except ValueError:
      raise UserError(f"{root / file} is of a class {names} that {train} does not have") from None
  if not files:
    raise UserError(
      f"data.source={source!r}: {root} holds no {', '.join(SUFFIXES)} file in a directory per class"
    )
  sizes = [(name, found[name]) for name in files]
  fingerprint = hashlib.sha256(json.dumps([sizes, labels, class_names]).encode()).hexdigest()[:20]
  reader = _Files(root, tuple(files), tuple(labels))
  return Images(
    f"{source} {split}",
    class_names,
    fingerprint,
    len(files),
    reader,
    reader.where,
    max_labels=max(1, *map(len, labels)),
  )


@dataclasses.dataclass(frozen=True)
class _Tfds:
  """Examples of a prepared dataset; opened again in every process."""

  source: str
  name: str
  data_dir: str | None
  split: str
  label: str

  @functools.cached_property
  def _examples(self):
    builder = tfds_source.open_builder(self.source, self.name, self.data_dir, self.split)
    return tfds_source.random_access(builder, self.split, undecoded="image")

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_examples"}

  def __call__(self, index):
    example = self._examples(index)
    return Example(example["image"], tuple(int(i) for i in np.atleast_1d(example[self.label])))

  def where(self, index):
    return f"example {index}"


def _tfds(source: str, rest: str, split: str, data_dir: str | None, label: str) -> Images:
  builder = tfds_source.open_builder(source, rest, data_dir, split)
  for feature in ("image", label):
    tfds_source.check_feature(source, builder, feature)
  feature = builder.info.features[label]
  classes = getattr(feature, "feature", feature)  # the elements', of a sequence
  if not hasattr(classes, "names"):
    raise UserError(f"data.source={source!r}: feature {label!r} is no class label; set data.label")
  reader, size = (
    _Tfds(source, rest, data_dir, split, label),
    builder.info.splits[split].num_examples,
  )
  several = classes is not feature
  fingerprint = hashlib.sha256(tfds_source.identity(builder, split).encode()).hexdigest()[:20]
  return Images(
    f"{source} {split}",
    tuple(classes.names),
    fingerprint,
    size,
    reader,
    reader.where,
    max_labels=max(len(reader(i).labels) for i in range(size)) if several else 1,
  )


def _one_of(source: str, split: str, splits: Sequence[str]) -> None:
  if split not in splits:
    raise UserError(
      f"data.source={source!r} has no split {split!r}; it has "
      f"{', '.join(splits) or 'none'} (data.train_split, data.validation_split)"
    )


@dataclasses.dataclass(frozen=True)
class _Subset:
  images: Images
  indices: np.ndarray
  classes: tuple[int, ...]

  def __call__(self, index):
    image, labels = self.images.read(int(self.indices[index]))
    return Example(image, tuple(self.classes.index(i) for i in labels if i in self.classes))

  def where(self, index):
    return self.images.where(int(self.indices[index]))


def _keep_classes(images: Images, classes: Sequence[int]) -> Images:
  classes = tuple(int(c) for c in classes)
  if len(set(classes)) != len(classes) or not all(0 <= c < images.num_classes for c in classes):
    raise UserError(
      f"data.classes={classes} must be different numbers in 0.."
      f"{images.num_classes - 1}, the classes of {images.name}"
    )
  kept = np.array([i for i in range(images.size) if set(images.read(i).labels) & set(classes)])
  subset = _Subset(images, kept, classes)
  return dataclasses.replace(
    images,
    class_names=tuple(images.class_names[c] for c in classes),
    size=len(kept),
    fingerprint=f"{images.fingerprint}:{','.join(map(str, classes))}",
    read=subset,
    where=subset.where,
  )
