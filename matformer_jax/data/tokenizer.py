"""Tokenizers: text to token ids and back, through SentencePiece or Hugging Face's `tokenizers`.

A directory (a run, a token store, a model from elsewhere) holds a tokenizer as

  tokenizer.model          SentencePiece's; what this package trains
  tokenizer.json           Hugging Face's
  tokenizer_config.json    beside either: the tokens that begin and end a text, a chat template
  chat_template.jinja      beside either: the chat template, where it is a file of its own
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import hashlib
import io
import json
import os
import re
from typing import Any

import numpy as np
import sentencepiece

from matformer_jax import storage
from matformer_jax.errors import UserError, first_line, import_extra

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # read into the config, and kept there
TOKENIZER_FILES = (HUGGING_FACE_FILE, SENTENCEPIECE_FILE, CONFIG_FILE)  # the first found is opened
TYPES = ("bpe", "unigram")
_SPACE = "\u2581"  # SentencePiece's space marker
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_MAX_PIECE_BYTES = 8192  # a training sentence; longer lines are cut, never dropped


class DamagedTokenizer(UserError):
  """A tokenizer's file is there and does not hold a whole tokenizer."""


class Tokenizer(abc.ABC):
  """Text to token ids and back. `open_tokenizer` opens one from its file.

  Special tokens are never made of text: one that is spelled out in a text is encoded as the
  characters it is written with.

  Attributes:
    vocab_size: one more than the largest id, V.
    eos_id: end of text, appended to every document.
    bos_id: what every text begins with; None where texts begin with their first token.
    sha256: of all that defines ids and texts; stored in checkpoints and token stores.
    config: tokenizer_config.json; its `chat_template` is that of chat_template.jinja if there is
      one.
  """

  vocab_size: int
  eos_id: int
  bos_id: int | None
  sha256: str
  config: dict[str, Any]

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without beginning and end of text."""
    return self.encode_batch([text])[0]

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """As `encode`, for several texts at once."""

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; special tokens and ids of no token decode to nothing."""

  @property
  @abc.abstractmethod
  def byte_lengths(self) -> np.ndarray:
    """int64 [V]: bytes of UTF-8 that each id stands for in a text; special tokens: none.

    Over a text's ids they sum to its length, but where the tokenizer changes text: a space that it
    puts before every text counts, and one that it normalises counts as it is written then.
    """

  @property
  @abc.abstractmethod
  def special_tokens(self) -> dict[str, int]:
    """Text -> id of the tokens that no text is encoded to."""

  @abc.abstractmethod
  def files(self) -> dict[str, bytes]:
    """Name -> content of the files that `open_tokenizer` makes this tokenizer of."""

  def begin(self, text: str) -> list[int]:
    """Ids of a text from its beginning: `bos_id`, where there is one, and `encode(text)`."""
    return [*self.bos(), *self.encode(text)]

  def prompt(self, text: str) -> list[int]:
    """What to continue: as `begin`; end of text, after which another begins, for no ids at all."""
    return self.begin(text) or [self.eos_id]

  @property
  def chat_template(self) -> str | None:
    """Jinja that makes one text of a conversation, of several by name `default`; None: none."""
    found = self.config.get("chat_template")
    if isinstance(found, Sequence) and not isinstance(found, str):
      named = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}
      found = named.get("default")
    return found if isinstance(found, str) and found else None

  def bos(self) -> list[int]:
    """[bos_id], or [] where there is none."""
    return [] if self.bos_id is None else [self.bos_id]

  def continuation(self, ids: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` adds after `ids`: some tokenizers drop a text's first space."""
    return self.decode([*ids, *new])[len(self.decode(ids)) :]

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files where they are not there already; removes those of another tokenizer."""
    directory, files = storage.path(directory), self.files()
    for name in TOKENIZER_FILES:
      if name not in files:
        (directory / name).unlink(missing_ok=True)
    for name, content in reversed(files.items()):  # what it is found by comes last
      path = directory / name
      if not path.exists() or path.read_bytes() != content:
        storage.replace_file(path, content)


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model.

  Args:
    model: the serialised model.
    config: of tokenizer_config.json. Texts begin with its `bos_token` (default the model's own)
      if it says `add_bos_token`; the rest is only kept.
    origin: where the model came from, for errors.

  Raises:
    DamagedTokenizer: if it is no SentencePiece model, or has no end of text.
  """

  def __init__(
    self, model: bytes, config: Mapping[str, Any] | None = None, origin: str = "tokenizer model"
  ):
    try:
      self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
      self.vocab_size = self._sp.vocab_size()
      self.eos_id = self._sp.eos_id()
    except (RuntimeError, TypeError) as e:
      raise DamagedTokenizer(f"{origin} is not a SentencePiece model ({e})") from e
    if self.vocab_size == 0 or self.eos_id < 0:
      raise DamagedTokenizer(
        f"{origin} has no end-of-text piece or no pieces at all; train it with "
        "eos_id >= 0, or let this program train one (leave data.tokenizer empty)"
      )
    self.model = model
    self.config = dict(config or {})
    self.bos_id = self._read_bos(origin)
    bos = b"" if self.bos_id is None else _to_json(self._sp.id_to_piece(self.bos_id))
    self.sha256 = hashlib.sha256(model + bos).hexdigest()
    # A literal space marker would decode to a space, so it goes through byte pieces. Not where a
    # space is put before every text, and so would be before what follows a marker.
    self._space_ids = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
    if not all(map(self._sp.is_byte, self._space_ids)) or self._sp.normalize("a") != "a":
      self._space_ids = []

  def _read_bos(self, origin: str) -> int | None:
    if not self.config.get("add_bos_token"):
      return None
    name = _token(self.config, "bos_token", origin)
    bos = self._sp.bos_id() if name is None else self._sp.piece_to_id(name)
    if bos < 0 or not self._sp.is_control(bos):
      raise DamagedTokenizer(
        f"{origin}: the {CONFIG_FILE} beside it has add_bos_token and bos_token {name!r}, which is "
        "no control piece of this model; name one, or set add_bos_token to false"
      )
    return bos

  def files(self):
    config = {CONFIG_FILE: _to_json(self.config)} if self.config else {}
    return {SENTENCEPIECE_FILE: self.model, **config}

  def encode_batch(self, texts):
    texts = [_without_surrogates(t) for t in texts]
    result = self._sp.encode(texts, num_threads=1)  # parallelism is the callers', by process
    for i, text in enumerate(texts):
      if self._space_ids and _SPACE in text:
        parts = self._sp.encode(text.split(_SPACE))
        ids = parts[0]
        for part in parts[1:]:
          ids = ids + self._space_ids + part
        result[i] = ids
    return result

  @functools.cached_property
  def byte_lengths(self):
    return np.array([self._byte_length(i) for i in range(self.vocab_size)], np.int64)

  @functools.cached_property
  def special_tokens(self):
    ids = (i for i in range(self.vocab_size) if self._sp.is_control(i))
    return {self._sp.id_to_piece(i): i for i in ids}

  def _byte_length(self, i: int) -> int:
    if self._sp.is_byte(i):
      return 1
    if self._sp.is_control(i):
      return 0
    if self._sp.is_unknown(i):
      return len(self.decode([i]).encode())
    return len(self._sp.id_to_piece(i).replace(_SPACE, " ").encode())

  def decode(self, ids):
    return self._sp.decode([int(i) for i in ids if i < self.vocab_size])


class HuggingFaceTokenizer(Tokenizer):
  """A tokenizer.json, byte-level or made of a SentencePiece model.

  Args:
    definition: the content of tokenizer.json.
    config: of tokenizer_config.json. `eos_token` is the end of text. Texts begin with
      `bos_token` if `add_bos_token` says so or, where it says nothing, if the tokenizer.json adds
      that token itself, as Llama 3's does.
    eos_id: the end of text where `config` names none.
    origin: where the definition came from, for errors.

  Raises:
    DamagedTokenizer: if it is no tokenizer, of another kind, or the end of text is not known.
    UserError: if the package `tokenizers` is not installed.
  """

  def __init__(
    self,
    definition: bytes,
    config: Mapping[str, Any] | None = None,
    eos_id: int | None = None,
    origin: str = HUGGING_FACE_FILE,
  ):
    tokenizers = import_extra("tokenizers", origin, "import")
    try:
      spec = json.loads(definition)
      self._hf = tokenizers.Tokenizer.from_buffer(definition)
    except Exception as e:  # the library raises nothing more special
      raise DamagedTokenizer(
        f"{origin} is not a tokenizer that the package tokenizers {tokenizers.__version__} reads "
        f"({first_line(e)})"
      ) from e
    decoders = _decoder_types(spec.get("decoder"))
    self._byte_level, self._byte_fallback = (t in decoders for t in ("ByteLevel", "ByteFallback"))
    if not self._byte_level and not decoders & {"ByteFallback", "Metaspace", "Replace"}:
      raise DamagedTokenizer(
        f"{origin} decodes by {sorted(decoders) or 'nothing'}, so its tokens do not join to the "
        "text they were made of; byte-level tokenizers and those of SentencePiece models do"
      )
    # These would cut or fill a text, and make special tokens of what looks like one.
    self._hf.no_truncation()
    self._hf.no_padding()
    self._hf.encode_special_tokens = True
    self.definition = definition
    self.config = dict(config or {})
    self.eos_id = self._read_eos(eos_id, origin)
    self.bos_id = self._read_bos(origin)
    names = [None if i is None else self._hf.id_to_token(i) for i in (self.eos_id, self.bos_id)]
    self.config.setdefault("eos_token", names[0])
    for name in filter(None, names):  # in the vocabulary, and not always marked as special
      self._hf.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
    self.vocab_size = 1 + max(self._hf.get_vocab().values())
    # Not of all of tokenizer_config.json, which may hold a chat template.
    self.sha256 = hashlib.sha256(definition + _to_json(names)).hexdigest()

  def _read_eos(self, given: int | None, origin: str) -> int:
    name = _token(self.config, "eos_token", origin)
    if name is not None:
      return self._id(name, "eos_token", origin)
    self.config.pop("eos_token", None)
    if given is None:
      raise DamagedTokenizer(
        f"{origin}: no {CONFIG_FILE} beside it names the token that ends a text; write one, such "
        'as {"eos_token": "</s>"}'
      )
    if self._hf.id_to_token(given) is None:
      raise DamagedTokenizer(f"{origin} has no token of id {given}, which was to end a text")
    return given

  def _read_bos(self, origin: str) -> int | None:
    name, add = _token(self.config, "bos_token", origin), self.config.get("add_bos_token")
    named = None if name is None else self._id(name, "bos_token", origin)
    if add is not None and not add:
      return None
    if add and named is not None:
      return named
    bare, whole = (
      self._hf.encode("a", add_special_tokens=special).ids for special in (False, True)
    )
    begins = len(whole) > len(bare) and whole[0] != bare[0]
    if add and not begins:
      raise DamagedTokenizer(
        f"{origin}: the {CONFIG_FILE} beside it has add_bos_token and names no bos_token; name it"
      )
    return whole[0] if begins and named in (None, whole[0]) else None

  def _id(self, name: str, key: str, origin: str) -> int:
    found = self._hf.token_to_id(name)
    if found is None:
      raise DamagedTokenizer(
        f"{origin} has no token {name!r}, which the {CONFIG_FILE} beside it names as {key}; "
        "use the two files of one model"
      )
    return found

  def files(self):
    return {HUGGING_FACE_FILE: self.definition, CONFIG_FILE: _to_json(self.config)}

  def encode_batch(self, texts):
    # One by one: parallelism is the callers', by process, and the library's own takes all CPUs.
    texts = (_without_surrogates(t) for t in texts)
    return [self._hf.encode(t, add_special_tokens=False).ids for t in texts]

  @functools.cached_property
  def byte_lengths(self):
    lengths = np.zeros(self.vocab_size, np.int64)
    for token, i in self._hf.get_vocab(with_added_tokens=False).items():
      lengths[i] = self._byte_length(token)
    for i, token in self._hf.get_added_tokens_decoder().items():
      lengths[i] = 0 if token.special else len(token.content.encode())
    return lengths

  @functools.cached_property
  def special_tokens(self):
    added = self._hf.get_added_tokens_decoder().items()
    return {token.content: i for i, token in added if token.special}

  def _byte_length(self, token: str) -> int:
    if self._byte_level:
      return len(token)  # a character stands for a byte
    if self._byte_fallback and _BYTE_PIECE.fullmatch(token):
      return 1
    return len(token.replace(_SPACE, " ").encode())

  def decode(self, ids):
    return self._hf.decode([int(i) for i in ids], skip_special_tokens=True)


def find_tokenizer(directory: str | os.PathLike) -> storage.Path | None:
  """The file in `directory` that defines a tokenizer; None where there is none."""
  paths = (storage.path(directory) / name for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE))
  return next((path for path in paths if path.exists()), None)


def open_tokenizer(path: str | os.PathLike, eos_id: int | None = None) -> Tokenizer:
  """Opens a tokenizer, whatever its kind.

  Args:
    path: a .json of Hugging Face's tokenizers, a SentencePiece model (any other name), or a
      directory with tokenizer.json or tokenizer.model; with both, the former.
    eos_id: end of text for a tokenizer.json with no tokenizer_config.json that says it.

  Raises:
    DamagedTokenizer: (a UserError) if the file is not a whole tokenizer.
    UserError: if it is missing, or a package is.
  """
  file = storage.path(path)
  if file.is_dir():
    found = find_tokenizer(file)
    if found is None:
      raise UserError(
        f"tokenizer {os.fspath(path)!r}: the directory holds neither {HUGGING_FACE_FILE} nor "
        f"{SENTENCEPIECE_FILE}; {_WHAT_TO_GIVE}"
      )
    file = found
  try:
    content = file.read_bytes()
  except OSError as e:
    why = e.strerror or f"{type(e).__name__}: {e}"
    raise UserError(f"tokenizer {os.fspath(path)!r}: {why}; {_WHAT_TO_GIVE}") from e
  config = _read_config(file.with_name(CONFIG_FILE))
  template = file.with_name(CHAT_TEMPLATE_FILE)
  if template.exists():
    config["chat_template"] = template.read_text(encoding="utf-8")
  if file.suffix == ".json":
    return HuggingFaceTokenizer(content, config, eos_id, os.fspath(file))
  return SentencePieceTokenizer(content, config, os.fspath(file))


_WHAT_TO_GIVE = (
  "give a SentencePiece .model, a tokenizer.json or a directory with one of them in "
  "data.tokenizer, or leave it empty to train one"
)


def _read_config(path: storage.Path) -> dict[str, Any]:
  """tokenizer_config.json; {} where there is none."""
  try:
    config = json.loads(path.read_bytes())
    if not isinstance(config, dict):
      raise ValueError("it is no object")
    return config
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as e:
    raise DamagedTokenizer(f"{path} is not a tokenizer's configuration ({e})") from e


def _token(config: Mapping[str, Any], key: str, origin: str) -> str | None:
  """A token that a tokenizer_config.json names: as a string or {"content": string}; or None."""
  value = config.get(key)
  if isinstance(value, Mapping):
    value = value.get("content")
  if value is None or isinstance(value, str):
    return value
  raise DamagedTokenizer(
    f"{origin}: {key}={value!r} of the {CONFIG_FILE} beside it is no token; write it as a string"
  )


def _decoder_types(decoder: Any) -> set[str]:
  """The types of a tokenizer.json's decoder and of those it is made of."""
  if not decoder:
    return set()
  return {decoder["type"]}.union(*map(_decoder_types, decoder.get("decoders", ())))


def _to_json(value: Any) -> bytes:
  return json.dumps(value, indent=2).encode()


def _without_surrogates(text: str) -> str:
  """`text` with lone surrogates, which UTF-8 does not have, replaced by U+FFFD."""
  try:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
  except UnicodeEncodeError:  # one that does not stand for a byte
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def train_tokenizer(
  documents: Iterable[str], vocab_size: int, model_type: str, sample_bytes: int, seed: int = 0
) -> SentencePieceTokenizer:
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
  return SentencePieceTokenizer(out.getvalue())


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
