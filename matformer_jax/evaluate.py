"""Measures granularities of a trained model on its validation data.

python -m matformer_jax.evaluate --workdir=runs/quickstart --granularities=S,M,"M*2+L*2",XL
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

from absl import flags
import numpy as np
import tqdm

from matformer_jax import cli, plots, runtime, storage, tables
from matformer_jax import granularity as gran
from matformer_jax.errors import UserError
from matformer_jax.evals import Result, lm
from matformer_jax.evals.bigram import bigram_losses
from matformer_jax.loading import Model, load, open_task
from matformer_jax.tasks import Task
from matformer_jax.tasks.language import LanguageModeling


def evaluate(
  model: Model,
  task: Task,
  granularities: Sequence[gran.Granularity],
  consistency: bool,
  batches: int | None = None,
  batch_size: int | None = None,
) -> list[Result]:
  """Measures `granularities` on a sample of the validation data.

  Args:
    batches, batch_size: see `Task.evaluate`; by default what training measures.
  """
  on_this_device = lambda read, size: read(range(size))
  # Every size is compiled when it meets the first batch.
  with tqdm.tqdm(desc="compiling", unit="batch", mininterval=1.0) as bar:

    def progress(done, total):
      bar.set_description("evaluating", refresh=False)
      bar.total = total
      bar.update(done - bar.n)

    results = task.evaluate(
      model.execution,
      model.params,
      on_this_device,
      granularities,
      consistency=consistency,
      batches=batches,
      batch_size=batch_size,
      progress=progress,
    )
  assert results is not None  # nothing stops it
  return results


# What may be measured -> (column, format); {full} is the largest granularity.
COLUMNS = {
  "loss": ("loss", ".4f"),
  "perplexity": ("perplexity", ".2f"),
  "bits_per_byte": ("bits/byte", ".4f"),
  "accuracy": ("top-1", ".2%"),
  "agreement": ("agrees with {full}", ".1%"),
  "kl": ("KL from {full}", ".4f"),
}


def plot(model: Model, results: Sequence[Result], path: str, baseline: Result | None) -> None:
  """Accuracy, or else loss, against parameters: explicit sizes, Mix'n'Match, a baseline."""
  sizes = [gran.count(model.config, r.granularity).params / 1e6 for r in results]
  explicit = {gran.to_text(g, model.config) for g in gran.trained(model.config)}
  metric, label = (
    ("accuracy", "top-1 accuracy (%)")
    if "accuracy" in results[0].metrics
    else ("loss", "validation loss (nats per token)")
  )
  scale = 100 if metric == "accuracy" else 1
  values = [r.metrics[metric] * scale for r in results]
  errors = [r.metrics.get(f"{metric}_stderr", 0.0) * scale for r in results]
  with plots.figure(path) as axes:
    curve = sorted(zip(sizes, values, errors))
    x, y, error = zip(*curve)
    axes.errorbar(x, y, error, color="0.75", capsize=2, zorder=1)
    if metric == "loss":
      first = results[0].metrics
      plots.bits_per_byte_axis(axes, first["bits_per_byte"] / first["loss"])
    for names, marker, size, kind in (
      (explicit, "o", 70, "trained granularity" if model.step else "granularity, not trained yet"),
      (None, "D", 30, "Mix'n'Match, never trained"),
    ):
      chosen = [
        (s, v, r.granularity)
        for s, v, r in zip(sizes, values, results)
        if (r.granularity in explicit) == (names is not None)
      ]
      if chosen:
        axes.scatter(
          [s for s, _, _ in chosen],
          [v for _, v, _ in chosen],
          marker=marker,
          s=size,
          label=kind,
          zorder=2,
        )
      for s, v, name in chosen if names else ():
        axes.annotate(name, (s, v), textcoords="offset points", xytext=(7, 6))
    axes.set(
      xlabel="parameters (million)",
      ylabel=label,
      title=f"One universal checkpoint, every size ({model.workdir.name}, step {model.step:,})",
    )
    if baseline is not None:
      axes.text(
        0.99,
        0.97,
        f"bigram baseline: {baseline.metrics['loss']:.3f}",
        transform=axes.transAxes,
        ha="right",
        va="top",
        color="0.4",
      )
    axes.margins(0.06, 0.1)
    axes.legend(loc="lower right" if metric == "accuracy" else "lower left")


def results_table(model: Model, results: Sequence[Result], baseline: Result | None) -> str:
  """The table a person reads."""
  full = gran.to_text(gran.full(model.config), model.config)
  shown = [name for name in COLUMNS if name in results[0].metrics]
  header = ["granularity", "parameters", f"FLOPs/{model.config.unit}"]
  header += [COLUMNS[name][0].format(full=full) for name in shown]
  rows = []
  for r in results:
    n = gran.count(model.config, r.granularity)
    rows.append(
      [r.granularity, f"{n.params:,}", tables.si(n.flops)] + [_cell(r, name) for name in shown]
    )
  if baseline is not None:
    rows.append([baseline.granularity, "", ""] + [_cell(baseline, name) for name in shown])
  return tables.table(header, rows)


def _cell(result: Result, name: str) -> str:
  """A number with its standard error, where known; empty where not measured."""
  if name not in result.metrics:
    return ""
  numbers = [result.metrics[n] for n in (name, f"{name}_stderr") if n in result.metrics]
  return " ± ".join(format(x, COLUMNS[name][1]) for x in numbers)


def bigram_baseline(task: LanguageModeling, batches: int | None, batch_size: int | None) -> Result:
  """A bigram table of the training text, on the predictions that `evaluate` measures."""
  windows = task.validation.read(task.sample(batches, batch_size)[0])
  train = np.asarray(task.store.tokens["train"])
  nll = bigram_losses(train, windows["tokens"], task.model_config.vocab_size)
  metrics = lm.of_text(nll, windows["bytes"], task.model_config.seq_len)
  return Result("bigram baseline", windows["tokens"][:, 1:].size, metrics)


def only(results: Sequence[Result], metrics: Sequence[str]) -> list[Result]:
  """Results with these metrics and their errors; perplexity and bits go with the loss."""
  wanted = {*metrics, *(f"{name}_stderr" for name in metrics)}
  wanted |= {"perplexity", "bits_per_byte"} if "loss" in metrics else set()
  return [
    dataclasses.replace(r, metrics={k: v for k, v in r.metrics.items() if k in wanted})
    for r in results
  ]


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  runtime.enable_compilation_cache()
  model = load(workdir, _STEP.value)
  task = open_task(model, _SOURCE.value)
  metrics = _METRICS.value or task.metrics
  if set(metrics) - set(task.metrics):
    raise UserError(f"--metrics={','.join(metrics)!r}: choose among {','.join(task.metrics)}")
  if (_BIGRAM.value or _PLOT.value) and task.headline not in metrics:
    raise UserError(f"--bigram and --plot show the {task.headline}; add it to --metrics")
  if _BIGRAM.value and not isinstance(task, LanguageModeling):
    raise UserError("--bigram is a baseline of language models")
  if _GRANULARITIES.value:
    chosen = [gran.parse(g, model.config) for g in _GRANULARITIES.value]
  else:
    chosen = gran.trained(model.config)
  if _LADDER.value:
    chosen += gran.ladder_points(model.config, _LADDER.value)
  chosen = sorted(dict.fromkeys(chosen), key=lambda g: gran.count(model.config, g).params)
  consistency = bool({"agreement", "kl"} & set(metrics))
  results = evaluate(model, task, chosen, consistency, _BATCHES.value, _BATCH_SIZE.value)
  results = only(results, metrics)
  baseline = None
  if _BIGRAM.value and isinstance(task, LanguageModeling):
    baseline = bigram_baseline(task, _BATCHES.value, _BATCH_SIZE.value)
  print(
    f"{model.workdir}, step {model.step:,}, {results[0].examples:,} validation "
    f"{model.config.unit}s{f' of {_SOURCE.value}' if _SOURCE.value else ''}\n"
  )
  print(results_table(model, results, baseline))
  if _PLOT.value:
    plot(model, results, _PLOT.value, baseline)
    print(f"\nwrote {_PLOT.value}")
  if _JSON.value:
    storage.path(_JSON.value).write_text(
      runtime.to_json(as_json(model, results, baseline, _SOURCE.value), 1)
    )
    print(f"wrote {_JSON.value}")


def as_json(
  model: Model,
  results: Sequence[Result],
  baseline: Result | None,
  source: str | None = None,
) -> dict:
  """{"granularities": {"S": {"params", "flops_per_token", "loss", ...}}, ...}.

  Args:
    source: of the data, where it is not that of the training.
  """
  rows = {}
  for r in results:
    n = gran.count(model.config, r.granularity)
    rows[r.granularity] = {
      "params": n.params,
      "non_embedding_params": n.non_embedding_params,
      f"flops_per_{model.config.unit}": n.flops,
      **r.metrics,
    }
  return {
    "workdir": str(model.workdir),
    "step": model.step,
    "source": source or model.card["config"]["data"]["source"],
    f"{model.config.unit}s": results[0].examples,
    "bigram": None if baseline is None else baseline.metrics,
    "granularities": rows,
  }


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
  _STEP = cli.define_step()
  _SOURCE = cli.define_source()
  _GRANULARITIES = flags.DEFINE_list(
    "granularities", [], "What to measure, e.g. S,M,'M*2+L*2',XL; default the trained sizes."
  )
  _LADDER = flags.DEFINE_integer(
    "ladder", 0, "Also measure this many Mix'n'Match models.", lower_bound=0
  )
  _METRICS = flags.DEFINE_list(
    "metrics",
    [],
    "Any of loss, agreement, kl and, of images, "
    "accuracy; default all. Agreement and KL are against the full model.",
  )
  _BATCHES, _BATCH_SIZE = cli.define_sample()
  _BIGRAM = flags.DEFINE_bool("bigram", False, "Also show a bigram baseline.")
  _PLOT = flags.DEFINE_string("plot", None, "Write a PNG of loss or accuracy against parameters.")
  _JSON = flags.DEFINE_string("json", None, "Write the results to this file.")
  cli.run(main)
