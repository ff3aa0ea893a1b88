"""The token store: a corpus as token ids, in checksummed shards that are memory-mapped.

  DIR/manifest.json            what it holds; written last, so a directory with it is whole
  DIR/tokenizer.model          in prepared stores
  DIR/train-00000.bin ...      documents one after the other, each closed by end-of-text
  DIR/validation-00000.bin ...

Parts of the corpus are written independently, each a shard per split, in any order and by
any process; `finish` joins them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any

import numpy as np

from matformer_jax import runtime
from matformer_jax.data.tokenizer import Tokenizer
from matformer_jax.errors import UserError

STORE_VERSION = 2
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
VERIFIED_BYTES = 4 * 2**30  # a larger store is checked for size when opened, not read whole
_BATCH = 64  # documents tokenised at a time


class Tokens(Sequence):
  """The shards of a split as one read-only array of token ids.

  Attributes:
    dtype: of the ids.
  """

  def __init__(self, shards: Sequence[np.ndarray], dtype):
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
    first = bisect.bisect_right(self._ends, start)
    pieces = []
    for i in range(first, len(self._shards)):
      offset = self._ends[i] - len(self._shards[i])
      if offset >= stop:
        break
      pieces.append(self._shards[i][max(start - offset, 0) : stop - offset])
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros(0, self.dtype)])
    return whole[::step]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self[:], dtype)


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """Tokens of both splits.

  Attributes:
    tokens: split -> Tokens.
    manifest: version, source, tokenizer hash, dtype, shards with counts and checksums.
    path: the store's directory.
  """

  tokens: dict[str, Tokens]
  manifest: dict[str, Any]
  path: pathlib.Path

  @property
  def fingerprint(self) -> str:
    """Changes when any token does; equal on every machine with the same shards."""
    sums = "".join(s["sha256"] for split in SPLITS for s in self.manifest["shards"][split])
    return hashlib.sha256(sums.encode()).hexdigest()[:16]

  def total(self, split: str, what: str) -> int:
    """Sum of `documents`, `bytes` or `tokens` over a split's shards."""
    return sum(shard[what] for shard in self.manifest["shards"][split])


def open_store(path: str | os.PathLike, verify: bool | None = None) -> TokenStore:
  """Opens a store.

  Args:
    verify: read every shard and compare its checksum; None does where all are at most
      VERIFIED_BYTES. Sizes are always compared.

  Raises:
    UserError: naming the damaged or missing file.
  """
  path = pathlib.Path(path)
  try:
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["version"] != STORE_VERSION:
      raise UserError(
        f"token store {path} has version {manifest['version']}, this program writes {STORE_VERSION}"
      )
    dtype = np.dtype(manifest["dtype"])
    size = sum(s["tokens"] for split in SPLITS for s in manifest["shards"][split]) * dtype.itemsize
    tokens = {}
    for split in SPLITS:
      shards = []
      for shard in manifest["shards"][split]:
        _check_shard(path, shard, dtype, size <= VERIFIED_BYTES if verify is None else verify)
        if shard["tokens"]:
          shards.append(np.memmap(path / shard["file"], dtype, "r", shape=(shard["tokens"],)))
      tokens[split] = Tokens(shards, dtype)
  except (OSError, ValueError, KeyError, TypeError) as e:
    if isinstance(e, UserError):
      raise
    raise UserError(f"token store {path} is incomplete ({e}); prepare it again") from e
  return TokenStore(tokens, manifest, path)


def _check_shard(path: pathlib.Path, shard: dict[str, Any], dtype, verify: bool) -> None:
  file = path / shard["file"]
  if file.stat().st_size != shard["tokens"] * dtype.itemsize:
    raise UserError(
      f"token store file {file} has {file.stat().st_size} bytes, its manifest says "
      f"{shard['tokens'] * dtype.itemsize}; prepare it again"
    )
  if verify and _sha256(file) != shard["sha256"]:
    raise UserError(f"token store file {file} fails its checksum; prepare it again")


def write_part(
  path: pathlib.Path,
  index: int,
  documents: Iterable[str],
  tokenizer: Tokenizer,
  validation_fraction: float,
  report: Callable[[int], Any] = lambda n: None,
) -> None:
  """Tokenises one part of a corpus into shards `index`, unless that is done already.

  Every 1/validation_fraction-th document is held out. `report` gets bytes of text done.
  """
  done = _part_file(path, index)
  if done.exists():
    return
  dtype = token_dtype(tokenizer)
  every = max(2, round(1 / validation_fraction))
  counts = {
    split: {"file": f"{split}-{index:05d}.bin", "documents": 0, "bytes": 0, "tokens": 0}
    for split in SPLITS
  }
  sums = {split: hashlib.sha256() for split in SPLITS}
  with contextlib.ExitStack() as stack:
    out = {s: stack.enter_context(open(path / counts[s]["file"], "wb")) for s in SPLITS}
    numbered = enumerate(documents)
    while batch := list(itertools.islice(numbered, _BATCH)):
      for (number, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
        split = "validation" if number % every == every // 2 else "train"
        data = np.asarray(ids + [tokenizer.eos_id], dtype).tobytes()
        out[split].write(data)
        sums[split].update(data)
        size = len(text.encode("utf-8", "replace"))
        for name, amount in (("documents", 1), ("bytes", size), ("tokens", len(ids) + 1)):
          counts[split][name] += amount
        report(size)
  for split in SPLITS:
    counts[split]["sha256"] = sums[split].hexdigest()
  write_json(done, counts)


def finish(
  path: pathlib.Path, parts: int, source: str, tokenizer: Tokenizer, validation_fraction: float
) -> None:
  """Joins `parts` written parts: writes the manifest.

  Raises:
    UserError: if either split is empty.
  """
  written = [json.loads(_part_file(path, i).read_text()) for i in range(parts)]
  shards = {split: [part[split] for part in written] for split in SPLITS}
  documents = sum(s["documents"] for parts in shards.values() for s in parts)
  for split in SPLITS:
    if not sum(s["documents"] for s in shards[split]):
      raise UserError(
        f"source {source!r} has {documents:,} documents, which leaves the {split} split empty at "
        f"validation_fraction={validation_fraction}; use more text or another fraction"
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


def written_parts(path: pathlib.Path, parts: int) -> list[int]:
  """Which parts are already whole."""
  return [i for i in range(parts) if _part_file(path, i).exists()]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
  """The narrowest of uint16 and uint32 that holds every id."""
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes at once or not at all."""
  runtime.replace_file(path, json.dumps(value, indent=1).encode())


def _part_file(path: pathlib.Path, index: int) -> pathlib.Path:
  return path / f"part-{index:05d}.json"


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
