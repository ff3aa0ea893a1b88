"""Measures granularities of a trained model on its validation data.

  python -m matformer_jax.evaluate --workdir=runs/quickstart --granularities=S,M,"M*2+L*2",XL
"""

from __future__ import annotations

import json
import pathlib
from typing import Sequence

from absl import flags
import numpy as np
import tqdm

from matformer_jax import cli, runtime, tables
from matformer_jax import granularity as gran
from matformer_jax.config import ModelConfig
from matformer_jax.data import text
from matformer_jax.data.store import TokenStore
from matformer_jax.errors import UserError
from matformer_jax.evals import lm
from matformer_jax.evals.bigram import bigram_loss
from matformer_jax.loading import Model, load


def validation_store(model: Model) -> TokenStore:
  """The token store the model was trained with, remade from its source if need be.

  Raises:
    UserError: if the source no longer gives the same tokens.
  """
  data = model.card["config"]["data"]
  store = text.open_source(data["source"], data["data_dir"] or None, lambda corpus: model.tokenizer,
                           data["validation_fraction"], data["cache_dir"] or None)[0]
  if store.fingerprint != model.card["identity"]["tokens"]:
    raise UserError(f"data.source={data['source']!r} no longer gives the tokens this model was "
                    "trained on (another version of the corpus?); evaluate where it was trained")
  return store


def evaluate(model: Model, store: TokenStore, granularities: Sequence[gran.Granularity],
             consistency: bool, max_batches: int = 0, batch_size: int = 16) -> list[lm.Result]:
  """Measures `granularities` on whole validation windows, in order.

  Args:
    max_batches: 0 measures every full batch.
  """
  tokens = store.tokens["validation"]
  windows = text.Windows(tokens, model.config.seq_len, 1, None)
  batch_size = min(batch_size, windows.num_windows)
  windows = text.Windows(tokens, model.config.seq_len, batch_size, None)
  batches = windows.num_windows // batch_size
  batches = min(batches, max_batches) if max_batches else batches
  with tqdm.tqdm(total=batches, desc="evaluating", unit="batch", mininterval=1.0) as bar:
    return lm.evaluate(model.config, model.execution, model.params, granularities,
                       map(windows.batch, range(batches)), consistency,
                       progress=lambda n: bar.update())


def ladder(config: ModelConfig, points: int) -> list[gran.Granularity]:
  """About `points` granularities spread over the Mix'n'Match ladder, S and XL included."""
  rungs = gran.mix_n_match_ladder(config)
  picks = sorted({round(i) for i in np.linspace(0, len(rungs) - 1, max(points, 2))})
  return [rungs[i] for i in picks]


def plot(model: Model, results: Sequence[lm.Result], path: str, baseline: float | None) -> None:
  """Validation loss against parameters: explicit sizes, Mix'n'Match, the bigram baseline."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  sizes = [gran.count(model.config, r.granularity).params / 1e6 for r in results]
  explicit = {gran.to_text(g, model.config) for g in gran.uniform(model.config)}
  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  curve = sorted(zip(sizes, (r.loss for r in results)))
  axes.plot(*zip(*curve), color="0.75", zorder=1)
  for names, marker, size, label in ((explicit, "o", 70, "trained granularity"),
                                     (None, "D", 30, "Mix'n'Match, never trained")):
    chosen = [(s, r) for s, r in zip(sizes, results)
              if (r.granularity in explicit) == (names is not None)]
    if chosen:
      axes.scatter([s for s, _ in chosen], [r.loss for _, r in chosen], marker=marker, s=size,
                   label=label, zorder=2)
    for s, r in chosen if names else ():
      axes.annotate(r.granularity, (s, r.loss), textcoords="offset points", xytext=(7, 6))
  axes.set(xlabel="parameters (million)", ylabel="validation loss (nats per token)",
           title=f"One universal checkpoint, every size ({model.workdir.name}, step {model.step:,})")
  if baseline is not None:
    axes.text(0.99, 0.97, f"bigram baseline: {baseline:.3f}", transform=axes.transAxes,
              ha="right", va="top", color="0.4")
  axes.margins(0.06, 0.1)
  axes.grid(alpha=0.3)
  axes.legend(loc="lower left")
  figure.savefig(path, dpi=140)
  plt.close(figure)


def report(model: Model, results: Sequence[lm.Result], metrics: Sequence[str],
           baseline: float | None) -> str:
  """The table a person reads."""
  full = gran.to_text(gran.full(model.config), model.config)
  header = ["granularity", "parameters", "FLOPs/token"]
  header += ["loss", "perplexity"] if "loss" in metrics else []
  header += [f"agrees with {full}"] if "agreement" in metrics else []
  header += [f"KL from {full}"] if "kl" in metrics else []
  rows = []
  for r in results:
    n = gran.count(model.config, r.granularity)
    row = [r.granularity, f"{n.params:,}", tables.si(n.flops_per_token)]
    row += [f"{r.loss:.4f}", f"{r.perplexity:.2f}"] if "loss" in metrics else []
    row += [f"{100 * r.agreement:.1f}%"] if "agreement" in metrics else []
    row += [f"{r.kl:.4f}"] if "kl" in metrics else []
    rows.append(row)
  if baseline is not None:
    row = ["bigram baseline", "", "", f"{baseline:.4f}", f"{np.exp(baseline):.2f}"]
    rows.append(row + [""] * (len(header) - len(row)))
  return tables.table(header, rows)


def main(argv) -> None:
  cli.check(argv, workdir=_WORKDIR.value)
  unknown = set(_METRICS.value) - set(lm.METRICS)
  if unknown or not _METRICS.value:
    raise UserError(f"--metrics={','.join(_METRICS.value)!r}: choose among {','.join(lm.METRICS)}")
  if (_BIGRAM.value or _PLOT.value) and "loss" not in _METRICS.value:
    raise UserError("--bigram and --plot show the loss; add it to --metrics")
  runtime.enable_compilation_cache()
  model = load(_WORKDIR.value, _STEP.value)
  if _GRANULARITIES.value:
    chosen = [gran.parse(g, model.config) for g in _GRANULARITIES.value]
  else:
    chosen = gran.uniform(model.config)
  if _LADDER.value:
    chosen += ladder(model.config, _LADDER.value)
  chosen = sorted(dict.fromkeys(chosen), key=lambda g: gran.count(model.config, g).params)
  store = validation_store(model)
  consistency = bool({"agreement", "kl"} & set(_METRICS.value))
  results = evaluate(model, store, chosen, consistency, _BATCHES.value, _BATCH_SIZE.value)
  baseline = None
  if _BIGRAM.value:
    measured = store.tokens["validation"][:results[0].tokens + 1]  # the same predictions
    baseline = bigram_loss(store.tokens["train"], measured, model.config.vocab_size)
  print(f"{model.workdir}, step {model.step:,}, {results[0].tokens:,} validation tokens\n")
  print(report(model, results, _METRICS.value, baseline))
  if _PLOT.value:
    plot(model, results, _PLOT.value, baseline)
    print(f"\nwrote {_PLOT.value}")
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(
        as_json(model, results, _METRICS.value, baseline), indent=1))
    print(f"wrote {_JSON.value}")


def as_json(model: Model, results: Sequence[lm.Result], metrics: Sequence[str],
            baseline: float | None) -> dict:
  """{"granularities": {"S": {"params", "flops_per_token", "loss", ...}}, ...}."""
  rows = {}
  for r in results:
    n = gran.count(model.config, r.granularity)
    row = {"params": n.params, "non_embedding_params": n.non_embedding_params,
           "flops_per_token": n.flops_per_token}
    if "loss" in metrics:
      row |= {"loss": r.loss, "perplexity": r.perplexity}
    row |= {name: getattr(r, name) for name in ("agreement", "kl") if name in metrics}
    rows[r.granularity] = row
  return {"workdir": str(model.workdir), "step": model.step, "tokens": results[0].tokens,
          "bigram_loss": baseline, "granularities": rows}


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
  _STEP = flags.DEFINE_integer("step", None, "Checkpoint; default the newest that verifies.")
  _GRANULARITIES = flags.DEFINE_list(
      "granularities", [], "What to measure, e.g. S,M,'M*2+L*2',XL; default the trained sizes.")
  _LADDER = flags.DEFINE_integer("ladder", 0, "Also measure this many Mix'n'Match models.",
                                 lower_bound=0)
  _METRICS = flags.DEFINE_list("metrics", list(lm.METRICS), "Any of " + ",".join(lm.METRICS) +
                               ". Agreement and KL are against the full model.")
  _BATCHES = flags.DEFINE_integer("batches", 0, "Validation batches; 0 is all.", lower_bound=0)
  _BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Windows per batch.", lower_bound=1)
  _BIGRAM = flags.DEFINE_bool("bigram", False, "Also show a bigram baseline.")
  _PLOT = flags.DEFINE_string("plot", None, "Write a PNG of loss against parameters.")
  _JSON = flags.DEFINE_string("json", None, "Write the results to this file.")
  cli.run(main)
