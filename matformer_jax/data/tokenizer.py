"""SentencePiece tokenizers, trained so that decode(encode(text)) == text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import functools
import hashlib
import io
import os
import re

import numpy as np
import sentencepiece

from matformer_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.model"  # in a run's directory
TYPES = ("bpe", "unigram")
_SPACE = "\u2581"  # SentencePiece's space marker; literal ones go through byte pieces
_MAX_PIECE_BYTES = 8192  # a training sentence; longer lines are cut, never dropped


class Tokenizer:
  """A SentencePiece model.

  Attributes:
    vocab_size: number of pieces.
    eos_id: end-of-document id, appended to every document.
    sha256: of the model's bytes; stored in checkpoints and token stores.
  """

  def __init__(self, model: bytes, origin: str = "tokenizer model"):
    try:
      self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
      self.vocab_size = self._sp.vocab_size()
      self.eos_id = self._sp.eos_id()
    except (RuntimeError, TypeError) as e:
      raise UserError(f"{origin} is not a SentencePiece model ({e})") from e
    if self.vocab_size == 0 or self.eos_id < 0:
      raise UserError(
        f"{origin} has no end-of-text piece or no pieces at all; train it with "
        "eos_id >= 0, or let this program train one (leave data.tokenizer empty)"
      )
    self.model = model
    self.sha256 = hashlib.sha256(model).hexdigest()
    self._space_ids = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> Tokenizer:
    """Raises UserError if the file is missing or is not a SentencePiece model."""
    try:
      with open(path, "rb") as f:
        return cls(f.read(), os.fspath(path))
    except OSError as e:
      raise UserError(
        f"tokenizer {os.fspath(path)!r}: {e.strerror}; give a SentencePiece "
        ".model file in data.tokenizer, or leave it empty to train one"
      ) from e

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without end-of-text."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """As `encode`, for several texts at once."""
    texts = [t.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for t in texts]
    result = self._sp.encode(texts, num_threads=1)  # parallelism is the callers', by process
    for i, text in enumerate(texts):
      if _SPACE in text:
        parts = self._sp.encode(text.split(_SPACE))
        ids = parts[0]
        for part in parts[1:]:
          ids = ids + self._space_ids + part
        result[i] = ids
    return result

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    """int64 [V]: bytes of UTF-8 that each id stands for in a text; end-of-text stands for none."""
    return np.array([self._byte_length(i) for i in range(self.vocab_size)], np.int64)

  def _byte_length(self, i: int) -> int:
    if self._sp.is_byte(i):
      return 1
    if self._sp.is_control(i):
      return 0
    if self._sp.is_unknown(i):
      return len(self.decode([i]).encode())
    return len(self._sp.id_to_piece(i).replace(_SPACE, " ").encode())

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; end-of-text decodes to nothing."""
    return self._sp.decode([int(i) for i in ids])


def train_tokenizer(
  documents: Iterable[str], vocab_size: int, model_type: str, sample_bytes: int, seed: int = 0
) -> Tokenizer:
  """Trains a lossless SentencePiece model with byte fallback.

  Args:
    documents: the corpus; at most about `sample_bytes` are used, taken from
      evenly spread documents once the sample is larger than that.
    vocab_size: pieces, including 256 bytes and 4 special ones.
    model_type: `bpe` or `unigram`.
    sample_bytes: bounds the text given to the trainer, and so its memory.
    seed: which documents are sampled.

  Raises:
    UserError: if the corpus is empty or supports fewer pieces.
  """
  if model_type not in TYPES:
    raise UserError(f"data.tokenizer_type={model_type!r} is not one of {TYPES}")
  sentences = list(_sentences(_sample(documents, sample_bytes, seed)))
  if not sentences:
    raise UserError("the corpus is empty: no text to train a tokenizer on; check data.source")
  out = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sentences),
      model_writer=out,
      vocab_size=vocab_size,
      model_type=model_type,
      byte_fallback=True,
      character_coverage=0.9999,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=["\n", "\t"],
      unk_id=0,
      eos_id=1,
      bos_id=-1,
      pad_id=-1,
      num_threads=1,  # unigram results depend on it
      max_sentence_length=2 * _MAX_PIECE_BYTES,
      minloglevel=2,
    )
  except RuntimeError as e:
    limit = re.search(r"<= (\d+)", str(e))
    if limit and "too high" in str(e):
      raise UserError(
        f"model.vocab_size={vocab_size} is larger than this corpus supports; set "
        f"model.vocab_size to at most {limit.group(1)}, or use more text"
      ) from e
    needed = re.search(r"required_chars\. \d+ vs (\d+)", str(e))
    if needed:
      raise UserError(
        f"model.vocab_size={vocab_size} is too small for the characters of this "
        f"corpus; set model.vocab_size to at least {needed.group(1)}"
      ) from e
    raise
  return Tokenizer(out.getvalue())


def _sample(documents: Iterable[str], limit: int, seed: int) -> list[str]:
  """Documents of about `limit` bytes in all: every 2^k-th one, k grown as needed."""
  kept: list[tuple[int, str]] = []
  size, stride = 0, 1
  for i, text in enumerate(documents):
    if (i + seed) % stride:
      continue
    kept.append((i, text))
    size += len(text)
    while size > limit and len(kept) > 1:
      stride *= 2
      kept = [(j, t) for j, t in kept if (j + seed) % stride == 0]
      size = sum(len(t) for _, t in kept)
  return [t[:limit] for _, t in kept]


def _sentences(documents: Iterable[str]) -> Iterator[str]:
  step = _MAX_PIECE_BYTES // 4  # characters, at most 4 bytes each
  for text in documents:
    for line in text.split("\n"):
      for start in range(0, len(line), step):
        yield line[start : start + step].replace("\0", " ")
