"""What speculative decoding gains, and where it loses, against plain decoding.

  make quickstart
  python benchmarks/speculative.py --workdir=runs/quickstart

Greedy decoding with XL as the verifier, for every draft size and draft length: acceptance
rate, tokens per verifier pass, wall-clock speed-up over plain decoding of the same
tokens, and the speed-up predicted from acceptance a and measured cost ratio c,
(1 - a^(k+1)) / ((1 - a)(k c + 1)). Then the three rows of Table 2 (a draft trained on
its own, the MatLM draft, the MatLM draft on the shared cache), draft lengths chosen
while decoding, and draft heads over the most frequent tokens. Times are the fastest of
several runs taken in turn. The last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
import time

from absl import app, flags, logging
import jax
import numpy as np

import matformer_jax
from matformer_jax import granularity as gran
from matformer_jax import runtime, tables, train
from matformer_jax.decoding.decode import Decoder, Sampling
from matformer_jax.decoding.speculative import (
  AUTO_DRAFT_LENGTHS,
  SpeculativeDecoder,
  forced,
  frequent_tokens,
  predicted_speedup,
)
from matformer_jax.loading import open_task

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "A trained model.")
_BASELINE = flags.DEFINE_string(
  "baseline",
  None,
  "A model of S's width trained on its own, on the "
  "same data; default trains one for a quarter of the steps, its "
  "share of the tokens (Appendix B.4).",
)
_BATCHES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Sequences decoded together.")
_LENGTHS = flags.DEFINE_list("draft_lengths", list("12345678"), "Draft lengths k.")
_DRAFT_VOCABS = flags.DEFINE_list("draft_vocabs", ["1024", "4096"], "Sizes of the draft's head.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens decoded per sequence.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 48, "Tokens per prompt, from validation data.")
_REPS = flags.DEFINE_integer("reps", 5, "Runs of every program; the fastest counts.")


@dataclasses.dataclass
class Run:
  """A way of decoding the prompts, timed from the filled cache to the last token."""

  decoder: Decoder | SpeculativeDecoder
  weights: tuple
  prompts: list
  costs: list | None = None
  best: float = float("inf")
  stats: object = None
  sequences: list | None = None

  def __call__(self) -> None:
    request = (self.prompts, _TOKENS.value, range(len(self.prompts)))
    state = jax.block_until_ready(self.decoder.prefill(*self.weights, *request))
    started = time.perf_counter()
    if isinstance(self.decoder, Decoder):
      state = self.decoder.advance(*self.weights, state, _TOKENS.value)
    else:
      state, self.stats = self.decoder.advance(
        *self.weights, state, _TOKENS.value, costs=self.costs
      )
    jax.block_until_ready(state)
    self.best = min(self.best, time.perf_counter() - started)
    self.sequences = state.sequences()


def measure(runs: list[Run]) -> None:
  for run in runs:
    run()  # compiles
    run.best = float("inf")
  for _ in range(_REPS.value):
    for run in runs:
      run()


def round_costs(run: Run) -> list[float]:
  """Seconds of a round at each draft length that `run` can choose."""
  lengths = run.decoder.draft_lengths
  trials = [dataclasses.replace(run, costs=forced(i, len(lengths))) for i in range(len(lengths))]
  measure(trials)
  return [t.best / float(t.stats.rounds.max()) for t in trials]


def train_baseline(model, directory: str) -> str:
  """A dense model of S's width, trained like `model` on its share of the tokens."""
  import ml_collections

  config = ml_collections.ConfigDict(model.card["config"])
  config.model.ffn_ratios = tuple(model.config.ffn_ratios[:1])
  config.model.head_ratios = (1.0,)
  config.model.runs = None
  config.sampling = "uniform"
  config.data.tokenizer = str(model.workdir)
  config.steps //= model.config.num_granularities
  train.train(config, directory)
  return directory


def benchmark(model, baseline, store, batch: int) -> dict:
  config, eos = model.config, -1  # never ends early: every run decodes the same number of tokens
  tokens = np.asarray(store.tokens["validation"])
  starts = np.linspace(0, len(tokens) - _PROMPT.value, batch + 2)[1:-1].astype(int)
  prompts = [tokens[i : i + _PROMPT.value].tolist() for i in starts]
  decoder = lambda name, sampling=Sampling(): Decoder(
    config, model.execution, gran.parse(name, config), sampling, eos
  )
  xl = decoder("XL")
  weights = xl.lay_out(model.params)
  plain = {name: Run(decoder(name), (weights,), prompts) for name in ("S", "M", "L", "XL")}
  lengths = [int(k) for k in _LENGTHS.value]
  speculate = lambda draft, k, **kw: Run(
    SpeculativeDecoder(xl, draft, k, **kw), (weights, weights), prompts
  )
  grid = {(name, k): speculate(decoder(name), (k,)) for name in ("S", "M", "L") for k in lengths}
  print(f"\nbatch {batch}: compiling and measuring {len(grid) + 4} programs", flush=True)
  measure([*plain.values(), *grid.values()])
  base = plain["XL"]
  speedup = lambda run: base.best / run.best
  results = {
    "plain_ms_per_token": {n: 1e3 * r.best / _TOKENS.value for n, r in plain.items()},
    "grid": [],
  }
  rows = []
  for (name, k), run in grid.items():
    a, c = run.stats.acceptance(), plain[name].best / base.best
    predicted = predicted_speedup(a, k, c)
    same = run.sequences == base.sequences
    rows.append(
      (
        name,
        str(k),
        f"{a:.3f}",
        f"{run.stats.tokens_per_round():.2f}",
        f"{c:.2f}",
        f"{predicted:.2f}x",
        f"{speedup(run):.2f}x",
        "slower" if run.best > base.best else "",
        "yes" if same else "NO",
      )
    )
    results["grid"].append(
      {
        "draft": name,
        "k": k,
        "acceptance": a,
        "cost_ratio": c,
        "tokens_per_round": run.stats.tokens_per_round(),
        "predicted_speedup": predicted,
        "speedup": speedup(run),
        "equals_plain": same,
      }
    )
  print(f"\nBatch {batch}, plain XL {1e3 * base.best / _TOKENS.value:.3f} ms per step\n")
  print(
    tables.table(
      ("draft", "k", "accepted", "tokens/pass", "c", "predicted", "speed-up", "", "same text"), rows
    ),
    flush=True,
  )

  # Table 2's rows, at the draft length that suits S best here; greedy and sampled.
  k = max(lengths, key=lambda k: speedup(grid["S", k]))
  s = decoder("S")
  own = Decoder(baseline.config, model.execution, gran.full(baseline.config), eos_id=eos)
  own_weights = own.lay_out(baseline.params)
  variants = {}
  for temperature in (0.0, 1.0):
    sampling = Sampling(temperature)
    v, d, o = (dataclasses.replace(x, sampling=sampling) for x in (xl, s, own))
    label = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    variants[f"plain XL, {label}"] = Run(v, (weights,), prompts)
    variants[f"S trained on its own, {label}"] = Run(
      SpeculativeDecoder(v, o, (k,), False), (weights, own_weights), prompts
    )
    variants[f"MatLM S, {label}"] = Run(
      SpeculativeDecoder(v, d, (k,), False), (weights, weights), prompts
    )
    variants[f"MatLM S, shared cache, {label}"] = Run(
      SpeculativeDecoder(v, d, (k,)), (weights, weights), prompts
    )
  chosen = speculate(s, AUTO_DRAFT_LENGTHS)
  variants["MatLM S, k chosen, greedy"] = dataclasses.replace(chosen, costs=round_costs(chosen))
  for size in map(int, _DRAFT_VOCABS.value):
    if size < config.vocab_size:
      frequent = frequent_tokens(store.tokens["train"], size)
      variants[f"MatLM S, head of {size}, greedy"] = speculate(s, (k,), draft_vocab=frequent)
      chosen = speculate(s, AUTO_DRAFT_LENGTHS, draft_vocab=frequent)
      variants[f"MatLM S, head of {size}, k chosen, greedy"] = dataclasses.replace(
        chosen, costs=round_costs(chosen)
      )
  measure(list(variants.values()))
  rows, results["variants"] = [], {}
  reference = {}
  for label, run in variants.items():
    mode = label.rpartition(", ")[2]
    if run.stats is None:
      reference[mode] = run
      continue
    gain = reference[mode].best / run.best
    rows.append(
      (
        label,
        f"{run.stats.acceptance():.3f}",
        f"{run.stats.tokens_per_round():.2f}",
        f"{gain:.2f}x",
      )
    )
    results["variants"][label] = {
      "acceptance": run.stats.acceptance(),
      "speedup": gain,
      "tokens_per_round": run.stats.tokens_per_round(),
    }
  print(f"\nBatch {batch}, k = {k}\n")
  print(tables.table(("draft", "accepted", "tokens/pass", "speed-up"), rows), flush=True)
  return results


def main(argv) -> None:
  runtime.keep_freed_memory()
  logging.set_verbosity(logging.ERROR)
  runtime.enable_compilation_cache()
  model = matformer_jax.load(_WORKDIR.value)
  store = open_task(model).store
  with tempfile.TemporaryDirectory() as directory:
    baseline = matformer_jax.load(_BASELINE.value or train_baseline(model, directory))
    results = {f"batch_{b}": benchmark(model, baseline, store, int(b)) for b in _BATCHES.value}
  print(json.dumps({"workdir": str(pathlib.Path(_WORKDIR.value)), **results}))


if __name__ == "__main__":
  app.run(main)
