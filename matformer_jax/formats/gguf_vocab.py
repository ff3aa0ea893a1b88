"""The vocabulary inside a GGUF file, as a tokenizer of `data/tokenizer.py`.

GGUF has two kinds that matter here, by its `tokenizer.ggml.model`: `gpt2`, byte-level BPE with
merges, becomes a tokenizer.json; `llama`, SentencePiece pieces with scores, becomes a SentencePiece
model. The keys are in GGUF's specification; what llama.cpp takes for keys that a file does not
have is taken here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from matformer_jax.data.tokenizer import (
  HuggingFaceTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
)
from matformer_jax.errors import UserError

# GGUF's types of tokens, which are SentencePiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"  # GPT-2's
_WORDS_3 = (  # Llama 3's, with the most digits of a number that stay together to be filled in
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Pre:
  """What comes before BPE.

  Attributes:
    patterns: each cuts the pieces that those before it left, into its matches and what lies
      between them.
    ignore_merges: a piece that is a token stays whole, whatever the merges make of it.
    add_bos: whether texts begin with bos in files that do not say.
    normalizer: of the text, in tokenizer.json's terms.
  """

  patterns: tuple[str, ...]
  ignore_merges: bool = False
  add_bos: bool = False
  normalizer: dict[str, Any] | None = None


_GPT2 = _Pre((_WORDS,))
_SMOLLM = _Pre((r"\p{N}", _WORDS))
_LLAMA3 = _Pre((_WORDS_3 % "{1,3}",), ignore_merges=True, add_bos=True)
# Qwen normalises, and was trained so; llama.cpp does not.
_QWEN2 = _Pre((_WORDS_3 % "",), normalizer={"type": "NFC"})
_DEFAULT = _Pre((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"))
PRE = {
  "default": _DEFAULT,
  "gpt-2": _GPT2,
  "llama-bpe": _LLAMA3,
  "llama-v3": _LLAMA3,
  "llama3": _LLAMA3,
  "qwen2": _QWEN2,
  "smollm": _SMOLLM,
}


@dataclasses.dataclass(frozen=True)
class GGUFVocab:
  """A vocabulary as GGUF describes it, in its `tokenizer.*` keys.

  Attributes:
    model: `gpt2` or `llama`.
    tokens: by id; in the alphabet of GPT-2's bytes, or with SentencePiece's marks of spaces.
    eos_id: end of text.
    bos_id, unk_id: beginning of text, unknown; None where there is none.
    types: by id, NORMAL to BYTE; () for all NORMAL.
    merges: of `gpt2`, "left right", the first to apply first.
    scores: of `llama`, by id; the pieces of the highest are made first.
    pre: of `gpt2`, what comes before BPE: a key of PRE.
    add_bos: whether every text begins with bos; None where the file does not say.
    add_space_prefix, remove_extra_whitespaces: of `llama`, whether a space is put before a text,
      and whether runs of spaces become one.
    chat_template: Jinja, kept beside the tokenizer.
    origin: the file, for errors.
  """

  model: str
  tokens: Sequence[str]
  eos_id: int | None
  bos_id: int | None = None
  unk_id: int | None = None
  types: Sequence[int] = ()
  merges: Sequence[str] = ()
  scores: Sequence[float] = ()
  pre: str = "default"
  add_bos: bool | None = None
  add_space_prefix: bool = True
  remove_extra_whitespaces: bool = False
  chat_template: str | None = None
  origin: str = "the GGUF vocabulary"


def read_vocab(reader: Any, origin: str) -> GGUFVocab:
  """The vocabulary of an open GGUF file.

  Args:
    reader: a `gguf.GGUFReader`.
    origin: the file's name, for errors.

  Raises:
    UserError: if the file has no vocabulary.
  """

  def get(key: str, default: Any = None) -> Any:
    field = reader.get_field(f"tokenizer.{key}")
    return default if field is None else field.contents()

  model, tokens = get("ggml.model"), get("ggml.tokens")
  if model is None or not tokens:
    raise UserError(f"{origin} holds no vocabulary (tokenizer.ggml.model and .tokens)")
  unk, bos, eos = (0, 1, 2) if model == "llama" else (None, None, None)
  return GGUFVocab(
    model=model,
    tokens=tokens,
    eos_id=get("ggml.eos_token_id", eos),
    bos_id=get("ggml.bos_token_id", bos),
    unk_id=get("ggml.unknown_token_id", unk),
    types=get("ggml.token_type", ()),
    merges=get("ggml.merges", ()),
    scores=get("ggml.scores", ()),
    pre=get("ggml.pre", "default"),
    add_bos=get("ggml.add_bos_token"),
    add_space_prefix=get("ggml.add_space_prefix", True),
    remove_extra_whitespaces=get("ggml.remove_extra_whitespaces", False),
    chat_template=get("chat_template"),
    origin=origin,
  )


def from_tokenizer(tokenizer: Tokenizer) -> GGUFVocab:
  """The vocabulary with which llama.cpp makes a tokenizer's ids: `to_tokenizer` inverts it.

  Raises:
    UserError: for a tokenizer that llama.cpp has no equal of.
  """
  if isinstance(tokenizer, SentencePieceTokenizer):
    return _from_sentencepiece(tokenizer)
  if isinstance(tokenizer, HuggingFaceTokenizer):
    return _from_json(tokenizer)
  raise UserError(f"--format=gguf: llama.cpp has no tokenizer like a {type(tokenizer).__name__}")


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> GGUFVocab:
  proto = parse_sentencepiece(tokenizer.model)
  if is_unigram(proto):
    raise UserError(
      "--format=gguf: llama.cpp spells no unknown character in bytes with a unigram tokenizer, so "
      "its ids would be others; train with data.tokenizer_type=bpe, or use --format=hf"
    )
  spec = proto.normalizer_spec
  if spec.precompiled_charsmap:
    raise UserError(
      f"--format=gguf: llama.cpp does not normalise text as this tokenizer does ({spec.name}); "
      "use --format=hf"
    )
  return GGUFVocab(
    model="llama",
    tokens=[piece.piece for piece in proto.pieces],
    scores=[piece.score for piece in proto.pieces],
    types=[piece.type for piece in proto.pieces],
    eos_id=tokenizer.eos_id,
    bos_id=tokenizer.bos_id,
    unk_id=proto.trainer_spec.unk_id,
    add_bos=tokenizer.bos_id is not None,
    add_space_prefix=spec.add_dummy_prefix,
    remove_extra_whitespaces=spec.remove_extra_whitespaces,
    chat_template=tokenizer.chat_template,
  )


def _from_json(tokenizer: HuggingFaceTokenizer) -> GGUFVocab:
  definition = json.loads(tokenizer.definition)
  model = definition["model"]
  pre = _pre_name(definition)
  if model["type"] != "BPE" or model.get("byte_fallback") or pre is None:
    raise UserError(
      "--format=gguf: llama.cpp is known here to cut text before BPE as "
      f"{', '.join(PRE)} do, and this tokenizer.json does it otherwise; use --format=hf"
    )
  tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
  types = [UNUSED] * tokenizer.vocab_size
  for token, i in model["vocab"].items():
    tokens[i], types[i] = token, NORMAL
  for token in definition["added_tokens"]:
    i = token["id"]
    tokens[i], types[i] = token["content"], CONTROL if token["special"] else USER_DEFINED
  for i in (tokenizer.eos_id, tokenizer.bos_id):
    if i is not None:
      types[i] = CONTROL
  return GGUFVocab(
    model="gpt2",
    tokens=tokens,
    types=types,
    merges=[m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
    eos_id=tokenizer.eos_id,
    bos_id=tokenizer.bos_id,
    pre=pre,
    add_bos=tokenizer.bos_id is not None,
    chat_template=tokenizer.chat_template,
  )


def _pre_name(definition: Mapping[str, Any]) -> str | None:
  """The key of PRE that a tokenizer.json amounts to; None where there is none."""
  split = definition.get("pre_tokenizer") or {}
  steps = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
  patterns: list[str] = []
  byte_level = False
  for step in steps:
    kind, pattern = step.get("type"), step.get("pattern", {})
    if kind == "Split" and "Regex" in pattern and step["behavior"] == "Isolated":
      patterns.append(pattern["Regex"])
    elif kind == "Digits" and step["individual_digits"]:
      patterns.append(r"\p{N}")
    elif kind == "ByteLevel" and not step["add_prefix_space"]:
      patterns += [_WORDS] if step.get("use_regex", True) else []
      byte_level = True
    else:
      return None
  found = _Pre(
    tuple(map(_canonical, patterns)),
    ignore_merges=bool(definition["model"].get("ignore_merges")),
    normalizer=definition.get("normalizer"),
  )
  same = lambda pre: (
    tuple(map(_canonical, pre.patterns)) == found.patterns
    and pre.ignore_merges == found.ignore_merges
    and pre.normalizer == found.normalizer
  )
  return next((name for name, pre in PRE.items() if byte_level and same(pre)), None)


def _canonical(pattern: str) -> str:
  """One way to write a pattern of Llama 3's or Qwen's, of those in use."""
  return pattern.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:ends)").replace(
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:ends)"
  )


def add_to(writer: Any, vocab: GGUFVocab, size: int) -> None:
  """Adds a vocabulary to a `gguf.GGUFWriter`.

  Args:
    size: rows of the embedding; UNUSED tokens fill it up.
  """
  rest = size - len(vocab.tokens)
  filler = [f"[PAD{len(vocab.tokens) + i}]" for i in range(rest)]
  writer.add_tokenizer_model(vocab.model)
  if vocab.model == "gpt2":
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_merges(list(vocab.merges))
  else:
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([*vocab.scores, *[0.0] * rest])
    writer.add_add_space_prefix(vocab.add_space_prefix)
    writer.add_remove_extra_whitespaces(vocab.remove_extra_whitespaces)
  writer.add_token_list([*vocab.tokens, *filler])
  writer.add_token_types([*vocab.types, *[UNUSED] * rest])
  writer.add_add_bos_token(vocab.add_bos)
  writer.add_add_eos_token(False)
  assert vocab.eos_id is not None
  writer.add_eos_token_id(vocab.eos_id)
  if vocab.bos_id is not None:
    writer.add_bos_token_id(vocab.bos_id)
  if vocab.unk_id is not None:
    writer.add_unk_token_id(vocab.unk_id)
  if vocab.chat_template is not None:
    writer.add_chat_template(vocab.chat_template)


def to_tokenizer(vocab: GGUFVocab) -> Tokenizer:
  """The tokenizer that a GGUF vocabulary describes; its `save` writes it to a directory.

  UNUSED tokens at the end, which fill an embedding up, are no ids of the tokenizer.

  Raises:
    UserError: for a kind, or something before BPE, that is not known here, and for a vocabulary
      that contradicts itself.
  """
  if vocab.model not in ("gpt2", "llama"):
    raise UserError(
      f"{vocab.origin}: tokenizer.ggml.model={vocab.model!r} cannot be converted, only gpt2 "
      "(byte-level BPE) and llama (SentencePiece); give the model's Hugging Face directory instead"
    )
  vocab = _checked(vocab)
  if vocab.model == "gpt2":
    return HuggingFaceTokenizer(tokenizer_json(vocab), _config(vocab), origin=vocab.origin)
  return SentencePieceTokenizer(sentencepiece_model(vocab), _config(vocab), vocab.origin)


def tokenizer_json(vocab: GGUFVocab) -> bytes:
  """The content of the tokenizer.json that a checked `gpt2` vocabulary amounts to."""
  if vocab.pre not in PRE:
    raise UserError(
      f"{vocab.origin}: tokenizer.ggml.pre={vocab.pre!r} is not known, only {', '.join(PRE)}; give "
      "the model's Hugging Face directory, with its tokenizer.json, instead"
    )
  pre = PRE[vocab.pre]
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  added = [
    {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
    for i, (token, kind) in enumerate(zip(vocab.tokens, vocab.types))
    if kind not in (NORMAL, BYTE)
  ]
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
  splits = [
    {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    for regex in pre.patterns
  ]
  definition = {
    "version": "1.0",
    "added_tokens": added,
    "normalizer": pre.normalizer,
    "pre_tokenizer": {
      "type": "Sequence",
      "pretokenizers": [*splits, byte_level | {"use_regex": False}],
    },
    "post_processor": None,
    "decoder": byte_level | {"use_regex": False},
    "model": {
      "type": "BPE",
      "ignore_merges": pre.ignore_merges,
      "vocab": {token: i for i, token in enumerate(vocab.tokens)},
      # A token's own first character is no separator.
      "merges": [[m[: m.index(" ", 1)], m[m.index(" ", 1) + 1 :]] for m in vocab.merges],
    },
  }
  return json.dumps(definition, ensure_ascii=False).encode()


def parse_sentencepiece(model: bytes) -> Any:
  """The ModelProto of a serialised SentencePiece model."""
  # Typed by hand: protobuf makes its classes when it is imported.
  from sentencepiece import sentencepiece_model_pb2

  module: Any = sentencepiece_model_pb2
  proto = module.ModelProto()
  proto.ParseFromString(model)
  return proto


def is_unigram(proto: Any) -> bool:
  """Whether a model is a unigram model; else it is BPE.

  Raises:
    UserError: for other kinds.
  """
  kind = proto.trainer_spec.model_type
  if kind not in (1, 2):  # UNIGRAM, BPE
    raise UserError("a SentencePiece model of words or characters has no equal elsewhere")
  return kind == 1


def sentencepiece_model(vocab: GGUFVocab) -> bytes:
  """The serialised SentencePiece model that a checked `llama` vocabulary amounts to."""
  # Typed by hand: protobuf makes its classes when it is imported.
  from sentencepiece import sentencepiece_model_pb2

  proto: Any = sentencepiece_model_pb2
  model = proto.ModelProto()
  for token, score, kind in zip(vocab.tokens, vocab.scores, vocab.types):
    model.pieces.add(piece=token, score=score, type=kind)
  model.trainer_spec.model_type = proto.TrainerSpec.BPE
  model.trainer_spec.vocab_size = len(vocab.tokens)
  model.trainer_spec.byte_fallback = BYTE in vocab.types
  ids = {"unk": vocab.unk_id, "bos": vocab.bos_id, "eos": vocab.eos_id, "pad": None}
  for name, i in ids.items():
    setattr(model.trainer_spec, f"{name}_id", -1 if i is None else i)
    if i is not None:
      setattr(model.trainer_spec, f"{name}_piece", vocab.tokens[i])
  model.normalizer_spec.name = "identity"
  model.normalizer_spec.add_dummy_prefix = vocab.add_space_prefix
  model.normalizer_spec.remove_extra_whitespaces = vocab.remove_extra_whitespaces
  return model.SerializeToString()


def _config(vocab: GGUFVocab) -> dict[str, Any]:
  """What tokenizer_config.json says of a checked vocabulary."""
  assert vocab.eos_id is not None
  config: dict[str, Any] = {"eos_token": vocab.tokens[vocab.eos_id], "add_bos_token": vocab.add_bos}
  if vocab.bos_id is not None:
    config["bos_token"] = vocab.tokens[vocab.bos_id]
  if vocab.chat_template is not None:
    config["chat_template"] = vocab.chat_template
  return config


def _checked(vocab: GGUFVocab) -> GGUFVocab:
  """`vocab` with every field of the right length, ids that exist, and no UNUSED tokens at its end.

  Raises:
    UserError: where that cannot be.
  """

  def fail(problem: str) -> UserError:
    return UserError(
      f"{vocab.origin}: {problem}; convert the model to GGUF again, or give its Hugging Face "
      "directory instead"
    )

  size = len(vocab.tokens)
  types = list(vocab.types or [NORMAL] * size)
  per_id = {"token_type": types}
  per_id |= {"scores": vocab.scores} if vocab.model == "llama" else {}
  for name, values in per_id.items():
    if len(values) != size:
      raise fail(f"tokenizer.ggml.{name} has {len(values)} values for {size} tokens")
  if len(set(vocab.tokens)) != size:
    twice = next(t for i, t in enumerate(vocab.tokens) if t in vocab.tokens[:i])
    raise fail(f"tokenizer.ggml.tokens has the token {twice!r} twice")
  odd = next((m for m in vocab.merges if " " not in m[1:]), None)
  if vocab.model == "gpt2" and odd is not None:
    raise fail(f"{odd!r} of tokenizer.ggml.merges is not 'left right'")
  if vocab.eos_id is None:
    raise fail("tokenizer.ggml.eos_token_id is missing, the token that ends a text")
  for name, i in (("eos", vocab.eos_id), ("bos", vocab.bos_id), ("unknown", vocab.unk_id)):
    if i is not None and not 0 <= i < size:
      raise fail(f"tokenizer.ggml.{name}_token_id={i} is no id of {size} tokens")
  for i in (vocab.eos_id, vocab.bos_id):
    if i is not None:
      types[i] = CONTROL
  if vocab.model == "llama":
    if vocab.unk_id is None:
      raise fail("tokenizer.ggml.unknown_token_id is missing, which SentencePiece needs")
    types = [CONTROL if kind == UNKNOWN else kind for kind in types]  # it has only one
    types[vocab.unk_id] = UNKNOWN
  while types[-1] == UNUSED:
    types.pop()
    size -= 1
  add_bos = vocab.add_bos
  if add_bos is None:
    add_bos = vocab.model == "llama" or (vocab.pre in PRE and PRE[vocab.pre].add_bos)
  if add_bos and vocab.bos_id is None:
    raise fail("texts begin with bos, and tokenizer.ggml.bos_token_id is missing")
  return dataclasses.replace(
    vocab,
    tokens=vocab.tokens[:size],
    types=types,
    scores=vocab.scores[:size],
    add_bos=add_bos,
  )
