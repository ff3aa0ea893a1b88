"""Datasets in TFDS's own on-disk format, written without TensorFlow."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any


def write_tfds(
  root: pathlib.Path,
  name: str,
  features,
  split: str,
  file_format: str,
  examples: Sequence[dict[str, Any]],
) -> None:
  """Writes root/name/plain/1.0.0 with one split, in two files.

  Args:
    features: a tfds.features.FeaturesDict.
    file_format: array_record or tfrecord.
    examples: feature -> bytes, or a list of ints.
  """
  from array_record.python.array_record_module import ArrayRecordWriter
  import tensorflow_datasets as tfds

  folder = root / name / "plain" / "1.0.0"
  folder.mkdir(parents=True)
  lengths = [len(examples) // 2, len(examples) - len(examples) // 2]
  serialized = [_example(e) for e in examples]
  for i, shard in enumerate((serialized[: lengths[0]], serialized[lengths[0] :])):
    path = folder / f"{name}-{split}.{file_format}-{i:05d}-of-00002"
    if file_format == "array_record":
      writer = ArrayRecordWriter(str(path), "group_size:1")
      for record in shard:
        writer.write(record)
      writer.close()
    else:
      path.write_bytes(b"".join(map(_tfrecord, shard)))
  info = tfds.core.SplitInfo(
    name=split,
    shard_lengths=lengths,
    num_bytes=sum(map(len, serialized)),
    filename_template=tfds.core.ShardedFileTemplate(
      data_dir=folder,
      dataset_name=name,
      split=split,
      filetype_suffix=file_format,
      template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    ),
  )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features,
    split_infos=[info],
    check_data=False,
    description="test",
    homepage=None,
    citation=None,
  )
  path = folder / "dataset_info.json"
  known = json.loads(path.read_text())
  known |= {"name": name, "configName": "plain", "version": "1.0.0", "fileFormat": file_format}
  path.write_text(json.dumps(known))


def _example(features: dict[str, Any]) -> bytes:
  from tensorflow_datasets.proto import tf_example_generated_pb2 as pb

  example = pb.Example()
  for name, value in features.items():
    if isinstance(value, bytes):
      example.features.feature[name].bytes_list.value.append(value)
    else:
      example.features.feature[name].int64_list.value.extend(value)
  return example.SerializeToString()


def _tfrecord(payload: bytes) -> bytes:
  """One TFRecord frame: length, its masked CRC-32C, payload, its masked CRC-32C."""
  table = []
  for n in range(256):
    for _ in range(8):
      n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    table.append(n)

  def masked(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
      crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")

  length = len(payload).to_bytes(8, "little")
  return length + masked(length) + payload + masked(payload)
