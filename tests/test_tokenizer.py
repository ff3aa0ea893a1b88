"""Tokenizers of both kinds: equal to their libraries, kept in directories, made of GGUF files."""

import dataclasses
import hashlib
import json
import pathlib
import sys

import helpers
from helpers import AWKWARD
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import matformer_jax
from matformer_jax import UserError
from matformer_jax.data import text_sources
from matformer_jax.data.tokenizer import (
  DamagedTokenizer,
  HuggingFaceTokenizer,
  SentencePieceTokenizer,
  find_tokenizer,
  open_tokenizer,
  train_tokenizer,
)
from matformer_jax.extract import extract
from matformer_jax.formats import gguf_vocab
from matformer_jax.formats.gguf_vocab import GGUFVocab, to_tokenizer

SAMPLE = [
  p.read_text(encoding="utf-8", errors="replace")
  for p in sorted(pathlib.Path(json.__file__).parent.glob("*.py"))
]
TEXTS = AWKWARD + SAMPLE
EOS = "<|endoftext|>"
LONE_SURROGATES = ["\ud800", "a\udc80b", "\udfff\ud800 x", "😀\ud83d"]


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
  return helpers.byte_level_library(SAMPLE, 600)


@pytest.fixture(scope="module")
def byte_level(library) -> HuggingFaceTokenizer:
  return HuggingFaceTokenizer(library.to_str().encode(), {"eos_token": EOS})


@pytest.fixture(scope="module")
def pieces() -> SentencePieceTokenizer:
  return train_tokenizer(SAMPLE, 600, "bpe", 10**6)


@pytest.fixture(params=["byte_level", "pieces"])
def tokenizer(request):
  return request.getfixturevalue(request.param)


def ids_of(library, text: str) -> list[int]:
  return library.encode(text, add_special_tokens=False).ids


# -------------------------------------------------------------------- encoding


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_library(byte_level, library, pieces, text):
  assert byte_level.encode(text) == ids_of(library, text)
  assert pieces.encode(text) == sentencepiece.SentencePieceProcessor(
    model_proto=pieces.model
  ).encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_lossless_and_every_byte_counted(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
  assert tokenizer.eos_id not in ids and max(ids, default=0) < tokenizer.vocab_size


def test_a_batch_is_its_texts(tokenizer):
  assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
  assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("text", LONE_SURROGATES)
def test_lone_surrogates_are_replaced(tokenizer, text):
  decoded = tokenizer.decode(tokenizer.encode(text))
  assert "\ufffd" in decoded and [c for c in decoded if c != "\ufffd"] == [
    c for c in text if not 0xD800 <= ord(c) < 0xE000
  ]


def test_special_tokens_and_ids_of_no_token_decode_to_nothing(tokenizer):
  ids = tokenizer.encode("one two")
  padded = [tokenizer.eos_id, *ids, tokenizer.eos_id, tokenizer.vocab_size, 10**6]
  assert tokenizer.decode(padded) == tokenizer.decode(np.array(padded)) == "one two"
  assert tokenizer.byte_lengths.dtype == np.int64
  assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
  assert tokenizer.byte_lengths[tokenizer.eos_id] == 0


def test_a_tokenizer_json_that_cuts_and_fills_texts_does_not(library):
  changed = tokenizers.Tokenizer.from_str(library.to_str())
  changed.enable_truncation(4)
  changed.enable_padding(length=64)
  opened = HuggingFaceTokenizer(changed.to_str().encode(), {"eos_token": EOS})
  assert opened.encode(SAMPLE[0]) == ids_of(library, SAMPLE[0])
  assert opened.encode("a") == ids_of(library, "a")


def test_tokens_that_are_added_and_not_special_are_text(library):
  changed = tokenizers.Tokenizer.from_str(library.to_str())
  changed.add_tokens(["né ", "<tool>"])
  opened = HuggingFaceTokenizer(changed.to_str().encode(), {"eos_token": EOS})
  ids = opened.encode("a né <tool>")
  assert {600, 601} <= set(ids) and opened.vocab_size == 602
  assert opened.decode(ids) == "a né <tool>"
  assert opened.byte_lengths[ids].sum() == len("a né <tool>".encode())


def llama_2_like(pieces) -> HuggingFaceTokenizer:
  """A tokenizer.json of the kind that SentencePiece models become, with a space before a text."""
  sp = sentencepiece.SentencePieceProcessor(model_proto=pieces.model)
  vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
  made = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return HuggingFaceTokenizer(made.to_str().encode(), {"eos_token": "</s>"})


def test_a_space_before_every_text(pieces):
  tokenizer = llama_2_like(pieces)
  for text in ("word", " word", "a 漢 é\x01", "</s>"):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eos_id not in ids
    assert tokenizer.byte_lengths[ids].sum() == 1 + len(text.encode())
  # What is generated begins in the middle of a text, where a space is a space.
  before, whole = tokenizer.encode("one"), tokenizer.encode("one two")
  assert whole[: len(before)] == before
  assert tokenizer.continuation(before, whole[len(before) :]) == " two"
  assert tokenizer.continuation([tokenizer.eos_id], before) == "one"


# --------------------------------------------------- beginning and end of texts


@pytest.mark.parametrize("eos", [EOS, {"content": EOS, "lstrip": False}])
def test_eos_is_what_the_config_names(library, eos):
  opened = HuggingFaceTokenizer(library.to_str().encode(), {"eos_token": eos})
  assert opened.eos_id == library.token_to_id(EOS) and opened.bos_id is None
  assert opened.prompt("") == [opened.eos_id] and opened.prompt("a") == opened.encode("a")


def test_eos_of_the_caller_where_no_config_names_one(library, tmp_path):
  (tmp_path / "tokenizer.json").write_text(library.to_str())
  with pytest.raises(DamagedTokenizer, match=r"tokenizer.json: no tokenizer_config.json beside it"):
    open_tokenizer(tmp_path)
  opened = open_tokenizer(tmp_path, eos_id=5)
  assert opened.eos_id == 5 and opened.byte_lengths[5] == 0 and opened.decode([5]) == ""
  opened.save(tmp_path)
  again = open_tokenizer(tmp_path, eos_id=7)  # the config says it now
  assert (again.eos_id, again.sha256) == (5, opened.sha256)


def test_an_eos_that_is_an_ordinary_token_is_made_special(library):
  word = library.id_to_token(300)
  opened = HuggingFaceTokenizer(library.to_str().encode(), {"eos_token": word})
  assert opened.eos_id == 300 and opened.decode([300]) == "" and opened.vocab_size == 600


def with_template(library, template: str) -> bytes:
  changed = tokenizers.Tokenizer.from_str(library.to_str())
  changed.add_special_tokens(["<bos>"])
  tokens = [(name, changed.token_to_id(name)) for name in ("<bos>", EOS)]
  changed.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
  return changed.to_str().encode()


@pytest.mark.parametrize(
  "template,config,begins",
  [
    ("<bos> $A", {}, True),
    ("<bos> $A <|endoftext|>", {"bos_token": "<bos>"}, True),
    ("<bos> $A", {"bos_token": {"content": "<bos>"}, "add_bos_token": False}, False),
    ("$A", {"bos_token": "<bos>"}, False),
    ("$A", {"bos_token": "<bos>", "add_bos_token": True}, True),
    ("$A <|endoftext|>", {}, False),
  ],
)
def test_whether_texts_begin_with_bos(library, template, config, begins):
  opened = HuggingFaceTokenizer(with_template(library, template), {"eos_token": EOS, **config})
  bos = [600] if begins else []
  assert opened.bos_id == (600 if begins else None) and opened.bos() == bos
  assert opened.encode("a b") == ids_of(library, "a b")
  assert opened.begin("a b") == opened.prompt("a b") == bos + ids_of(library, "a b")
  assert opened.begin("") == bos and opened.prompt("") == (bos or [opened.eos_id])
  assert opened.byte_lengths[600] == 0 and opened.decode([600]) == ""


# ----------------------------------------------------------------------- files


def test_saved_and_opened_again(tokenizer, pieces, byte_level, tmp_path):
  other = pieces if tokenizer is byte_level else byte_level
  other.save(tmp_path)
  tokenizer.save(tmp_path)
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == tokenizer.files()
  times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
  tokenizer.save(tmp_path)
  assert times == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
  for path in (tmp_path, find_tokenizer(tmp_path)):
    again = open_tokenizer(path)
    assert type(again) is type(tokenizer)
    assert (again.sha256, again.eos_id, again.bos_id, again.vocab_size) == (
      tokenizer.sha256,
      tokenizer.eos_id,
      tokenizer.bos_id,
      tokenizer.vocab_size,
    )
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_sha256_of_a_sentencepiece_model_is_its_file_s(pieces, tmp_path):
  assert pieces.sha256 == hashlib.sha256(pieces.model).hexdigest()
  assert list(pieces.files()) == ["tokenizer.model"]
  pieces.save(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
  assert open_tokenizer(tmp_path).sha256 == pieces.sha256


def test_sha256_follows_what_defines_ids_and_texts(library):
  definition = library.to_str().encode()
  make = lambda **config: HuggingFaceTokenizer(definition, {"eos_token": EOS, **config}).sha256
  assert make() == make(chat_template="x", eos_token={"content": EOS})
  begins = make(bos_token="a", add_bos_token=True)
  assert len({make(), make(eos_token="a"), begins, make(bos_token="b", add_bos_token=True)}) == 4
  other = HuggingFaceTokenizer(definition + b"\n", {"eos_token": EOS})
  assert other.sha256 != make()


def test_a_sentencepiece_model_whose_texts_begin_with_bos(pieces, tmp_path):
  vocab = gguf_of_pieces(pieces, bos_id=600, add_bos=True)
  more = dict(tokens=[*vocab.tokens, "<s>"], scores=[*vocab.scores, 0], types=[*vocab.types, 3])
  made = to_tokenizer(dataclasses.replace(vocab, **more))
  made.save(tmp_path)
  again = open_tokenizer(tmp_path)
  assert again.bos_id == made.bos_id == 600 and again.begin("a") == [600, *again.encode("a")]
  assert again.sha256 == made.sha256 != hashlib.sha256(made.model).hexdigest()
  (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "a"}')
  with pytest.raises(DamagedTokenizer, match="'a', which is no control piece"):
    open_tokenizer(tmp_path)


def test_without_the_package_the_extra_is_named(byte_level, tmp_path, monkeypatch):
  byte_level.save(tmp_path)
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(
    UserError, match=r"tokenizer.json needs tokenizers: .*matformer_jax\[import\]"
  ):
    open_tokenizer(tmp_path)


@pytest.mark.parametrize(
  "files,words",
  [
    ({}, "holds neither tokenizer.json nor tokenizer.model"),
    ({"tokenizer.json": "junk"}, "tokenizer.json is not a tokenizer that"),
    ({"tokenizer.json": "{}"}, "tokenizer.json is not a tokenizer that"),
    ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "tokenizer_config.json is not"),
    ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "it is no object"),
    (
      {"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "<eot>"}'},
      "has no token '<eot>', which the tokenizer_config.json beside it names as eos_token",
    ),
    ({"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": 3}'}, "eos_token=3 of"),
    ({"tokenizer.model": "junk"}, "not a SentencePiece model"),
  ],
)
def test_what_is_wrong_is_said(library, tmp_path, files, words):
  for name, content in files.items():
    (tmp_path / name).write_text(library.to_str() if content is None else content)
  with pytest.raises(UserError, match=words):
    open_tokenizer(tmp_path)


def test_tokens_that_do_not_join_to_the_text_are_refused():
  words = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
  words.decoder = decoders.WordPiece()
  with pytest.raises(DamagedTokenizer, match="decodes by \\['WordPiece'\\]"):
    HuggingFaceTokenizer(words.to_str().encode(), {"eos_token": "a"})


# ------------------------------------------------------------------------ GGUF

_WORDS_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As these models' tokenizer.json have them.
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_SPLIT = lambda regex: pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
PUBLISHED = {
  "gpt-2": [BYTE_LEVEL],
  "smollm": [pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL],
  "llama-bpe": [_SPLIT(_WORDS_3 % "{1,3}"), _ALONE],
  "qwen2": [_SPLIT(_WORDS_3 % ""), _ALONE],
  "default": [  # Falcon's
    pre_tokenizers.Punctuation("contiguous"),
    BYTE_LEVEL,
    pre_tokenizers.Digits(individual_digits=False),
    _SPLIT("[0-9][0-9][0-9]"),
  ],
}


def gguf_of_library(library, **fields) -> GGUFVocab:
  """A tokenizer.json's vocabulary in GGUF's form."""
  spec = json.loads(library.to_str())
  vocab = library.get_vocab()
  tokens = sorted(vocab, key=vocab.get)
  special = {t["content"] for t in spec["added_tokens"]}
  defaults = dict(
    eos_id=vocab[EOS],
    types=[gguf_vocab.CONTROL if t in special else gguf_vocab.NORMAL for t in tokens],
    merges=[" ".join(m) for m in spec["model"]["merges"]],
  )
  return GGUFVocab("gpt2", tokens, **defaults | fields)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_bpe_of_a_gguf_file(pre):
  whole = pre_tokenizers.Sequence(PUBLISHED[pre])
  made = helpers.byte_level_library(SAMPLE, 700, whole, ignore_merges=pre == "llama-bpe")
  if pre == "qwen2":
    made.normalizer = normalizers.NFC()
  bos = dict(bos_id=0) if pre == "llama-bpe" else {}
  converted = to_tokenizer(gguf_of_library(made, pre=pre, **bos))
  assert isinstance(converted, HuggingFaceTokenizer)
  assert converted.vocab_size == 700 and converted.eos_id == made.token_to_id(EOS)
  assert converted.bos_id == (0 if pre == "llama-bpe" else None)
  for text in TEXTS:
    text = text.replace("`", "'") if pre == "default" else text  # to Falcon it is punctuation
    ids = converted.encode(text)
    assert ids == ids_of(made, text)
    if pre != "qwen2":
      assert converted.decode(ids) == text


def test_a_piece_that_is_a_token_stays_whole_where_merges_are_ignored():
  """Llama 3 has tokens that its merges do not make."""
  made = helpers.byte_level_library(SAMPLE, 300)
  vocab = gguf_of_library(made, pre="llama-bpe", bos_id=0)
  more = dict(tokens=[*vocab.tokens, "qqqq"], types=[*vocab.types, gguf_vocab.NORMAL])
  add = lambda pre: to_tokenizer(dataclasses.replace(vocab, pre=pre, **more))
  assert add("llama-bpe").encode("qqqq") == [300] and len(add("gpt-2").encode("qqqq")) == 4


def test_types_of_gguf_tokens(library):
  more = ["<tool>", "<hidden>", "[PAD602]", "<|im_end|>", "[PAD604]", "[PAD605]"]
  types = (gguf_vocab.USER_DEFINED, gguf_vocab.UNKNOWN, gguf_vocab.UNUSED, gguf_vocab.CONTROL)
  types += (gguf_vocab.UNUSED, gguf_vocab.UNUSED)
  vocab = gguf_of_library(library, eos_id=603, pre="gpt-2")
  tokens, types = [*vocab.tokens, *more], [*vocab.types, *types]
  made = to_tokenizer(dataclasses.replace(vocab, tokens=tokens, types=types))
  assert made.vocab_size == 604  # what fills the embedding up is no token
  text = "<tool><hidden>[PAD602]<|im_end|>"
  ids = made.encode(text)
  assert ids[0] == 600 and not {601, 602, 603} & set(ids) and made.decode(ids) == text
  assert made.decode([600, 601, 602, 603]) == "<tool>"


def gguf_of_pieces(tokenizer: SentencePieceTokenizer, **fields) -> GGUFVocab:
  """A SentencePiece model's vocabulary in GGUF's form."""
  model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
  tokens, scores, types = zip(*((p.piece, p.score, p.type) for p in model.pieces))
  defaults = dict(eos_id=1, bos_id=1, unk_id=0, add_bos=False, add_space_prefix=False)
  return GGUFVocab("llama", tokens, **defaults | dict(scores=scores, types=types) | fields)


def test_sentencepiece_of_a_gguf_file(pieces):
  made = to_tokenizer(gguf_of_pieces(pieces))
  assert isinstance(made, SentencePieceTokenizer)
  assert (made.vocab_size, made.eos_id, made.bos_id) == (600, 1, None)
  assert made.encode_batch(TEXTS) == pieces.encode_batch(TEXTS)
  np.testing.assert_array_equal(made.byte_lengths, pieces.byte_lengths)
  prefixed = to_tokenizer(gguf_of_pieces(pieces, add_space_prefix=True))
  assert prefixed.encode("word") == pieces.encode(" word") and prefixed.decode([1]) == ""
  library = sentencepiece.SentencePieceProcessor(model_proto=prefixed.model)
  for text in (*TEXTS, "\u2581 literal \u2581\u2581"):
    assert prefixed.encode(text) == library.encode(text)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_read_from_a_gguf_file(kind, library, pieces, tmp_path):
  import gguf

  vocab = gguf_of_library(library, pre="smollm") if kind == "gpt2" else gguf_of_pieces(pieces)
  writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
  writer.add_tokenizer_model(kind)
  writer.add_token_list(vocab.tokens)
  writer.add_token_types(vocab.types)
  writer.add_eos_token_id(vocab.eos_id)
  writer.add_add_bos_token(False)
  if kind == "gpt2":
    writer.add_tokenizer_pre("smollm")
    writer.add_token_merges(vocab.merges)
  else:
    writer.add_token_scores(vocab.scores)
    writer.add_add_space_prefix(False)
  writer.add_chat_template("{{ x }}")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  read = gguf_vocab.read_vocab(gguf.GGUFReader(tmp_path / "v.gguf"), "v.gguf")
  assert to_tokenizer(read).sha256 == to_tokenizer(vocab).sha256
  config = to_tokenizer(read).files()["tokenizer_config.json"]
  assert json.loads(config)["chat_template"] == "{{ x }}"


@pytest.mark.parametrize(
  "fields,words",
  [
    (dict(model="bert"), "f.gguf: tokenizer.ggml.model='bert' cannot be converted"),
    (dict(pre="tekken"), "f.gguf: tokenizer.ggml.pre='tekken' is not known, only default, gpt-2"),
    (dict(tokens=("a", "b", "a")), "'a' twice"),
    (dict(types=(1, 1)), "token_type has 2 values for 3 tokens"),
    (dict(model="llama", scores=(1.0,)), "scores has 1 values for 3 tokens"),
    (dict(merges=("ab",)), "'ab' of tokenizer.ggml.merges"),
    (dict(eos_id=None), "eos_token_id is missing"),
    (dict(eos_id=3), "eos_token_id=3 is no id of 3 tokens"),
    (dict(pre="llama3"), "bos_token_id is missing"),
    (dict(merges=("a x",)), "f.gguf is not a tokenizer"),
  ],
)
def test_gguf_vocabularies_that_cannot_be(fields, words):
  good = dict(model="gpt2", tokens=("a", "b", "ab"), eos_id=0, origin="f.gguf")
  with pytest.raises(UserError, match=words):
    to_tokenizer(GGUFVocab(**good | fields))


# ------------------------------------------------------------------- as a run


def test_a_run_on_a_tokenizer_json(library, tmp_path):
  """Prepared, trained on, damaged, resumed, loaded, continued, evaluated, extracted."""
  given, store, run = (tmp_path / name for name in ("given", "store", "run"))
  given.mkdir()
  (given / "tokenizer.json").write_bytes(with_template(library, "<bos> $A"))
  (given / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
  (tmp_path / "text").mkdir()
  for i in range(40):
    (tmp_path / "text" / f"{i}.py").write_text(SAMPLE[i % len(SAMPLE)])
  result = helpers.run_program(
    "data.prepare",
    f"--source=text:{tmp_path}/text/*.py",
    f"--tokenizer={given}",
    f"--out={store}",
    "--validation_fraction=0.1",
    "--workers=1",
  )
  assert result.returncode == 0, result.stderr
  tokens, tokenizer = text_sources.open_prepared(str(store))
  assert tokenizer.bos_id == 600 and tokenizer.sha256 == open_tokenizer(given).sha256
  first = tokens.tokens["train"][: 10 + len(SAMPLE[0])].tolist()
  assert first[0] == 600 and tokenizer.decode(first[: first.index(tokenizer.eos_id)]) in SAMPLE
  for split in ("train", "validation"):  # every document begins with bos
    ids = np.asarray(tokens.tokens[split])
    places = tokens.documents[split].starts(0, len(ids))
    assert np.flatnonzero(ids == 600).tolist() == places.tolist()
  small = dict(data__source=f"tokens:{store}", model__vocab_size=640, **helpers.ONE_WIDTH)
  train = lambda **more: helpers.run_program("train", *helpers.train_args(run, **small | more))
  result = train(steps=2, eval__every=0)
  assert result.returncode == 0, result.stderr
  assert open_tokenizer(run).sha256 == tokenizer.sha256
  assert "tokenizers" in json.loads((run / "config.json").read_text())["versions"]
  (run / "tokenizer.json").write_text("junk")
  result = train(steps=3, eval__every=0)
  assert result.returncode == 0 and "resuming" in result.stdout, result.stderr
  extract(run, "G1", tmp_path / "small")
  for workdir in (run, tmp_path / "small"):
    model = matformer_jax.load(workdir)
    assert model.tokenizer.sha256 == tokenizer.sha256
    assert isinstance(model.generate("def ", max_tokens=4), str)
    assert model.loss("x") == model.loss([600, *tokenizer.encode("x")])
  result = helpers.run_program("evaluate", f"--workdir={tmp_path / 'small'}", "--batches=1")
  assert result.returncode == 0, result.stderr
  assert helpers.run_program("generate", f"--workdir={run}", "--max_tokens=4").returncode == 0


def test_a_text_is_continued_from_bos(tiny_run, monkeypatch):
  model = matformer_jax.load(tiny_run)
  seen = []
  monkeypatch.setattr(
    type(model), "stream", lambda self, prompts, settings: seen.append(prompts) or iter(())
  )
  model.tokenizer.bos_id = 9
  model.generate(["", "a"], max_tokens=1)
  assert seen == [[[9], [9, *model.tokenizer.encode("a")]]]
