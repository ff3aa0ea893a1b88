"""Sources, tokenizer, token store, windows."""

import inspect
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import helpers
import numpy as np
import pytest
from tfds_files import write_tfds

from matformer_jax import UserError
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import card
from matformer_jax.config import Execution
from matformer_jax.data import store as store_format
from matformer_jax.data import text_sources
from matformer_jax.data.batches import ValidationWindows, Windows
from matformer_jax.data.tokenizer import (
  HuggingFaceTokenizer,
  SentencePieceTokenizer,
  open_tokenizer,
  train_tokenizer,
)
from matformer_jax.evals import lm
from matformer_jax.models.matlm import MatLM
from matformer_jax.tasks import make_task
from matformer_jax.tasks.language import ATTEND, NextToken

SAMPLE = [
  p.read_text(encoding="utf-8", errors="replace")
  for p in sorted(pathlib.Path(json.__file__).parent.glob("*.py"))
]


@pytest.fixture(scope="module", params=["bpe", "unigram", "byte-level"])
def tokenizer(request):
  if request.param == "byte-level":
    definition = helpers.byte_level_library(SAMPLE, 600).to_str().encode()
    return HuggingFaceTokenizer(definition, {"eos_token": "<|endoftext|>"})
  return train_tokenizer(SAMPLE, 600, request.param, 10**6)


# ----------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
  "string",
  [
    "",
    " ",
    "  two  spaces ",
    "\ttab\n\n newline\r\n",
    "é à ü 漢字 😀 \u2028 \ufeff",
    "\x00\x01\x7f",
    "\u2581 literal \u2581\u2581",
    "</s> <unk> <0x41>",
    "a\u0301 vs \u00e1",
    "x" * 10_000,
  ],
)
def test_lossless(tokenizer, string):
  assert tokenizer.decode(tokenizer.encode(string)) == string


def test_lossless_on_random_unicode(tokenizer):
  rng = np.random.default_rng(0)
  points = [c for c in rng.integers(0, 0x110000, 3000) if not 0xD800 <= c < 0xE000]
  string = "".join(map(chr, points))
  assert tokenizer.decode(tokenizer.encode(string)) == string


def test_lossless_on_real_text_and_compresses(tokenizer):
  for document in SAMPLE:
    ids = tokenizer.encode(document)
    assert tokenizer.decode(ids) == document
    assert tokenizer.eos_id not in ids
  tokens = sum(len(tokenizer.encode(d)) for d in SAMPLE)
  assert tokens < 0.6 * sum(map(len, SAMPLE))


def test_bytes_of_tokens_are_those_of_the_text(tokenizer):
  awkward = (
    "  two  spaces \ttab\r\n\n é à ü 漢字 😀 \u2028 \ufeff\x00\x7f \u2581 literal \u2581\u2581 "
    "</s> <unk> <0x41> a\u0301"
  )
  for text in (awkward, *SAMPLE):
    assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())
  assert tokenizer.byte_lengths.shape == (600,) and tokenizer.byte_lengths[tokenizer.eos_id] == 0


def test_training_is_reproducible():
  a, b = (train_tokenizer(SAMPLE, 400, "bpe", 10**6) for _ in range(2))
  assert a.sha256 == b.sha256


def test_sample_is_bounded():
  documents = (f"document {i} " * 50 for i in range(2000))
  assert train_tokenizer(documents, 280, "bpe", 20_000).vocab_size == 280


def test_vocabulary_larger_than_the_corpus_supports():
  with pytest.raises(UserError, match=r"vocab_size=5000 .* at most \d+"):
    train_tokenizer(["a few words"], 5000, "bpe", 10**6)


@pytest.mark.parametrize(
  "make,words",
  [
    (lambda: train_tokenizer([], 400, "bpe", 10), "corpus is empty"),
    (lambda: train_tokenizer(SAMPLE, 300, "word", 10), "tokenizer_type='word'"),
    (
      lambda: train_tokenizer(SAMPLE, 300, "bpe", 10**6),
      r"vocab_size=300 is too small .* at least \d+",
    ),
    (lambda: SentencePieceTokenizer(b"junk"), "not a SentencePiece model"),
    (lambda: open_tokenizer("/nowhere.model"), "/nowhere.model"),
  ],
)
def test_tokenizer_errors(make, words):
  with pytest.raises(UserError, match=words):
    make()


# ------------------------------------------------------------------- sources


def test_stdlib_is_real_python():
  corpus = text_sources.open_corpus("stdlib")
  documents = list(corpus.documents())
  assert sum(map(len, documents)) > 5e6
  assert any("def dumps(" in d for d in documents)
  assert max(map(len, documents)) > store_format.PIECE_CHARS  # long files are not cut up
  assert all(0 < len(p) <= store_format.PIECE_CHARS for p in corpus.pieces())


def test_long_files_are_cut_into_pieces_without_loss(tmp_path):
  content = "".join(f"line {i}\n" for i in range(10_000)) + "y" * 40_000
  (tmp_path / "a.txt").write_text(content)
  (tmp_path / "b.txt").write_text("short")
  corpus = text_sources.open_corpus(f"text:{tmp_path}/*.txt")
  assert list(corpus.documents()) == [content, "short"]
  pieces = list(corpus.pieces())
  assert pieces[-1] == "short" and "".join(pieces[:-1]) == content
  assert max(map(len, pieces)) <= store_format.PIECE_CHARS


@pytest.mark.parametrize(
  "source,words",
  [
    ("text:/nowhere/*.txt", "no file matches"),
    ("nope", "is not a source"),
    ("text:", "not a source"),
    ("tfds:mnist", "names no feature"),
    ("tfds:nope/nope:text", "no prepared dataset"),
  ],
)
def test_source_errors(source, words, tmp_path):
  with pytest.raises(UserError, match=words) as e:
    text_sources.open_corpus(source, str(tmp_path))
  assert source in str(e.value)


def test_empty_files(tmp_path):
  (tmp_path / "empty.txt").write_text("")
  with pytest.raises(UserError, match="are empty"):
    text_sources.open_corpus(f"text:{tmp_path}/*.txt")


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds(tmp_path, file_format):
  """Read without TensorFlow."""
  import tensorflow_datasets as tfds

  write_tfds(
    tmp_path,
    "sources",
    tfds.features.FeaturesDict({"text": tfds.features.Text()}),
    "train",
    file_format,
    [{"text": document.encode()} for document in SAMPLE],
  )
  corpus = text_sources.open_corpus("tfds:sources/plain:text", str(tmp_path))
  assert list(corpus.documents()) == SAMPLE and corpus.num_documents == len(SAMPLE)
  parts = [pair for i in range(3) for pair in corpus.part(i, 3)]
  assert parts == list(enumerate(SAMPLE))
  assert "tensorflow" not in sys.modules
  with pytest.raises(UserError, match="no feature 'words'"):
    text_sources.open_corpus("tfds:sources/plain:words", str(tmp_path))


# --------------------------------------------------------------- token store


@pytest.fixture
def corpus(tmp_path):
  for i, document in enumerate(SAMPLE):
    (tmp_path / f"{i}.txt").write_text(document)
  return text_sources.open_corpus(f"text:{tmp_path}/*.txt")


def test_store_holds_every_document_once(corpus, tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(store_format, "PIECE_CHARS", 3000)  # some are tokenised in pieces
  store = text_sources.get_store(corpus, tokenizer, 0.2, str(tmp_path / "cache"))
  documents = list(corpus.documents())
  decoded = {split: documents_of(store, split, tokenizer) for split in store_format.SPLITS}
  assert sorted(sum(decoded.values(), [])) == sorted(documents)
  assert decoded["validation"] == documents[2::5]


def documents_of(store, split, tokenizer) -> list[str]:
  """By offsets; each ends with end-of-text, which is nowhere else."""
  tokens = np.asarray(store.tokens[split])
  starts = store.documents[split].starts(0, len(tokens)).tolist()
  assert len(starts) == len(store.documents[split]) == store.total(split, "documents")
  stops = [*starts[1:], len(tokens)]
  assert np.flatnonzero(tokens == tokenizer.eos_id).tolist() == [stop - 1 for stop in stops]
  return [tokenizer.decode(tokens[start:stop]) for start, stop in zip(starts, stops)]


def test_a_corpus_of_few_documents_holds_out_the_end_of_each(tmp_path, capsys):
  """One document of two for validation would be half the text; at 5% it used to be pieces."""
  texts = ["".join(f"{name} line {i}\n" for i in range(4000)) for name in "ab"]
  for i, text in enumerate(texts):
    (tmp_path / f"{i}.txt").write_text(text)
  corpus = text_sources.open_corpus(f"text:{tmp_path}/*.txt")
  tokenizer = train_tokenizer(texts, 280, "bpe", 10**6)
  store = text_sources.get_store(corpus, tokenizer, 0.05, str(tmp_path / "cache"))
  assert "has 2 documents, fewer than 1 / validation_fraction = 20" in capsys.readouterr().out
  decoded = []
  for split in store_format.SPLITS:
    tokens = np.asarray(store.tokens[split])
    starts = store.documents[split].starts(0, len(tokens)).tolist()
    decoded.append([tokenizer.decode(t) for t in np.split(tokens, starts[1:])])
    assert np.count_nonzero(tokens == tokenizer.eos_id) == 2  # each share is a document
  train, validation = decoded
  assert [a + b for a, b in zip(train, validation)] == texts
  assert all(v.startswith(f"{name} line") for v, name in zip(validation, "ab"))
  assert sum(map(len, validation)) == pytest.approx(0.05 * sum(map(len, texts)), rel=0.01)


def test_segments_follow_offsets_and_not_the_token():
  eos = 1
  shards = [np.array([5, eos, 6, eos, eos, 7]), np.array([8, 9, eos]), np.array([3, eos])]
  starts = [np.array(s, np.uint64) for s in ([0, 5], [0], [0])]
  documents = store_format.Documents(list(zip([0, 6, 9], starts)))
  whole = np.array([0, 0, 0, 0, 0, 1, 2, 2, 2, 3, 3])
  for start in range(11):
    for stop in range(start + 1, 12):
      np.testing.assert_array_equal(
        documents.segments(start, stop), whole[start:stop] - whole[start], f"{start}:{stop}"
      )
  tokens = store_format.Tokens(shards, np.uint16)
  windows = Windows(tokens, 5, 4, seed=0, documents=documents)
  batch = windows.batch(0)
  for i, row, segments in zip(windows.window_ids(0), batch["tokens"], batch["segments"]):
    assert segments.dtype == np.int32 and row.dtype == np.int32
    np.testing.assert_array_equal(row, np.asarray(tokens)[5 * i : 5 * i + 6])
    np.testing.assert_array_equal(segments, ([0, 0, 0, 0, 0], [0, 1, 1, 1, 2])[i])


def test_store_is_made_once_and_remade_when_damaged(corpus, tmp_path, capfd):
  tokenizer = train_tokenizer(SAMPLE, 400, "bpe", 10**6)
  get = lambda: text_sources.get_store(corpus, tokenizer, 0.2, str(tmp_path / "cache"))
  first = get()
  made = (first.path / "train-00000.bin").stat().st_mtime_ns
  assert get().fingerprint == first.fingerprint
  assert (first.path / "train-00000.bin").stat().st_mtime_ns == made
  for file in ("train-00000.bin", "train-00000.documents.bin"):
    content = bytearray((first.path / file).read_bytes())
    content[10] ^= 1
    (first.path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} fails its checksum"):
      store_format.open_store(first.path)
    assert get().fingerprint == first.fingerprint
    captured = capfd.readouterr()
    assert "tokenising again" in captured.out + captured.err


def _open_store(directory, cache, results):
  corpus = text_sources.open_corpus(f"text:{directory}/*.txt")
  tokenizer = text_sources.get_tokenizer(corpus, 400, "bpe", 10**6, cache)
  results.put(text_sources.get_store(corpus, tokenizer, 0.2, cache).fingerprint)


def test_two_processes_make_one_store(corpus, tmp_path):
  context = multiprocessing.get_context("spawn")
  results, cache = context.Queue(), str(tmp_path / "cache")
  workers = [context.Process(target=_open_store, args=(tmp_path, cache, results)) for _ in range(2)]
  for w in workers:
    w.start()
  for w in workers:
    w.join(timeout=helpers.BACKSTOP_S)
    assert w.exitcode == 0
  found = {results.get() for _ in workers}
  assert len(found) == 1
  assert len(list(pathlib.Path(cache).glob("tokens-*/manifest.json"))) == 1


def test_an_interrupted_store_is_not_mistaken_for_one(tmp_path):
  """SIGKILL in the middle of tokenising; the next call makes a whole store."""
  cache = tmp_path / "cache"
  program = (
    "from matformer_jax.data import text_sources; c = text_sources.open_corpus('stdlib');"
    f"t = text_sources.get_tokenizer(c, 400, 'bpe', 10**5, {str(cache)!r});"
    f"text_sources.get_store(c, t, 0.1, {str(cache)!r})"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program], cwd=helpers.ROOT, stderr=subprocess.DEVNULL
  )
  deadline = time.time() + helpers.BACKSTOP_S
  while not [p for p in cache.glob("tokens-*.tmp*/train-00000.bin") if p.stat().st_size > 0]:
    assert time.time() < deadline and process.poll() is None
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not list(cache.glob("tokens-*/manifest.json"))
  corpus = text_sources.open_corpus("stdlib")
  tokenizer = text_sources.get_tokenizer(corpus, 400, "bpe", 10**5, str(cache))
  store = text_sources.get_store(corpus, tokenizer, 0.1, str(cache))
  assert store.total("train", "bytes") > 4e6
  assert not list(cache.glob("*.tmp*"))


@pytest.mark.parametrize(
  "fraction,words",
  [
    (0.0, "at most 0.5"),
    (1e-9, r"validation_fraction=1e-09 leaves its validation split empty"),
  ],
)
def test_split_errors(corpus, fraction, words, tmp_path):
  with pytest.raises(UserError, match=words):
    text_sources.get_store(
      corpus, train_tokenizer(SAMPLE, 400, "bpe", 10**6), fraction, str(tmp_path / "c")
    )


def test_shards_read_like_one_array():
  whole = np.arange(100, dtype=np.uint16)
  tokens = store_format.Tokens(np.split(whole, [0, 7, 7, 40, 99]), np.uint16)
  assert len(tokens) == 100 and tokens[40] == 40 and tokens[-1] == 99
  for start in range(0, 100, 3):
    for stop in range(start, 101, 7):
      np.testing.assert_array_equal(tokens[start:stop], whole[start:stop])
  np.testing.assert_array_equal(np.asarray(tokens), whole)
  np.testing.assert_array_equal(tokens[90:200], whole[90:])


# ------------------------------------------------------------------ preparation

PREPARE = [
  "--source=stdlib",
  "--vocab_size=600",
  "--tokenizer_type=bpe",
  "--tokenizer_sample_bytes=300000",
  "--validation_fraction=0.05",
  "--parts=6",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("prepared") / "store"
  result = helpers.run_program("data.prepare", *PREPARE, f"--out={out}", "--workers=2")
  assert result.returncode == 0, result.stderr
  assert "MB/s a process" in result.stdout and "c4/en" in result.stdout
  return out


def test_a_prepared_store_is_the_corpus(prepared):
  store, tokenizer = text_sources.open_prepared(str(prepared))
  corpus = text_sources.open_corpus("stdlib")
  assert [len(v) for v in store.manifest["shards"].values()] == [6, 6]
  assert sum(store.total(s, "documents") for s in store_format.SPLITS) == sum(
    bool(d) for d in corpus.documents()
  )
  assert sum(store.total(s, "bytes") for s in store_format.SPLITS) == sum(
    len(d.encode("utf-8", "replace")) for d in corpus.documents()
  )
  first = next(text for _, text in corpus.part(3, 6) if text)
  shard = np.fromfile(prepared / "train-00003.bin", np.uint16)
  assert tokenizer.decode(shard[: np.flatnonzero(shard == tokenizer.eos_id)[0]]) == first
  # The split follows a document's number in the corpus, whatever the parts.
  held_out = [d for i, d in enumerate(corpus.documents()) if i % 20 == 10 and d]
  assert documents_of(store, "validation", tokenizer) == held_out


def test_a_store_of_an_older_version_says_what_to_do(prepared, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(prepared, copy)
  manifest = json.loads((copy / "manifest.json").read_text())
  (copy / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
  with pytest.raises(UserError, match="format version 2, this program reads 3: prepare it again"):
    text_sources.open_prepared(str(copy))


def test_the_parts_are_the_corpus():
  corpus = text_sources.open_corpus("stdlib")
  whole = list(corpus.documents())
  for count in (3, 64):
    assert [d for i in range(count) for d in corpus.part(i, count)] == list(enumerate(whole))
  sizes = [sum(len(d) for _, d in corpus.part(i, 4)) for i in range(4)]
  assert max(sizes) < 1.3 * min(sizes)


def test_preparation_goes_on_after_a_kill(prepared, tmp_path):
  out = tmp_path / "store"
  command = helpers.command("data.prepare", *PREPARE, f"--out={out}", "--workers=1")
  process = subprocess.Popen(
    command,
    cwd=helpers.ROOT,
    env=helpers.PROGRAM_ENV,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  deadline = time.time() + helpers.BACKSTOP_S
  while len(store_format.written_parts(out, 6)) < 2:
    assert time.time() < deadline and process.poll() is None
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  before = {
    i: (out / f"train-{i:05d}.bin").stat().st_mtime_ns for i in store_format.written_parts(out, 6)
  }
  with pytest.raises(UserError, match="incomplete"):
    store_format.open_store(out)
  result = helpers.run_program("data.prepare", *PREPARE, f"--out={out}", "--workers=2")
  assert result.returncode == 0 and "parts were done before" in result.stdout, result.stderr
  assert before == {i: (out / f"train-{i:05d}.bin").stat().st_mtime_ns for i in before}
  assert store_format.open_store(out).fingerprint == store_format.open_store(prepared).fingerprint
  again = helpers.run_program("data.prepare", *PREPARE, f"--out={out}")
  assert again.returncode == 0 and "already prepared" in again.stdout


def test_preparation_mistakes(prepared, tmp_path):
  changed = [a for a in PREPARE if "vocab" not in a] + ["--vocab_size=700", f"--out={prepared}"]
  result = helpers.run_program("data.prepare", *changed)
  assert result.returncode == 1 and "tokenizer='bpe, 600 pieces" in result.stderr
  (tmp_path / "mine.txt").write_text("precious")
  result = helpers.run_program("data.prepare", *PREPARE, f"--out={tmp_path}")
  assert result.returncode == 1 and "is not empty" in result.stderr
  assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_damaged_shard_is_named(prepared, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(prepared, copy)
  shard = copy / "train-00004.bin"
  content = bytearray(shard.read_bytes())
  content[50] ^= 4
  shard.write_bytes(content)
  result = helpers.run_program("data.prepare", f"--out={copy}", "--verify")
  assert result.returncode == 1 and "train-00004.bin fails its checksum" in result.stderr
  shard.write_bytes(content[:-2])
  with pytest.raises(UserError, match="train-00004.bin has"):
    store_format.open_store(copy, verify=False)


def test_training_reads_a_prepared_store(prepared, tmp_path):
  args = helpers.train_args(
    tmp_path / "run",
    data__source=f"tokens:{prepared}",
    steps=3,
    model__vocab_size=600,
    eval__every=0,
    eval__batches=1,
  )
  result = helpers.run_program("train", *args)
  assert result.returncode == 0, result.stderr
  result = helpers.run_program("evaluate", f"--workdir={tmp_path / 'run'}", "--batches=1")
  assert result.returncode == 0, result.stderr


def test_a_sample_reads_no_more_than_it_needs():
  read = []

  def part(index, count):
    for i in range(1000):
      read.append(index)
      yield i, "x" * 1000

  corpus = text_sources.Corpus("many", "many", part, 1000 * 64)
  sample = list(corpus.spread(640_000, places=64))
  assert len(sample) == len(read) == 640 and len(set(read)) == 64


def test_a_sample_of_one_long_document_is_as_large_as_wanted(tmp_path):
  (tmp_path / "book.txt").write_text("one line of text\n" * 10_000)
  corpus = text_sources.open_corpus(f"text:{tmp_path}/*.txt")
  assert sum(map(len, corpus.spread(50_000))) == 50_000


def test_a_sample_is_as_large_as_wanted_where_one_document_is_most_of_the_text(tmp_path):
  (tmp_path / "0.txt").write_text("a line of the largest\n" * 100_000)
  for i in range(1, 64):
    (tmp_path / f"{i}.txt").write_text(f"document {i}\n")
  corpus = text_sources.open_corpus(f"text:{tmp_path}/*.txt")
  sample = list(corpus.spread(1_000_000))
  assert sum(map(len, sample)) == 1_000_000
  small = [text for text in sample if "document" in text]
  assert sorted(small) == sorted(f"document {i}\n" for i in range(1, 64))
  large = "".join(text for text in sample if "document" not in text)
  assert ("a line of the largest\n" * 100_000).startswith(large)  # nothing twice
  assert sum(map(len, corpus.spread(10**9))) == corpus.size


def test_a_sample_leaves_out_what_is_held_out(tmp_path):
  for i in range(40):
    (tmp_path / f"{i:02}.txt").write_text(f"document {i}\n")
  corpus = text_sources.open_corpus(f"text:{tmp_path}/*.txt")
  kept = "".join(corpus.without_held_out(0.1).spread(10_000)).splitlines()
  assert kept == [f"document {i}" for i in range(40) if i % 10 != 5]


# ------------------------------------------------------------------- windows


def test_windows_visit_everything_once_per_epoch_and_predict_every_token():
  tokens = np.arange(10 * 40 + 1)
  windows = Windows(tokens, 10, 8, seed=1)
  assert windows.num_windows == 40
  epochs = [np.concatenate([windows.batch(s) for s in range(e * 5, e * 5 + 5)]) for e in range(2)]
  for rows in epochs:
    assert sorted(rows[:, 1:].ravel()) == list(range(1, 401))
    assert np.all(np.diff(rows, axis=1) == 1)
  assert epochs[0][:, 0].tolist() != epochs[1][:, 0].tolist()
  assert epochs[0][:, 0].tolist() != sorted(epochs[0][:, 0])


def test_windows_are_a_pure_function_of_the_step_and_of_any_number_of_hosts():
  tokens = np.arange(1001, dtype=np.uint16)
  windows = Windows(tokens, 10, 8, seed=1)
  for step in (7, 3, 40):
    whole = windows.batch(step)
    assert whole.dtype == np.int32
    parts = [windows.batch(step, range(i, i + 2)) for i in (6, 0, 4, 2)]
    np.testing.assert_array_equal(np.concatenate([parts[i] for i in (1, 3, 2, 0)]), whole)


def test_validation_is_a_sample_of_the_whole_split_without_repeats():
  tokens = np.arange(1, 10 * 40 + 2)
  lengths = np.arange(500) % 7
  windows = ValidationWindows(tokens, 10, lengths)
  first = lambda batch: (batch["tokens"][:, 0] // 10).tolist()
  whole = first(windows.read(windows.sample()))
  assert sorted(whole) == list(range(40)) != whole
  sample = windows.sample(12)
  assert first(windows.read(sample)) == whole[:12] and max(whole[:12]) > 30
  filled = windows.read(range(8, 16), len(sample))  # the second batch of 8
  assert first(filled)[:4] == whole[8:12]
  assert filled["weight"].tolist() == [1] * 4 + [0] * 4
  assert filled["bytes"].tolist() == lengths[filled["tokens"][:, 1:]].sum(1).tolist()
  few = ValidationWindows(tokens[:31], 10, lengths)  # 3 windows, a batch of 8
  assert few.read(range(8), len(few.sample()))["weight"].sum() == 3


def test_too_little_validation_text_fails_before_the_first_step(tmp_path):
  (tmp_path / "a.txt").write_text("a few words of text\n" * 400)
  config = helpers.get_config("tiny")
  config.model.vocab_size = 280
  config.data.update(
    dict(source=f"text:{tmp_path}/*.txt", validation_fraction=0.003, cache_dir=str(tmp_path / "c"))
  )
  with pytest.raises(
    UserError, match=r"validation_fraction=0.003, fewer than .* model.seq_len=32 \+ 1"
  ):
    make_task(config)


def test_attention_across_or_within_documents(tmp_path):
  config = helpers.get_config("tiny")
  config.model.vocab_size = 400
  for i, text in enumerate(SAMPLE):
    (tmp_path / f"{i}.txt").write_text(text)
  config.data.update(
    dict(source=f"text:{tmp_path}/*.txt", validation_fraction=0.2, cache_dir=str(tmp_path / "c"))
  )
  across = make_task(config)
  assert across.batch(0).shape == (8, 33) and "attend" not in across.identity()
  config.data.attend = "within"
  within = make_task(config)
  assert within.identity() == {**across.identity(), "attend": "within"}
  batch, shapes = within.batch(0), within.batch_shapes(8)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in shapes.items()
  }
  np.testing.assert_array_equal(batch["tokens"], across.batch(0))
  assert within.validation.read(range(3))["segments"].shape == (3, 32)
  cards = [card.make_card(config, task) for task in (across, within)]
  with pytest.raises(UserError, match="holds another run: identity.attend .* 'within' here"):
    card.check_same_run(tmp_path, *cards)
  del config.data.attend  # the card of a run from before there was a choice
  assert make_task(config).identity() == across.identity()
  config.data.attend = "withn"
  with pytest.raises(UserError, match="data.attend='withn' is unknown; did you mean 'within'"):
    make_task(config)


@pytest.mark.skipif(
  "segments_BxT" not in inspect.signature(MatLM.__call__).parameters,
  reason="this MatLM does not attend within documents",
)
def test_losses_within_documents(small, small_params):
  """One document is as across documents; two are not."""
  tokens = np.random.default_rng(0).integers(0, 64, (2, 17)).astype(np.int32)
  across, within = (NextToken(small, 2, attend=attend) for attend in ATTEND)
  want = across.loss(small, Execution(), small_params, tokens)[1]["loss"]
  one = np.zeros((2, 16), np.int32)
  two = one + (np.arange(16) >= 5)
  for segments, same in ((one, True), (two, False)):
    batch = {"tokens": tokens, "segments": segments}
    have = within.loss(small, Execution(), small_params, batch)[1]["loss"]
    assert (abs(float(have - want)) < 1e-5) == same
    weights = {"bytes": np.ones(2, np.int32), "weight": np.ones(2, np.float32)}
    (measured,) = lm.evaluate(
      small, Execution(), small_params, [gran.full(small)], [batch | weights], False
    )
    assert measured.metrics["loss"] == pytest.approx(float(have), abs=1e-5)


def test_too_little_text_for_one_window():
  with pytest.raises(UserError, match="fewer than one window"):
    Windows(np.arange(10), 10, 1, 0)
