"""The token store: a corpus as token ids, in checksummed shards that are memory-mapped.

  DIR/manifest.json            what it holds; written last, so a directory with it is whole
  DIR/tokenizer.*              in prepared stores
  DIR/train-00000.bin ...      documents one after the other, each closed by end-of-text and
                               begun by the tokenizer's bos, if it has one
  DIR/train-00000.documents.bin ...  uint64: at which of that shard's tokens each begins
  DIR/validation-00000.bin ...

Parts of the corpus are written independently, each a shard per split, in any order and by
any process; `finish` joins them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import sys
from typing import Any

import numpy as np
import tqdm

from matformer_jax import runtime, storage
from matformer_jax.data.tokenizer import Tokenizer
from matformer_jax.errors import UserError

STORE_VERSION = 3
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
VERIFIED_BYTES = 4 * 2**30  # a larger store is checked for size when opened, not read whole
PIECE_CHARS = 16_384  # a document is tokenised in pieces of this size, cut at line ends
_BATCH = 64  # pieces tokenised at a time
_START = np.dtype(np.uint64)
_STARTS_END = ".documents.bin"


class Tokens(Sequence):
  """The shards of a split as one read-only array of token ids.

  Attributes:
    dtype: of the ids.
  """

  def __init__(self, shards: Sequence[np.ndarray | _Ranges], dtype):
    self.dtype = np.dtype(dtype)
    self._shards = [s for s in shards if len(s)]
    self._ends = list(itertools.accumulate(len(s) for s in self._shards))

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int | slice):
    if not isinstance(index, slice):
      index = range(len(self))[index]
      return self[index : index + 1][0]
    start, stop, step = index.indices(len(self))
    return self.read([slice(start, stop)])[0][::step]

  def read(self, slices: Sequence[slice]) -> list[np.ndarray]:
    """Several slices, of step 1; those of a bucket are fetched at the same time."""
    parts, owners = [], []
    for n, s in enumerate(slices):
      start, stop, _ = s.indices(len(self))
      for i in range(bisect.bisect_right(self._ends, start), len(self._shards)):
        offset = self._ends[i] - len(self._shards[i])
        if offset >= stop:
          break
        parts.append((self._shards[i], slice(max(start - offset, 0), stop - offset)))
        owners.append(n)
    pieces: list[list[np.ndarray]] = [[] for _ in slices]
    for n, piece in zip(owners, _read_parts(parts)):
      pieces[n].append(piece)
    return [
      found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, self.dtype)])
      for found in pieces
    ]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self[:], dtype)


class _Ranges(Sequence):
  """A file of a bucket as a read-only array [length]: of its bytes only what is asked for.

  Attributes:
    dtype: of the array.
  """

  def __init__(self, path: storage.Path, dtype: np.dtype, length: int):
    self.dtype = dtype
    self._path, self._length = path, length
    self._whole: np.ndarray | None = None

  def __len__(self) -> int:
    return self._length

  def range(self, part: slice) -> tuple[storage.Path, int, int] | None:
    """The bytes to fetch for a slice of step 1; None for none."""
    start, stop, _ = part.indices(self._length)
    if self._whole is not None or start >= stop:
      return None
    return self._path, start * self.dtype.itemsize, stop * self.dtype.itemsize

  def __getitem__(self, index: Any) -> np.ndarray:
    wanted = self.range(index)
    if wanted:
      return np.frombuffer(storage.read_range(*wanted), self.dtype)
    return np.zeros(0, self.dtype) if self._whole is None else self._whole[index]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """All of it, kept from then on: NumPy asks for it, to search."""
    if self._whole is None:
      self._whole = self[:]
    return np.asarray(self._whole, dtype)


def read_slices(array: Any, slices: Sequence[slice]) -> list[np.ndarray]:
  """Several slices of step 1, those of a bucket at the same time."""
  return array.read(slices) if isinstance(array, Tokens) else [array[s] for s in slices]


def _read_parts(parts: Sequence[tuple[Any, slice]]) -> list[np.ndarray]:
  """A slice of each array, those of a bucket's files at the same time."""
  ranges = [array.range(s) if isinstance(array, _Ranges) else None for array, s in parts]
  contents = iter(storage.read_ranges([r for r in ranges if r]))
  return [
    np.frombuffer(next(contents), array.dtype) if wanted else array[s]
    for (array, s), wanted in zip(parts, ranges)
  ]


class Documents:
  """Where the documents of a split begin, by offsets: end-of-text may occur in a text literally.

  Args:
    shards: per shard, its first token's place in the split, and uint64 places within the shard.
  """

  def __init__(self, shards: Sequence[tuple[int, np.ndarray]]):
    self._shards = [(first, starts) for first, starts in shards if len(starts)]
    self._firsts = [first for first, _ in self._shards]

  def __len__(self) -> int:
    return sum(len(starts) for _, starts in self._shards)

  def starts(self, start: int, stop: int) -> np.ndarray:
    """int64: which tokens of `range(start, stop)` of the split are the first of a document."""
    found = [np.zeros(0, np.int64)]
    for i in range(max(bisect.bisect_right(self._firsts, start) - 1, 0), len(self._shards)):
      first, starts = self._shards[i]
      if first >= stop:
        break
      places = np.array([max(start - first, 0), stop - first], _START)
      low, high = np.searchsorted(starts, places)
      found.append(starts[low:high].astype(np.int64) + first)
    return np.concatenate(found)

  def segments(self, start: int, stop: int) -> np.ndarray:
    """int32 [stop - start]: the document of each token, numbered from 0 within the range."""
    inner = self.starts(start + 1, stop)
    return np.searchsorted(inner, np.arange(start, stop), side="right").astype(np.int32)


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """Tokens of both splits.

  Attributes:
    tokens: split -> Tokens.
    documents: split -> Documents.
    manifest: version, source, tokenizer hash, dtype, shards with counts and checksums.
    path: the store's directory.
  """

  tokens: dict[str, Tokens]
  documents: dict[str, Documents]
  manifest: dict[str, Any]
  path: storage.Path

  @property
  def fingerprint(self) -> str:
    """Changes when any token or document does; equal on every machine with the same shards."""
    shards = [s for split in SPLITS for s in self.manifest["shards"][split]]
    sums = "".join(s["sha256"] + s["starts"]["sha256"] for s in shards)
    return hashlib.sha256(sums.encode()).hexdigest()[:16]

  def total(self, split: str, what: str) -> int:
    """Sum of `documents`, `bytes` or `tokens` over a split's shards."""
    return sum(shard[what] for shard in self.manifest["shards"][split])


def open_store(path: str | os.PathLike, verify: bool | None = None) -> TokenStore:
  """Opens a store.

  Args:
    verify: read every shard and compare its checksum; None does where all are at most
      VERIFIED_BYTES, and on this machine. Sizes are always compared.

  Raises:
    UserError: naming the damaged or missing file.
  """
  path = storage.path(path)
  try:
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["version"] != STORE_VERSION:
      raise UserError(
        f"token store {path} has format version {manifest['version']}, this program reads "
        f"{STORE_VERSION}: prepare it again, with `python -m matformer_jax.data.prepare` and "
        "another --out"
      )
    dtype = np.dtype(manifest["dtype"])
    size = sum(s["tokens"] for split in SPLITS for s in manifest["shards"][split]) * dtype.itemsize
    if verify is None:
      verify = size <= VERIFIED_BYTES and not storage.is_bucket(path)
    sizes = storage.sizes(path)
    tokens, documents = {}, {}
    for split in SPLITS:
      shards, starts, first = [], [], 0
      for shard in manifest["shards"][split]:
        shards.append(_read(path, sizes, shard, dtype, shard["tokens"], verify))
        places = _read(path, sizes, shard["starts"], _START, shard["documents"], verify)
        starts.append((first, places[:]))  # of a bucket, all of them: they are searched
        first += shard["tokens"]
      tokens[split], documents[split] = Tokens(shards, dtype), Documents(starts)
  except (OSError, ValueError, KeyError, TypeError) as e:
    if isinstance(e, UserError) or storage.is_refusal(e):
      raise
    raise UserError(f"token store {path} is incomplete ({e}); prepare it again") from e
  return TokenStore(tokens, documents, manifest, path)


def _read(
  path: storage.Path,
  sizes: Mapping[storage.Path, int],
  entry: dict[str, Any],
  dtype: np.dtype,
  length: int,
  verify: bool,
) -> Any:
  """A file of the store as an array [length]; its size is checked, its content if `verify`."""
  file = path / entry["file"]
  if file not in sizes:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(file))
  size = sizes[file]
  if size != length * dtype.itemsize:
    raise UserError(
      f"token store file {file} has {size} bytes, its manifest says "
      f"{length * dtype.itemsize}; prepare it again"
    )
  if verify and _sha256(file) != entry["sha256"]:
    raise UserError(f"token store file {file} fails its checksum; prepare it again")
  if storage.is_bucket(file):
    return _Ranges(file, dtype, length)
  return np.memmap(file, dtype, "r", shape=(length,)) if length else np.zeros(0, dtype)


def check_fraction(fraction: float, name: str) -> None:
  """Raises UserError for what is no share of the documents that can be held out."""
  if not 0 < fraction <= 0.5:
    raise UserError(f"{name}={fraction} must be above 0 and at most 0.5")


@dataclasses.dataclass(frozen=True)
class Split:
  """Which text is held out for validation: every 1/fraction-th document.

  A corpus of fewer documents than that holds out the last lines of each, about `fraction` of
  its text: whole documents would be none, or far too much.

  Attributes:
    fraction: of the documents.
    num_documents: of the corpus.
  """

  fraction: float
  num_documents: int

  @property
  def every(self) -> int:
    """One document of how many is held out."""
    return max(2, round(1 / self.fraction))

  @property
  def holds_out_ends(self) -> bool:
    """Whether the corpus has too few documents to hold out whole ones."""
    return self.num_documents < self.every

  def say(self, source: str) -> None:
    """Says so where that is the case."""
    if self.holds_out_ends:
      runtime.say(
        f"note: {source} has {self.num_documents:,} document{'s' * (self.num_documents != 1)}, "
        "fewer than 1 / "
        f"validation_fraction = {self.every:,}: the last {self.fraction:.2%} of each is held out "
        "for validation, instead of whole documents"
      )

  def share(self, number: int, text: str) -> list[tuple[str, str]]:
    """[(split, its share of document `number`)], in the text's order."""
    if not self.holds_out_ends:
      return [("validation" if number % self.every == self.every // 2 else "train", text)]
    end = len(text) - round(len(text) * self.fraction)
    end = text.rfind("\n", 0, end) + 1 or end
    return [("train", text[:end]), ("validation", text[end:])]


def tokenising(name: str, expected: int) -> tqdm.tqdm:
  """The progress bar of making a store; `expected` bytes of text, 0 if unknown."""
  return tqdm.tqdm(
    total=expected or None,
    unit="B",
    unit_scale=True,
    file=sys.stderr,
    desc=f"tokenising {name}",
    mininterval=1.0,
  )


def cut(text: str) -> Iterator[str]:
  """Pieces of at most about PIECE_CHARS, cut after a newline; joined they are `text`.

  A tokenizer that puts a space before every text puts one before each piece.
  """
  start = 0
  while start < len(text):
    stop = len(text)
    if stop - start > PIECE_CHARS:
      stop = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
    yield text[start:stop]
    start = stop


def write_part(
  path: storage.Path,
  index: int,
  documents: Iterable[tuple[int, str]],
  tokenizer: Tokenizer,
  split: Split,
  report: Callable[[int], Any] = lambda n: None,
) -> None:
  """Tokenises one part of a corpus into shards `index`, unless that is done already.

  Args:
    documents: each with its number in the corpus, on which the split depends; not on parts.
    report: gets bytes of text done.
  """
  done = _part_file(path, index)
  if done.exists():
    return
  dtype = token_dtype(tokenizer)
  with contextlib.ExitStack() as stack:
    shards = {name: stack.enter_context(_Shard(path, f"{name}-{index:05d}")) for name in SPLITS}
    pieces = _pieces(documents, split)
    while batch := list(itertools.islice(pieces, _BATCH)):
      encoded = tokenizer.encode_batch([piece.text for piece in batch])
      for piece, ids in zip(batch, encoded):
        ids = tokenizer.bos() + ids if piece.begins else ids
        ids = ids + [tokenizer.eos_id] if piece.ends else ids
        size = len(piece.text.encode("utf-8", "replace"))
        shards[piece.split].add(np.asarray(ids, dtype), piece.begins, size)
        report(size)
  write_json(done, {name: shard.entry() for name, shard in shards.items()})


@dataclasses.dataclass(frozen=True)
class _Piece:
  """What is tokenised at once; whether a document (its share of a split) begins or ends there."""

  split: str
  text: str
  begins: bool
  ends: bool


def _pieces(documents: Iterable[tuple[int, str]], split: Split) -> Iterator[_Piece]:
  for number, text in documents:
    for name, share in split.share(number, text):
      pieces = list(cut(share))
      for i, piece in enumerate(pieces, 1):
        yield _Piece(name, piece, i == 1, i == len(pieces))


class _Shard:
  """A shard being written: its tokens, and where its documents begin."""

  def __init__(self, path: storage.Path, name: str):
    self._files = {key: f"{name}{end}" for key, end in (("ids", ".bin"), ("starts", _STARTS_END))}
    self._out = {key: (path / file).open("wb") for key, file in self._files.items()}
    self._sums = {key: hashlib.sha256() for key in self._files}
    self._counts = {"documents": 0, "bytes": 0, "tokens": 0}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for file in self._out.values():
      file.close()

  def add(self, ids: np.ndarray, begins: bool, size: int) -> None:
    """Appends a piece of `size` bytes."""
    if begins:
      self._write("starts", np.array([self._counts["tokens"]], _START))
    self._write("ids", ids)
    for name, amount in (("documents", begins), ("bytes", size), ("tokens", len(ids))):
      self._counts[name] += amount

  def _write(self, key: str, values: np.ndarray) -> None:
    self._out[key].write(values.tobytes())
    self._sums[key].update(values.tobytes())

  def entry(self) -> dict[str, Any]:
    """What the manifest says about it."""
    entries = {
      key: {"file": f, "sha256": self._sums[key].hexdigest()} for key, f in self._files.items()
    }
    return {**entries["ids"], **self._counts, "starts": entries["starts"]}


def finish(
  path: storage.Path, parts: int, source: str, tokenizer: Tokenizer, validation_fraction: float
) -> None:
  """Joins `parts` written parts: writes the manifest.

  Raises:
    UserError: if either split is empty.
  """
  written = [json.loads(_part_file(path, i).read_text()) for i in range(parts)]
  shards = {split: [part[split] for part in written] for split in SPLITS}
  for split in SPLITS:
    if not sum(s["documents"] for s in shards[split]):
      raise UserError(
        f"source {source!r} is too small: validation_fraction={validation_fraction} leaves its "
        f"{split} split empty; use more text or another fraction"
      )
  write_json(
    path / MANIFEST,
    {
      "version": STORE_VERSION,
      "source": source,
      "tokenizer": tokenizer.sha256,
      "dtype": token_dtype(tokenizer).name,
      "validation_fraction": validation_fraction,
      "shards": shards,
    },
  )
  for i in range(parts):
    _part_file(path, i).unlink()


def written_parts(path: storage.Path, parts: int) -> list[int]:
  """Which parts are already whole."""
  return [i for i in range(parts) if _part_file(path, i).exists()]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
  """The narrowest of uint16 and uint32 that holds every id."""
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def write_json(path: storage.Path, value: Any) -> None:
  """Writes a file atomically."""
  storage.replace_file(path, json.dumps(value, indent=1).encode())


def _part_file(path: storage.Path, index: int) -> storage.Path:
  return path / f"part-{index:05d}.json"


def _sha256(path: storage.Path) -> str:
  found = hashlib.sha256()
  for block in storage.blocks(path):
    found.update(block)
  return found.hexdigest()
