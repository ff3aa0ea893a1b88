"""Text: sources of documents, and the token stores made of them.

  source -> documents -> token store (store.py) -> [B, T+1] windows (batches.py)

A store is made once per (source, tokenizer) under the cache directory; large ones are
made by prepare.py and named as `tokens:DIR`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sysconfig
import time
from typing import Any

import numpy as np

from matformer_jax import runtime, storage
from matformer_jax.data import store, tfds_source
from matformer_jax.data.tokenizer import (
  DamagedTokenizer,
  Tokenizer,
  open_tokenizer,
  train_tokenizer,
)
from matformer_jax.errors import UserError

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


# ------------------------------------------------------------------- sources


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents in a fixed order.

  Attributes:
    name: the source as the user wrote it.
    identity: what changes when the corpus does; part of the store's key.
    part: (index, count) -> a fresh iterator of a contiguous share of the documents, each with
      its number in the whole corpus; one after the other the parts are the corpus.
    num_documents: in the corpus, empty ones too.
    size: bytes, for the progress bar; 0 where unknown.
  """

  name: str
  identity: str
  part: Callable[[int, int], Iterator[tuple[int, str]]]
  num_documents: int
  size: int = 0

  def documents(self) -> Iterator[str]:
    """All documents: a file each, or an example of a dataset."""
    return (text for _, text in self.part(0, 1))

  def pieces(self, index: int = 0, count: int = 1) -> Iterator[str]:
    """The text of a part (by default of all) in pieces of bounded size, to sample from."""
    for _, text in self.part(index, count):
      yield from store.cut(text)

  def spread(self, limit: int, places: int = 64) -> Iterator[str]:
    """About `limit` bytes from evenly spread documents, each from its beginning.

    No document is read that is not needed. Where places have less than their share, the others
    are read again for more.
    """
    taken = dict.fromkeys(range(max(1, min(places, self.num_documents))), 0)  # characters
    count = len(taken)
    while limit > 0 and taken:
      share = -(-limit // len(taken))
      for place, start in list(taken.items()):
        left = share
        for text in _after(start, self.pieces(place, count)):
          text = text[:left]
          yield text
          taken[place] += len(text)
          left -= len(text.encode("utf-8", "replace"))
          if left <= 0:
            break
        else:
          del taken[place]  # that was all there is
        limit -= share - left

  def without_held_out(self, validation_fraction: float) -> Corpus:
    """The text that is trained on where that share is held out for validation."""
    split = store.Split(validation_fraction, self.num_documents)

    def part(index, count):
      for number, text in self.part(index, count):
        for name, share in split.share(number, text):
          if name == "train":
            yield number, share

    return dataclasses.replace(self, part=part)


def _after(start: int, pieces: Iterator[str]) -> Iterator[str]:
  """Pieces without their first `start` characters."""
  for piece in pieces:
    if start < len(piece):
      yield piece[start:]
    start = max(start - len(piece), 0)


def open_corpus(source: str, data_dir: str | None = None, key: str = "data.source") -> Corpus:
  """Opens `stdlib`, `text:GLOB` or `tfds:NAME[/CONFIG]:FEATURE`.

  Args:
    source: `stdlib` is the running interpreter's own library sources.
    data_dir: where TFDS datasets were prepared.
    key: of the config, or flag, that holds the source, for errors.

  Raises:
    UserError: for an unknown kind, or where nothing is found.
  """
  kind, _, rest = source.partition(":")
  if source == "stdlib":
    root, files = library_files()
    return _file_corpus(source, {path: storage.version(path) for path in files}, root)
  if kind == "text" and rest:
    files = storage.matching(rest)
    if not files:
      raise UserError(
        f"{key}={source!r}: no file matches {rest!r}; quote the pattern, and "
        "use ** for subdirectories"
      )
    return _file_corpus(source, files, pathlib.Path("/"))
  if kind == "tfds" and rest:
    return _tfds_corpus(source, rest, data_dir)
  raise UserError(
    f"{key}={source!r} is not a source; use stdlib, text:GLOB, "
    "tfds:NAME[/CONFIG]:FEATURE or tokens:DIR"
  )


def library_files() -> tuple[pathlib.Path, list[pathlib.Path]]:
  """(root, files) of the running interpreter's library, without its tests."""
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  inside = lambda path: set(path.relative_to(root).parts)
  return root, sorted(p for p in root.rglob("*.py") if not _NOT_LIBRARY & inside(p))


def _file_corpus(
  name: str, files: Mapping[storage.Path, tuple[int, Any]], root: pathlib.Path
) -> Corpus:
  """Files, with the size and version of each; named from `root`, where they are below it."""
  inside = lambda p: str(p.relative_to(root)) if p.is_relative_to(root) else str(p)
  stats = [(inside(p), *version) for p, version in files.items()]
  size = sum(s for _, s, _ in stats)
  if size == 0:
    raise UserError(f"data.source={name!r}: the {len(files)} matching files are empty")

  def part(index, count):
    # By bytes, so that parts take equally long.
    sizes = [s for _, s, _ in stats]
    starts = itertools.accumulate(sizes[:-1], initial=0)
    for number, (path, start) in enumerate(zip(files, starts)):
      if start * count // size == index:
        # Undecodable bytes (some test data in real corpora) become U+FFFD.
        text = path.read_bytes().decode("utf-8", "replace")
        yield number, text.replace("\r\n", "\n").replace("\r", "\n")

  return Corpus(name, json.dumps(stats), part, len(files), size)


def _tfds_corpus(source: str, rest: str, data_dir: str | None) -> Corpus:
  name, colon, feature = rest.rpartition(":")
  if not colon or not name:
    raise UserError(
      f"data.source={source!r} names no feature; write tfds:NAME:FEATURE, e.g. tfds:c4/en:text"
    )
  builder: Any = tfds_source.open_builder(source, name, data_dir, "train")
  tfds_source.check_feature(source, builder, feature)
  split = builder.info.splits["train"]
  share = lambda items, index, count: range(
    len(items) * index // count, len(items) * (index + 1) // count
  )

  def from_array_record(index, count):
    # The data source keeps its split's examples in order and reads without TensorFlow.
    records = builder.as_data_source(split="train")
    for i in share(records, index, count):
      yield i, records[i]

  def from_tfrecord(index, count):
    paths = list(split.filepaths)
    firsts = list(itertools.accumulate(split.shard_lengths, initial=0))
    for i in share(paths, index, count):
      records = tfds_source.tfrecords(paths[i])
      yield from enumerate(map(builder.info.features.deserialize_example_np, records), firsts[i])

  is_array_record = tfds_source.file_format(builder) == "array_record"
  examples: Any = from_array_record if is_array_record else from_tfrecord

  def part(index, count):
    for number, example in examples(index, count):
      text = example[feature]
      if isinstance(text, np.ndarray):
        text = text.item()
      yield number, text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)

  identity = tfds_source.identity(builder, "train")
  return Corpus(source, identity, part, int(split.num_examples), int(split.num_bytes or 0))


# -------------------------------------------------------------------- cache


def open_source(
  source: str,
  data_dir: str | None,
  make_tokenizer: Callable[[Corpus], Tokenizer],
  validation_fraction: float,
  cache_dir: str | None = None,
):
  """(token store, tokenizer) of a source: a corpus, tokenised into the cache, or `tokens:DIR`.

  Args:
    make_tokenizer: called for a corpus; a prepared store brings its own.
  """
  if source.startswith("tokens:"):
    return open_prepared(source.removeprefix("tokens:"))
  corpus = open_corpus(source, data_dir)
  tokenizer = make_tokenizer(corpus)
  return get_store(corpus, tokenizer, validation_fraction, cache_dir), tokenizer


def open_prepared(path: str) -> tuple[store.TokenStore, Tokenizer]:
  """What prepare.py made. Raises UserError if it is damaged or unfinished."""
  tokenizer = open_tokenizer(path)
  opened = store.open_store(path)
  if opened.manifest["tokenizer"] != tokenizer.sha256:
    raise UserError(
      f"data.source='tokens:{path}': its tokenizer is not the one its tokens were made "
      "with; prepare it again"
    )
  return opened, tokenizer


def get_tokenizer(
  corpus: Corpus, vocab_size: int, model_type: str, sample_bytes: int, cache_dir: str | None = None
) -> Tokenizer:
  """A tokenizer trained on the corpus, from the cache when already trained."""
  key = _key("tokenizer", corpus.identity, vocab_size, model_type, sample_bytes)
  path = _cache(cache_dir) / f"tokenizer-{key}.model"
  with locked(path):
    if path.exists():
      try:
        return open_tokenizer(path)
      except DamagedTokenizer:
        path.unlink()  # a cache entry, remade below
    started = time.perf_counter()
    runtime.say(f"training a {model_type} tokenizer of {vocab_size:,} pieces on {corpus.name}")
    tokenizer = train_tokenizer(corpus.pieces(), vocab_size, model_type, sample_bytes)
    runtime.say(f"tokenizer trained in {time.perf_counter() - started:.1f} s")
    storage.replace_file(path, tokenizer.model)
  return tokenizer


def get_store(
  corpus: Corpus, tokenizer: Tokenizer, validation_fraction: float, cache_dir: str | None = None
) -> store.TokenStore:
  """The corpus as tokens; made once, then opened from the cache.

  Two processes may call this at once (one waits), and a killed one leaves nothing
  that is mistaken for a store. A store that fails its checksum is remade.

  Raises:
    UserError: if the corpus is empty or too small to split.
  """
  store.check_fraction(validation_fraction, "data.validation_fraction")
  key = _key(store.STORE_VERSION, corpus.identity, tokenizer.sha256, validation_fraction)
  path = _cache(cache_dir) / f"tokens-{key}"
  with locked(path):
    for leftover in path.parent.glob(f"{path.name}.tmp*"):
      shutil.rmtree(leftover)
    if path.exists():
      try:
        return store.open_store(path)
      except UserError as e:
        runtime.say(f"{e}; tokenising again")
        shutil.rmtree(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.mkdir()
    split = store.Split(validation_fraction, corpus.num_documents)
    split.say(corpus.name)
    with store.tokenising(corpus.name, corpus.size) as bar:
      store.write_part(temporary, 0, corpus.part(0, 1), tokenizer, split, bar.update)
    store.finish(temporary, 1, corpus.name, tokenizer, validation_fraction)
    temporary.rename(path)
  return store.open_store(path)


def _cache(cache_dir: str | None) -> pathlib.Path:
  default = os.path.join(runtime.cache_dir(), "data")
  path = storage.local(cache_dir or default, "data.cache_dir")
  path.mkdir(parents=True, exist_ok=True)
  return path


@contextlib.contextmanager
def locked(path: pathlib.Path, wait: bool = True):
  """Holds a file lock beside `path`; the kernel releases it if the process dies.

  Raises:
    UserError: if another process holds it, unless that is to be waited for.
  """
  with open(path.with_name(path.name + ".lock"), "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      raise UserError(f"{path} is being written by another process; wait for it") from None
    yield


def corpus_key(corpus: Corpus) -> str:
  """A short name that changes when the corpus does."""
  return _key(corpus.identity)


def _key(*parts: Any) -> str:
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
