"""Writes tokenizers so that `transformers.AutoTokenizer` gives the ids that ours give.

Both kinds become a `tokenizer.json`, which is run as it is written; of a SentencePiece model alone
`transformers` would make another tokenizer. Two things differ: `transformers` makes special tokens
of text that spells them out, and SentencePiece's mark of a space, U+2581, in a text is a space.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from matformer_jax.data.tokenizer import (
  CONFIG_FILE,
  HUGGING_FACE_FILE,
  SENTENCEPIECE_FILE,
  HuggingFaceTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
)
from matformer_jax.errors import UserError, import_extra
from matformer_jax.formats.gguf_vocab import (
  CONTROL,
  NORMAL,
  UNKNOWN,
  USER_DEFINED,
  is_unigram,
  parse_sentencepiece,
)

_SPACE = "\u2581"
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def files(tokenizer: Tokenizer) -> dict[str, bytes]:
  """Name -> content of what a model's directory holds of its tokenizer.

  Raises:
    UserError: for a kind of tokenizer that has no tokenizer.json.
  """
  written = tokenizer.files()
  if isinstance(tokenizer, SentencePieceTokenizer):
    definition = sentencepiece_definition(parse_sentencepiece(tokenizer.model))
  elif isinstance(tokenizer, HuggingFaceTokenizer):
    definition = json.loads(written[HUGGING_FACE_FILE])
  else:
    raise UserError(f"a {type(tokenizer).__name__} cannot be written as {HUGGING_FACE_FILE}")
  definition = _begun_by(definition, tokenizer)
  config = {
    # The definition as it is; classes of a model's own change what comes before BPE.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    **{k: v for k, v in tokenizer.config.items() if k in _KEPT},
    "add_bos_token": tokenizer.bos_id is not None,
    "eos_token": token_of(definition, tokenizer.eos_id),
  }
  if tokenizer.bos_id is not None:
    config["bos_token"] = token_of(definition, tokenizer.bos_id)
  kept = {SENTENCEPIECE_FILE: written[SENTENCEPIECE_FILE]} if SENTENCEPIECE_FILE in written else {}
  return kept | {HUGGING_FACE_FILE: _to_json(definition), CONFIG_FILE: _to_json(config)}


_KEPT = ("chat_template", "bos_token", "pad_token", "unk_token", "model_max_length")


def token_of(definition: dict[str, Any], i: int) -> str:
  """The text of an id in a tokenizer.json."""
  for token in definition["added_tokens"]:
    if token["id"] == i:
      return token["content"]
  vocab = definition["model"]["vocab"]
  if isinstance(vocab, dict):
    return next(token for token, number in vocab.items() if number == i)
  return vocab[i][0]


def _begun_by(definition: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
  """The definition, such that texts begin as the tokenizer's do, and that eos is special."""
  ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
  added = [dict(token) for token in definition["added_tokens"]]
  known = {token["id"]: token for token in added}
  for i in ends:
    if i not in known:
      known[i] = {"id": i, "content": token_of(definition, i), **_FLAGS}
      added.append(known[i])
    known[i]["special"] = True
  definition = {**definition, "added_tokens": sorted(added, key=lambda token: token["id"])}
  tokenizers = import_extra("tokenizers", "writing a tokenizer", "export")
  have = tokenizers.Tokenizer.from_str(json.dumps(definition)).encode("a").ids
  if have != tokenizer.begin("a"):
    definition["post_processor"] = _template(definition, tokenizer.bos_id)
  return definition


def _template(definition: dict[str, Any], bos_id: int | None) -> dict[str, Any] | None:
  """What puts bos before a text."""
  if bos_id is None:
    return None
  bos = token_of(definition, bos_id)
  begin = {"SpecialToken": {"id": bos, "type_id": 0}}
  sequence = lambda name: {"Sequence": {"id": name, "type_id": 0}}
  return {
    "type": "TemplateProcessing",
    "single": [begin, sequence("A")],
    "pair": [begin, sequence("A"), begin, sequence("B")],
    "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
  }


# ---------------------------------------------------------------- SentencePiece


def sentencepiece_definition(proto: Any) -> dict[str, Any]:
  """The tokenizer.json that encodes as a SentencePiece model does."""
  spec = proto.normalizer_spec
  normalizers: list[dict[str, Any]] = []
  if spec.precompiled_charsmap:
    charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
    normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
  if spec.remove_extra_whitespaces:
    normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
    normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
  prefix = spec.add_dummy_prefix
  scheme = "first" if prefix else "never"
  if prefix and not any(piece.type == USER_DEFINED for piece in proto.pieces):
    # Metaspace puts no space before a text that begins with one, as SentencePiece does; but this
    # would put one after every user-defined piece too.
    normalizers.append({"type": "Prepend", "prepend": _SPACE})
    scheme = "never"
  decoders: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
  ]
  if prefix:
    decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  added = [
    {"id": i, "content": piece.piece, **_FLAGS, "special": piece.type != USER_DEFINED}
    for i, piece in enumerate(proto.pieces)
    if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
  ]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": {"type": "Sequence", "normalizers": normalizers},
    "pre_tokenizer": {
      "type": "Metaspace",
      "replacement": _SPACE,
      "prepend_scheme": scheme,
      "split": False,  # pieces may span words
    },
    "post_processor": None,
    "decoder": {"type": "Sequence", "decoders": decoders},
    "model": _unigram(proto) if is_unigram(proto) else _bpe(proto),
  }


def _unigram(proto: Any) -> dict[str, Any]:
  return {
    "type": "Unigram",
    "unk_id": proto.trainer_spec.unk_id,
    "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
    "byte_fallback": proto.trainer_spec.byte_fallback,
  }


def _bpe(proto: Any) -> dict[str, Any]:
  """SentencePiece joins the two neighbours that make the piece of the highest score."""
  vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  scores = {p.piece: p.score for p in proto.pieces if p.type == NORMAL}
  merges = [
    (-score, vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
    for piece, score in scores.items()
    for cut in range(1, len(piece))
    if piece[:cut] in scores and piece[cut:] in scores
  ]
  return {
    "type": "BPE",
    "dropout": None,
    "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": proto.trainer_spec.byte_fallback,
    "ignore_merges": False,
    "vocab": vocab,
    "merges": [[left, right] for *_, left, right in sorted(merges)],
  }


def _to_json(value: Any) -> bytes:
  return json.dumps(value, ensure_ascii=False).encode()
