"""Tokenises a large corpus once, in parallel, into a store that training reads as tokens:DIR.

  python -m matformer_jax.data.prepare --source=tfds:c4/en:text --data_dir=gs://bucket/tfds \\
      --out=/mnt/data/c4 --vocab_size=256000 --workers=64
  python -m matformer_jax.train --config=configs/matlm.py:850M --workdir=... \\
      --config.data.source=tokens:/mnt/data/c4

The corpus is cut into parts, which worker processes tokenise independently. Killed, it
resumes where it was when the same command is run again. A tokenizer is trained on a sample
spread over the corpus unless --tokenizer names one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import time

from absl import flags

from matformer_jax import cli, runtime, storage, tables
from matformer_jax.data import store, text_sources
from matformer_jax.data.tokenizer import (
  Tokenizer,
  find_tokenizer,
  open_tokenizer,
  train_tokenizer,
)
from matformer_jax.errors import UserError
from matformer_jax.hosts import lock

JOB_FILE = "prepare.json"
C4_BYTES = 305e9  # of text in c4/en, by its dataset card


@dataclasses.dataclass(frozen=True)
class Job:
  """What is made of what; recorded, so that a restart with other settings is noticed.

  Attributes:
    source, data_dir: the corpus, as for `text_sources.open_corpus`.
    identity: of the corpus, by hash.
    parts: pieces of work, and shards per split.
    validation_fraction: share of the documents held out.
    tokenizer: sha256 of a given model, or how one is trained.
    version: of the store's format.
  """

  source: str
  data_dir: str
  identity: str
  parts: int
  validation_fraction: float
  tokenizer: str
  version: int = store.STORE_VERSION


def prepare(
  corpus: text_sources.Corpus,
  job: Job,
  out: storage.Path,
  workers: int,
  given_tokenizer: str,
  vocab_size: int,
  tokenizer_type: str,
  sample_bytes: int,
) -> store.TokenStore:
  """Makes the store at `out`, or finishes it; says how fast.

  Raises:
    UserError: if `out` holds another job or is being written, or the corpus is empty.
  """
  out.mkdir(parents=True, exist_ok=True)
  with _held(out):
    _check_same_job(out, job)
    store.Split(job.validation_fraction, corpus.num_documents).say(job.source)
    if (out / store.MANIFEST).exists():
      print(f"{out} is already prepared")
      return store.open_store(out)
    tokenizer = _tokenizer(corpus, out, given_tokenizer, vocab_size, tokenizer_type, sample_bytes)
    done = store.written_parts(out, job.parts)
    todo = [i for i in range(job.parts) if i not in done]
    if done:
      print(f"{len(done)} of {job.parts} parts were done before", flush=True)
    started = time.perf_counter()
    size = _run(job, out, todo, workers, corpus.size * len(todo) // job.parts)
    seconds = time.perf_counter() - started
    store.finish(out, job.parts, job.source, tokenizer, job.validation_fraction)
    if todo:
      rate = size / seconds / workers
      print(
        f"tokenised {size / 1e6:,.1f} MB in {seconds:,.1f} s: {rate / 1e6:.2f} MB/s a process; at "
        f"that rate c4/en ({C4_BYTES / 1e9:.0f} GB) takes {C4_BYTES / rate / workers / 3600:,.1f} "
        f"hours with {workers}"
      )
    return store.open_store(out)


def _held(out: storage.Path) -> contextlib.AbstractContextManager[None]:
  """One process prepares at a time."""
  if isinstance(out, pathlib.Path):
    return text_sources.locked(out.absolute(), wait=False)
  return lock.hold(out, flag="--out")


def _check_same_job(out: storage.Path, job: Job) -> None:
  path = out / JOB_FILE
  if not path.exists():
    if any(p.name != lock.LOCK_FILE for p in out.iterdir()):
      raise UserError(f"--out={out} is not empty and was not made by this program; use another")
    store.write_json(path, dataclasses.asdict(job))
    return
  before = json.loads(path.read_text())
  for name, value in dataclasses.asdict(job).items():
    if before.get(name) != value:
      raise UserError(
        f"--out={out} is being made with {name}={before.get(name)!r}, not {value!r}; "
        "use the same flags to continue, or another --out"
      )


def _parts_before(out: storage.Path) -> int:
  """In how many parts a job that was interrupted is done; 0 for a new one."""
  path = out / JOB_FILE
  return json.loads(path.read_text())["parts"] if path.exists() else 0


def _tokenizer(
  corpus: text_sources.Corpus,
  out: storage.Path,
  given: str,
  vocab_size: int,
  tokenizer_type: str,
  sample_bytes: int,
) -> Tokenizer:
  if find_tokenizer(out):
    return open_tokenizer(out)
  if given:
    tokenizer = open_tokenizer(given)
  else:
    print(
      f"training a {tokenizer_type} tokenizer of {vocab_size:,} pieces on up to "
      f"{sample_bytes / 1e6:,.0f} MB",
      flush=True,
    )
    started = time.perf_counter()
    tokenizer = train_tokenizer(
      corpus.spread(sample_bytes), vocab_size, tokenizer_type, 2 * sample_bytes
    )
    print(f"tokenizer trained in {time.perf_counter() - started:,.1f} s", flush=True)
  tokenizer.save(out)
  return tokenizer


# ----------------------------------------------------------------- the workers


def _run(job: Job, out: storage.Path, todo: list[int], workers: int, expected: int) -> int:
  """Does the parts of `todo`; returns bytes of text."""
  context = multiprocessing.get_context("spawn")
  counter = context.Value("q", 0)
  with store.tokenising(job.source, expected) as bar:
    with concurrent.futures.ProcessPoolExecutor(
      min(workers, len(todo)) or 1, context, _start_worker, (counter,)
    ) as pool:
      waiting = {pool.submit(_do_part, job, out, i) for i in todo}
      try:
        while waiting:
          done, waiting = concurrent.futures.wait(waiting, 0.5)
          bar.update(counter.value - bar.n)
          for future in done:
            future.result()
      except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError(
          "a worker process was killed (out of memory?); run the same command again to "
          "continue, with fewer --workers"
        ) from e
      finally:
        for future in waiting:
          future.cancel()
    bar.update(counter.value - bar.n)
  return counter.value


def _start_worker(counter) -> None:
  global _COUNTER
  _COUNTER = counter


def _do_part(job: Job, out: storage.Path, index: int) -> None:
  corpus = text_sources.open_corpus(job.source, job.data_dir or None)
  tokenizer = open_tokenizer(out)
  pending = 0

  def report(size: int) -> None:
    nonlocal pending
    pending += size
    if pending > 10**6:
      flush()

  def flush() -> None:
    nonlocal pending
    with _COUNTER.get_lock():
      _COUNTER.value += pending
    pending = 0

  split = store.Split(job.validation_fraction, corpus.num_documents)
  store.write_part(out, index, corpus.part(index, job.parts), tokenizer, split, report)
  flush()


def main(argv) -> None:
  cli.check(argv)
  out = storage.path(cli.required(_OUT))
  if _VERIFY.value:
    store.open_store(out, verify=True)
    print(f"{out}: every checksum is right")
    return
  if not _SOURCE.value:
    raise UserError("--source is missing; give text:GLOB, stdlib or tfds:NAME[/CONFIG]:FEATURE")
  store.check_fraction(_FRACTION.value, "--validation_fraction")
  workers = _WORKERS.value or runtime.cpu_count()
  corpus = text_sources.open_corpus(_SOURCE.value, _DATA_DIR.value or None)
  tokenizer = (
    open_tokenizer(_TOKENIZER.value).sha256
    if _TOKENIZER.value
    else f"{_TYPE.value}, {_VOCAB.value} pieces, {_SAMPLE.value} bytes"
  )
  job = Job(
    _SOURCE.value,
    _DATA_DIR.value or "",
    text_sources.corpus_key(corpus),
    _PARTS.value or _parts_before(out) or 4 * workers,
    _FRACTION.value,
    tokenizer,
  )
  made = prepare(
    corpus, job, out, workers, _TOKENIZER.value or "", _VOCAB.value, _TYPE.value, _SAMPLE.value
  )
  rows = [
    [
      split,
      f"{len(made.manifest['shards'][split])}",
      f"{made.total(split, 'documents'):,}",
      tables.si(made.total(split, "bytes"), "B"),
      f"{len(made.tokens[split]):,}",
    ]
    for split in store.SPLITS
  ]
  print(tables.table(["split", "shards", "documents", "text", "tokens"], rows))
  print(f"\ntrain on it with --config.data.source=tokens:{out}")


if __name__ == "__main__":
  _SOURCE = flags.DEFINE_string("source", None, "stdlib, text:GLOB or tfds:NAME[/CONFIG]:FEATURE.")
  _DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS datasets were prepared; gs:// with the extra gcs."
  )
  _OUT = flags.DEFINE_string("out", None, "Directory of the token store.")
  _TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "A SentencePiece .model, a tokenizer.json, or a directory with one of them; else one is "
    "trained.",
  )
  _VOCAB = flags.DEFINE_integer(
    "vocab_size", 256_000, "Pieces of a trained tokenizer.", lower_bound=2
  )
  _TYPE = flags.DEFINE_string("tokenizer_type", "unigram", "bpe or unigram.")
  _SAMPLE = flags.DEFINE_integer(
    "tokenizer_sample_bytes",
    10**9,
    "Text to train it on; bounds its memory, at about 20 times this for unigram.",
    lower_bound=1,
  )
  _WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0 is one per CPU.", lower_bound=0)
  _PARTS = flags.DEFINE_integer(
    "parts",
    0,
    "Pieces of work, and shards per split; 0 is 4 per "
    "worker. What a kill can lose is the part each worker is at.",
    lower_bound=0,
  )
  _FRACTION = flags.DEFINE_float("validation_fraction", 0.001, "Share of documents held out.")
  _VERIFY = flags.DEFINE_bool("verify", False, "Only read --out and compare every checksum.")
  cli.run(main)
