"""Can data keep up: tokenising, and reading batches of a token store.

  python benchmarks/data.py

Text is the Python standard library's sources. Rates are of one process and one core, best of
several; the last line is one JSON object. Takes about 2 minutes.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import time

from absl import app, flags
import numpy as np

from matformer_jax import tables
from matformer_jax.data import prepare, store, text_sources
from matformer_jax.data.batches import Windows
from matformer_jax.data.tokenizer import train_tokenizer

_REPS = flags.DEFINE_integer("reps", 3, "Repetitions; the fastest counts.")
_VOCABS = flags.DEFINE_multi_integer("vocab", [2048, 16_000], "Vocabulary sizes.")
_BATCHES = ((16, 128), (4, 1024), (64, 1024))  # rows of one host, tokens


def fastest(f, reps: int) -> float:
  times = []
  for _ in range(reps):
    started = time.perf_counter()
    f()
    times.append(time.perf_counter() - started)
  return min(times)


def main(argv) -> None:
  corpus = text_sources.open_corpus("stdlib")
  documents = list(corpus.documents())
  split = store.Split(0.05, len(documents))
  size = sum(len(d.encode("utf-8", "replace")) for d in documents)
  result = {"tokenise_MB_per_s": {}, "read_tokens_per_s": {}}
  rows = []
  with tempfile.TemporaryDirectory() as directory:
    for vocab in _VOCABS.value:
      for kind in ("bpe", "unigram"):
        tokenizer = train_tokenizer(documents, vocab, kind, 10**7)
        path = pathlib.Path(directory) / f"{kind}{vocab}"
        path.mkdir()
        part = iter(range(_REPS.value))
        seconds = fastest(
          lambda: store.write_part(path, next(part), enumerate(documents), tokenizer, split),
          _REPS.value,
        )
        rate = size / seconds
        result["tokenise_MB_per_s"][f"{kind} {vocab}"] = rate / 1e6
        rows.append(
          [
            f"{kind}, {vocab:,} pieces",
            f"{rate / 1e6:.2f}",
            *(f"{prepare.C4_BYTES / rate / cores / 3600:,.1f}" for cores in (16, 64, 256)),
          ]
        )
    print(tables.table(["tokeniser", "MB/s a core", "c4/en, hours on 16 cores", "64", "256"], rows))
    tokens = store.Tokens(
      [
        np.fromfile(path / f"train-{i:05d}.bin", store.token_dtype(tokenizer))
        for i in range(_REPS.value)
      ],
      store.token_dtype(tokenizer),
    )
  rows = []
  for batch, length in _BATCHES:
    windows = Windows(tokens, length, batch, seed=0)
    steps = 50
    seconds = fastest(lambda: [windows.batch(i) for i in range(steps)], _REPS.value)
    rate = steps * batch * length / seconds
    result["read_tokens_per_s"][f"{batch}x{length}"] = rate
    rows.append([f"{batch} x {length}", tables.si(rate)])
  print("\n" + tables.table(["rows x tokens of a host", "tokens/s read"], rows))
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
