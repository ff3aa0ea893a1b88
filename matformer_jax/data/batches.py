"""Batches addressed by step: windows of tokens, and images decoded and augmented.

A batch is a pure function of (seed, step), so the state of a data source is the step number.
Image i of epoch e is augmented by a generator seeded with (seed, e, i), on whatever host
reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import sys
from typing import Any

from absl import flags
import grain
import numpy as np

from matformer_jax import storage
from matformer_jax.data import store
from matformer_jax.data.augment import Transform
from matformer_jax.data.image_sources import CorruptImage, Images
from matformer_jax.errors import UserError

# ---------------------------------------------------------------------- tokens


def sample_order(size: int) -> Any:
  """Numbers below `size` in the one shuffled order in which validation reads them, each once.

  Of any first n it is a sample of the whole, the same in every run, program, mesh and host.
  """
  return grain.MapDataset.range(size).seed(0).shuffle()


class _Reader:
  """Windows of a split by number: window i is tokens[i*T : i*T + T+1]."""

  def __init__(self, tokens: Sequence[int], seq_len: int, documents: store.Documents | None):
    self._tokens, self._seq_len, self._documents = tokens, seq_len, documents
    self.num_windows = (len(tokens) - 1) // seq_len
    if self.num_windows < 1:
      raise UserError(
        f"the corpus has {len(tokens)} tokens in this split, fewer than one window "
        f"of model.seq_len={seq_len} + 1; use more text or a shorter seq_len"
      )

  def tokens(self, ids: Sequence[int]) -> np.ndarray:
    """int32 [len(ids), T+1]."""
    length = self._seq_len
    slices = [slice(i * length, i * length + length + 1) for i in ids]
    return np.stack(store.read_slices(self._tokens, slices)).astype(np.int32)

  def segments(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """{"segments": int32 [len(ids), T]}, or {} where documents are not separated."""
    if self._documents is None:
      return {}
    length = self._seq_len
    return {
      "segments": np.stack([self._documents.segments(i * length, (i + 1) * length) for i in ids])
    }


class Windows:
  """Training batches of token windows, a pure function of the step.

  Every token is predicted once in an epoch. `seed` reshuffles every epoch.

  Args:
    documents: separated within windows, where given.
  """

  def __init__(
    self,
    tokens: Sequence[int],
    seq_len: int,
    batch_size: int,
    seed: int,
    documents: store.Documents | None = None,
  ):
    self._reader = _Reader(tokens, seq_len, documents)
    self.num_windows = self._reader.num_windows
    self._batch_size = batch_size
    self._order: Any = grain.MapDataset.range(self.num_windows).seed(seed).shuffle().repeat()

  def window_ids(self, step: int, rows: range | None = None) -> list[int]:
    """Which windows are in the given rows (all by default) of the batch of `step`."""
    first = step * self._batch_size
    return [int(self._order[first + i]) for i in rows or range(self._batch_size)]

  def batch(self, step: int, rows: range | None = None) -> np.ndarray | dict[str, np.ndarray]:
    """Rows of the batch of `step`.

    Returns:
      int32 [rows, T+1]; where documents are separated {"tokens": that, "segments": int32
      [rows, T]}: the document of each input token, numbered from 0 within its window.
    """
    ids = self.window_ids(step, rows)
    tokens, segments = self._reader.tokens(ids), self._reader.segments(ids)
    return {"tokens": tokens, **segments} if segments else tokens


class ValidationWindows:
  """Batches of a fixed sample of a split's windows, each once.

  Args:
    byte_lengths: [V], of the tokenizer.
    documents: separated within windows, where given.

  Attributes:
    num_windows: in the split.
  """

  def __init__(
    self,
    tokens: Sequence[int],
    seq_len: int,
    byte_lengths: np.ndarray,
    documents: store.Documents | None = None,
  ):
    self._reader = _Reader(tokens, seq_len, documents)
    self.num_windows = self._reader.num_windows
    self._byte_lengths = byte_lengths
    self._order = sample_order(self.num_windows)

  def sample(self, limit: int = 0) -> range:
    """Places in the sample's order of its first `limit` windows; 0 is all."""
    return range(min(limit, self.num_windows) if limit else self.num_windows)

  def read(self, places: Sequence[int], counted: int | None = None) -> dict[str, np.ndarray]:
    """Windows at places of the sample's order, as many of them counted as are below `counted`.

    Returns:
      {"tokens": int32 [n, T+1], "bytes": int32 [n], "weight": float32 [n]} and, where documents
      are separated, "segments" int32 [n, T]. `bytes` is how long the text of the T predicted
      tokens is. A place that is not counted repeats a window with weight 0.
    """
    counted = self.num_windows if counted is None else counted
    ids = [int(self._order[place % counted]) for place in places]
    tokens = self._reader.tokens(ids)
    return {
      "tokens": tokens,
      "bytes": self._byte_lengths[tokens[:, 1:]].sum(1).astype(np.int32),
      "weight": np.array([place < counted for place in places], np.float32),
      **self._reader.segments(ids),
    }


# ---------------------------------------------------------------------- images

POLICIES = ("error", "skip")


class Corrupt:
  """What happens at an image that does not decode.

  Args:
    policy: `error` stops with its name; `skip` leaves it out, says so, and counts.
    workdir: gets skipped_images.txt, a line per image; None writes no file.
  """

  def __init__(self, policy: str, workdir: storage.Path | None = None):
    if policy not in POLICIES:
      raise UserError(f"data.corrupt={policy!r} is not one of {POLICIES}")
    self._policy = policy
    self._path = workdir / "skipped_images.txt" if workdir else None
    self.skipped: set[str] = set()

  def handle(self, error: CorruptImage) -> None:
    """Raises `error`, or records it once."""
    if self._policy == "error":
      raise UserError(f"{error}; remove it, or set --config.data.corrupt=skip") from error
    message = str(error)
    if message in self.skipped:
      return
    self.skipped.add(message)
    print(f"warning: skipped: {message}; {len(self.skipped)} so far", file=sys.stderr, flush=True)
    if self._path is None:
      return
    before = self._path.read_text() if self._path.exists() else ""
    if message in before:
      return
    if not storage.is_bucket(self._path):
      with open(self._path, "a") as f:
        f.write(message + "\n")
      return
    with storage.refusals_ignored():  # too many a second, say: it has been printed
      storage.replace_file(self._path, f"{before}{message}\n".encode())


class ImageBatches:
  """Training batches, a pure function of the step; every epoch is reshuffled. Picklable.

  Args:
    mixup: alpha of the Beta distribution of mixup's share; 0 mixes nothing.
  """

  def __init__(
    self,
    images: Images,
    batch_size: int,
    transform: Transform,
    corrupt: Corrupt,
    seed: int,
    mixup: float = 0.0,
  ):
    if images.max_labels > 1:
      raise UserError(f"{images.name} has images of several classes; training needs one each")
    self._images, self._batch_size, self._transform = images, batch_size, transform
    self._corrupt, self._seed, self._mixup = corrupt, seed, mixup

  @functools.cached_property
  def _order(self) -> Any:
    return grain.MapDataset.range(self._images.size).seed(self._seed).shuffle().repeat()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_order"}

  def image_ids(self, step: int, rows: range | None = None) -> list[int]:
    """Which images are in the given rows (all by default) of the batch of `step`."""
    first = step * self._batch_size
    return [int(self._order[first + i]) for i in rows or range(self._batch_size)]

  def batch(self, step: int, rows: range | None = None) -> dict[str, np.ndarray]:
    """{"image": uint8 [rows, S, S, channels], "label": int32, "seed": uint32, "mix": float32}."""
    rows = rows or range(self._batch_size)
    examples = [
      self._example((step * self._batch_size + row) // self._images.size, index)
      for row, index in zip(rows, self.image_ids(step, rows))
    ]
    images, labels, seeds = zip(*examples)
    batch = {
      "image": np.stack(images),
      "label": np.array(labels, np.int32),
      "seed": np.array(seeds, np.uint32),
    }
    if self._mixup:
      share = np.random.default_rng((self._seed, step)).beta(self._mixup, self._mixup)
      batch["mix"] = np.full(len(rows), max(share, 1 - share), np.float32)
    return batch

  def _example(self, epoch: int, index: int) -> tuple[np.ndarray, int, int]:
    rng = np.random.default_rng((self._seed, epoch, index))
    seed = int(rng.integers(2**32))
    for _ in range(self._images.size):
      try:
        image, (label,) = self._images.decode(index)
        return self._transform(image, rng), label, seed
      except CorruptImage as e:
        self._corrupt.handle(e)
        index = (index + 1) % self._images.size  # the next one in its place
    raise UserError(f"no image of {self._images.name} can be read")


class LabelledBatches:
  """Images of a split, each once; the last batch is filled with images without label.

  Args:
    order: which images; by default all, in order.
  """

  def __init__(
    self,
    images: Images,
    batch_size: int,
    transform: Transform,
    corrupt: Corrupt,
    order: Sequence[int] | None = None,
  ):
    self._images, self._batch_size = images, batch_size
    self._transform, self._corrupt = transform, corrupt
    self._order = range(images.size) if order is None else order
    self.num_batches = -(-len(self._order) // batch_size)

  def batch(self, step: int, rows: range | None = None) -> dict[str, np.ndarray]:
    """{"image": uint8 [rows, S, S, channels], "labels": int32 [rows, R], -1 where none}."""
    rows = rows or range(self._batch_size)
    labels = np.full((len(rows), self._images.max_labels), -1, np.int32)
    pictures: list[np.ndarray | None] = [None] * len(rows)
    rng = np.random.default_rng(0)  # transforms for evaluation draw nothing
    for i, row in enumerate(rows):
      place = step * self._batch_size + row
      if place >= len(self._order):
        continue
      try:
        image, found = self._images.decode(int(self._order[place]))
        pictures[i] = self._transform(image, rng)
        labels[i, : len(found)] = found
      except CorruptImage as e:
        self._corrupt.handle(e)
    shape = (self._transform.size, self._transform.size, self._images.channels)
    blank = np.zeros(shape, np.uint8)
    return {"image": np.stack([blank if p is None else p for p in pictures]), "labels": labels}


def read_ahead(
  batches: ImageBatches | LabelledBatches,
  first: int,
  last: int,
  rows: Sequence[range],
  workers: int,
) -> Iterator[list[Any]]:
  """`[batches.batch(step, r) for r in rows]` for steps first to last, in order.

  Args:
    workers: processes that decode, a step each; 0 decodes in the calling thread.
  """
  steps: Any = grain.MapDataset.range(first, last + 1).map(_ReadStep(batches, tuple(rows)))
  if not workers:
    yield from (steps[i] for i in range(len(steps)))
    return
  if not flags.FLAGS.is_parsed():  # in a notebook; Grain reads its own
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  one_at_a_time = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
  iterator = iter(steps.to_iter_dataset(one_at_a_time).mp_prefetch(options))
  try:
    yield from iterator
  finally:
    iterator.close()  # ends the processes and frees what they share


@dataclasses.dataclass(frozen=True)
class _ReadStep:
  batches: ImageBatches | LabelledBatches
  rows: tuple[range, ...]

  def __call__(self, step):
    return [self.batches.batch(int(step), r) for r in self.rows]
