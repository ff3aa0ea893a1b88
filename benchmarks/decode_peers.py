"""Tokens per second of every size in llama.cpp and here, one sequence at a time.

  pip install -e '.[gguf]'
  python benchmarks/decode_peers.py --threads=2

A model with random weights is exported to GGUF in float32; both decode greedily after the same
prompt, with a float32 cache, on the same CPUs and as many threads, in turn. A ratio is the median
of those taken in the same round. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import tempfile
import time

from absl import app, flags

_THREADS = flags.DEFINE_integer("threads", 2, "Threads, each on a CPU of its own.")
_D_MODEL = flags.DEFINE_integer("d_model", 256, "Residual width.")
_LAYERS = flags.DEFINE_integer("layers", 16, "Layers.")
_HEADS = flags.DEFINE_integer("heads", 16, "Attention heads.")
_VOCAB = flags.DEFINE_integer("vocab_size", 8192, "Rows of the embedding.")
_GATED = flags.DEFINE_bool("gated", False, "Gated silu (llama), or ungated relu2 (arcee).")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 16, "Tokens of the prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens decoded in a round.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds; all programs take their turn in each.")


def make_model():
  """A universal model with random weights and a small tokenizer."""
  import inspect

  import jax

  from matformer_jax.config import Execution, MatLMConfig
  from matformer_jax.data.tokenizer import train_tokenizer
  from matformer_jax.loading import LanguageModel
  from matformer_jax.models import matlm

  config = MatLMConfig(
    vocab_size=_VOCAB.value,
    num_layers=_LAYERS.value,
    d_model=_D_MODEL.value,
    num_heads=_HEADS.value,
    seq_len=_PROMPT.value + _TOKENS.value,
    activation="silu" if _GATED.value else "relu2",
    gated=_GATED.value,
    tied_head=False,  # as both read it: a row of the embedding, and all of the head
  )
  params = matlm.init_params(config, jax.random.key(0))
  tokenizer = train_tokenizer([inspect.getsource(inspect)], 512, "bpe", 10**6)
  execution = Execution.for_platform("cpu")
  return LanguageModel(params, config, 0, {}, pathlib.Path("random"), execution, tokenizer)


class Ours:
  """Decodes with one size, laid out as `generate` does."""

  def __init__(self, model, granularity):
    from matformer_jax import granularity as gran
    from matformer_jax.decoding.decode import Decoder
    from matformer_jax.models import slicing

    config = gran.submodel_config(model.config, granularity)
    self.decoder = Decoder(config, model.execution, gran.full(config))
    params = slicing.slice_params(model.params, model.config, granularity)
    self.weights = self.decoder.lay_out(params)

  def __call__(self, prompt) -> tuple[float, list[int]]:
    """(seconds, tokens)."""
    import jax

    state = self.decoder.prefill(self.weights, [prompt], _TOKENS.value, [0])
    state = jax.block_until_ready(self.decoder.advance(self.weights, state, 1))
    started = time.perf_counter()
    state = jax.block_until_ready(self.decoder.advance(self.weights, state, _TOKENS.value - 1))
    return time.perf_counter() - started, state.sequences()[0][len(prompt) :]


class LlamaCpp:
  """Decodes with an exported file, by the calls that a C program would make."""

  def __init__(self, file):
    import llama_cpp

    self.cpp = llama_cpp
    self.runtime = llama_cpp.Llama(
      str(file),
      n_ctx=_PROMPT.value + _TOKENS.value,
      n_threads=_THREADS.value,
      n_threads_batch=_THREADS.value,
      type_k=0,  # float32
      type_v=0,
      verbose=False,
    )

  def __call__(self, prompt) -> tuple[float, list[int]]:
    self.runtime.reset()
    self.runtime.eval(prompt)
    tokens = [self._best()]
    started = time.perf_counter()
    for _ in range(_TOKENS.value - 1):
      self.runtime.eval(tokens[-1:])
      tokens.append(self._best())
    return time.perf_counter() - started, tokens

  def _best(self) -> int:
    import numpy as np

    logits = self.cpp.llama_get_logits_ith(self.runtime.ctx, -1)
    return int(np.ctypeslib.as_array(logits, (_VOCAB.value,)).argmax())


def main(argv) -> None:
  del argv
  # Before JAX is imported: its threads are as many as the CPUs it may run on.
  cpus = sorted(os.sched_getaffinity(0))
  if len(cpus) < _THREADS.value:
    raise SystemExit(f"--threads={_THREADS.value}, and there are {len(cpus)} CPUs")
  os.sched_setaffinity(0, cpus[: _THREADS.value])
  os.environ["JAX_PLATFORMS"] = "cpu"
  from matformer_jax import export, runtime, tables
  from matformer_jax import granularity as gran

  runtime.keep_freed_memory()
  model = make_model()
  names = gran.names(model.config)
  prompt = list(range(5, 5 + _PROMPT.value))
  programs = {}
  with tempfile.TemporaryDirectory() as directory:
    for name in names:
      file = pathlib.Path(directory, f"{name}.gguf")
      export.export(model, name, "gguf", file)  # checks logits
      programs[name] = (LlamaCpp(file), Ours(model, gran.parse(name, model.config)))
  seconds = {name: ([], []) for name in names}
  same = dict.fromkeys(names, True)
  for i in range(_ROUNDS.value + 1):
    for name, pair in programs.items():
      texts = []
      for program, times in zip(pair, seconds[name]):
        taken, text = program(prompt)
        texts.append(text)
        if i:  # the first round compiles
          times.append(taken)
      same[name] &= texts[0] == texts[1]
  rows, results = [], {}
  for name, (theirs, ours) in seconds.items():
    counts = gran.count(model.config, name)
    read = 4 * (counts.non_embedding_params + _VOCAB.value * _D_MODEL.value)
    speeds = [(_TOKENS.value - 1) / statistics.median(times) for times in (theirs, ours)]
    ratio = statistics.median(a / b for a, b in zip(theirs, ours))
    bandwidth = read * speeds[1]
    results[name] = dict(llama_cpp=speeds[0], ours=speeds[1], ratio=ratio, same_text=same[name])
    rows.append(
      (
        name,
        f"{read / 1e6:.1f}",
        f"{speeds[0]:,.0f}",
        f"{speeds[1]:,.0f}",
        f"{ratio:.2f}",
        f"{bandwidth / 1e9:.1f}",
        "yes" if same[name] else "no",
      )
    )
  heads = ("size", "MB a token", "llama.cpp/s", "ours/s", "ours/theirs", "ours GB/s", "same text")
  print(f"{_THREADS.value} threads, d_model {_D_MODEL.value}, {_LAYERS.value} layers, float32")
  print(tables.table(heads, rows))
  print(json.dumps(results))


if __name__ == "__main__":
  app.run(main)
