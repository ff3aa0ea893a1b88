"""Datasets that TensorFlow Datasets prepared, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
import json
import os
import struct
from typing import Any

from matformer_jax import storage
from matformer_jax.errors import UserError


def open_builder(source: str, name: str, data_dir: str | None, split: str):
  """A read-only builder of a prepared dataset that has `split`.

  Raises:
    UserError: if it is not there, or in a file format other than array_record and tfrecord.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  from tensorflow_datasets.core import read_only_builder

  try:
    builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except Exception as e:
    raise UserError(
      f"data.source={source!r}: no prepared dataset {name!r} under data.data_dir="
      f"{data_dir!r}; prepare it with the tfds command line, or correct data_dir "
      f"({' '.join(str(e).split())[:160]})"
    ) from e
  if split not in builder.info.splits:
    raise UserError(
      f"data.source={source!r}: dataset has no split {split!r}; it has "
      f"{', '.join(builder.info.splits)}"
    )
  if file_format(builder) not in ("array_record", "tfrecord"):
    raise UserError(
      f"data.source={source!r}: file format {file_format(builder)!r} is not "
      "supported; prepare the dataset as array_record or tfrecord"
    )
  return builder


def file_format(builder) -> str:
  """`array_record`, `tfrecord`, ..."""
  return builder.info.file_format.value


def check_feature(source: str, builder, feature: str) -> None:
  """Raises UserError unless the dataset has the feature."""
  if feature not in (builder.info.features or {}):
    raise UserError(
      f"data.source={source!r}: dataset has no feature {feature!r}; it has "
      f"{', '.join(builder.info.features or {})}"
    )


def identity(builder, split: str) -> str:
  """Changes when the split does."""
  info = builder.info.splits[split]
  return json.dumps(
    [
      str(builder.info.full_name),
      file_format(builder),
      info.num_examples,
      info.shard_lengths,
      info.num_bytes,
      os.fspath(builder.data_dir),
    ]
  )


def random_access(builder, split: str, undecoded: str) -> Callable[[int], dict[str, Any]]:
  """index -> example of a split, with the feature `undecoded` left as encoded bytes."""
  import tensorflow_datasets as tfds

  decoders = {undecoded: tfds.decode.SkipDecoding()}
  if file_format(builder) == "array_record":
    return builder.as_data_source(split=split, decoders=decoders).__getitem__
  records = _TFRecords([os.fspath(p) for p in builder.info.splits[split].filepaths])
  decode = functools.partial(builder.info.features.deserialize_example_np, decoders=decoders)
  return lambda index: decode(records[index])


def tfrecords(path: str | os.PathLike) -> Iterator[bytes]:
  """The records of a TFRecord file, in order."""
  with storage.path(path).open("rb") as file:
    while (length := _next_length(file)) is not None:
      record = file.read(length + 4)
      if len(record) < length + 4:
        raise _cut_off(file)
      yield record[:-4]


class _TFRecords:
  """Records of TFRecord files by number. Files are walked once, length by length."""

  def __init__(self, paths):
    self._paths = [storage.path(path) for path in paths]
    self._open = {path: open(path, "rb") for path in self._paths if not storage.is_bucket(path)}
    self._places = []
    for path in self._paths:
      with path.open("rb") as file:
        self._places += [(path, offset, length) for offset, length in _lengths(file)]

  def __getitem__(self, index: int) -> bytes:
    path, offset, length = self._places[index]
    if path in self._open:
      return os.pread(self._open[path].fileno(), length, offset)
    return storage.read_range(path, offset, offset + length)


def _lengths(file):
  """(offset, length) of each record."""
  while (length := _next_length(file)) is not None:
    yield file.tell(), length
    file.seek(length + 4, os.SEEK_CUR)


def _next_length(file) -> int | None:
  """Of the record that begins here; None at the end.

  A record is uint64 length, uint32 checksum, data, uint32 checksum.
  """
  header = file.read(12)
  if header and len(header) < 12:
    raise _cut_off(file)
  return struct.unpack_from("<Q", header)[0] if header else None


def _cut_off(file) -> UserError:
  return UserError(f"{file.name} ends within a record; prepare the dataset again")
