"""Scores many submodels on validation data: Mix'n'Match against other shapes and random mixes.

  python -m matformer_jax.search --workdir=runs/quickstart --budgets=0.55x,0.65x,0.75x,0.85x
  python -m matformer_jax.search --workdir=runs/quickstart --budgets=0.6x,0.8x --nas=300

With --nas also against architecture search: so many random architectures are measured, on other
windows, a predictor of their losses is trained, and evolution asks it for the best within each
budget (Appendix D.2).

One compiled program scores every configuration, on the same windows, so differences
between them are measured far better than each loss alone; both come with standard
errors. Writes search.csv, search.json and search.png.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import pathlib
import time

from absl import flags
import jax
import numpy as np
import tqdm

from matformer_jax import cli, plots, runtime, storage, tables
from matformer_jax import granularity as gran
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.errors import UserError
from matformer_jax.evals import latency, nas, stderr
from matformer_jax.loading import LanguageModel, load, open_task
from matformer_jax.models import dynamic, losses
from matformer_jax.tasks.language import LanguageModeling

CONFIGS_PER_CALL = 16
MIX_N_MATCH = gran.SHAPES[0]  # "increasing"
NAS, MEASURED = "nas", "best measured"  # by evolution; of the architectures it learned from


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A configuration to score.

  Attributes:
    granularity: the submodel; heads follow the FFNs where they are nested.
    kind: "trained", one of gran.SHAPES ("increasing" is Mix'n'Match), "random", NAS or MEASURED.
    budget: the budget's text it was made for, "" for none.
  """

  granularity: gran.Granularity
  kind: str
  budget: str


def score(
  config: MatLMConfig,
  execution: Execution,
  params,
  granularities: Sequence[gran.Granularity],
  batches: Sequence[Mapping[str, np.ndarray]],
) -> np.ndarray:
  """Losses [configurations, windows] in nats per token, with one program for all.

  Args:
    params: the stored parameters.
    batches: as `ValidationWindows.read` gives them, all of one shape.
  """
  counted = np.concatenate([batch["weight"] for batch in batches]) > 0
  indices = np.stack([dynamic.layer_indices(g) for g in granularities])
  padding = -len(indices) % CONFIGS_PER_CALL
  padded = np.concatenate([indices, np.repeat(indices[-1:], padding, axis=0)])
  calls = padded.reshape(-1, CONFIGS_PER_CALL, config.num_layers)
  result = []
  with tqdm.tqdm(
    total=len(calls) * len(batches),
    desc=f"scoring {len(indices)} models",
    unit="batch",
    mininterval=1.0,
  ) as bar:
    for call in calls:
      rows = []
      for batch in batches:
        rows.append(np.asarray(_window_losses(params, batch, call, config, execution)))
        bar.update()
      result.append(np.concatenate(rows, axis=1))
  return np.concatenate(result)[: len(indices), counted]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _window_losses(params, batch, indices, config: MatLMConfig, execution: Execution):
  """[C, B] mean loss of every window under every configuration."""
  targets = batch["tokens"][:, 1:]
  segments = {"segments_BxT": batch["segments"]} if "segments" in batch else {}
  chunks = losses.num_chunks((1, targets.shape[1]), config.vocab_size, execution)

  def one(layer_indices):
    hidden, embedding = dynamic.apply_dynamic(
      params,
      batch["tokens"][:, :-1],
      layer_indices,
      config=config,
      execution=execution,
      return_hidden=True,
      **segments,
    )
    window = lambda xy: losses.chunked_cross_entropy(xy[0][None], embedding, xy[1][None], chunks)[1]
    return jax.lax.map(window, (hidden, targets))

  return jax.lax.map(one, indices)


def candidates(
  config: MatLMConfig, budgets: Sequence[str], random: int, seed: int, rungs: int, profile=None
) -> list[Candidate]:
  """Trained sizes, the Mix'n'Match ladder, and per budget every shape and random mixes.

  Args:
    random: random mixes per budget, each using the budget as fully as it can.
    seed: of the random mixes.
    rungs: about how many of the ladder's.
  """
  found = [Candidate(g, "trained", "") for g in gran.trained(config)]
  found += [Candidate(g, MIX_N_MATCH, "") for g in gran.ladder_points(config, rungs)]
  rng = np.random.default_rng(seed)
  for budget in budgets:
    choose = functools.partial(gran.mix_n_match, config, budget, profile=profile)
    found += [Candidate(choose(shape=shape), shape, budget) for shape in gran.SHAPES]
    limit = gran.count(config, choose()).params
    found += [Candidate(g, "random", budget) for g in _random_mixes(config, limit, random, rng)]
  return found


def _random_mixes(
  config: MatLMConfig, limit: int, number: int, rng: np.random.Generator
) -> list[gran.Granularity]:
  """Distinct mixes of at most `limit` parameters that no layer can be raised in."""
  top = gran.full(config)
  g = config.num_granularities
  chosen: dict[gran.Granularity, None] = {}
  for _ in range(20 * number):
    if len(chosen) == number:
      break
    layers = [0] * config.num_layers
    # Raise layers at random, by one size, while any fits.
    open_layers = list(range(config.num_layers))
    while open_layers:
      layer = open_layers[rng.integers(len(open_layers))]
      raised = [size + (i == layer) for i, size in enumerate(layers)]
      if (
        raised[layer] < g
        and raised[layer] <= top.ffn[layer]
        and (gran.count(config, raised).params <= limit)
      ):
        layers = raised
      else:
        open_layers.remove(layer)
    chosen[gran.parse(layers, config)] = None
  return list(chosen)


@dataclasses.dataclass(frozen=True)
class ArchitectureSearch:
  """What --nas did.

  Attributes:
    found: per budget the architecture that evolution found, and the best of those measured.
    measured: architectures, each on `windows` windows.
    seconds: of measuring, and of training the predictor and asking it.
    predictions: asked for, for all budgets.
  """

  found: list[Candidate]
  predictor: nas.Predictor
  measured: int
  windows: int
  seconds: tuple[float, float]
  predictions: int

  def to_json(self) -> dict[str, float]:
    """What it cost, and how good the predictor is."""
    p = self.predictor
    return {
      "architectures_measured": self.measured,
      "windows_each": self.windows,
      "seconds_measuring": self.seconds[0],
      "seconds_searching": self.seconds[1],
      "losses_predicted": self.predictions,
      "predictor_mse": p.mse,
      "predictor_variance": p.variance,
      "predictor_rank_correlation": p.rank_correlation,
      "predictor_trained_on": p.trained_on,
      "predictor_tested_on": p.tested_on,
    }

  def __str__(self) -> str:
    p = self.predictor
    return (
      f"NAS: {self.measured} architectures measured on {self.windows} other windows each in "
      f"{self.seconds[0]:.1f} s; the predictor's mean squared error on {p.tested_on} that it was "
      f"not trained on is {p.mse:.2e} (a constant's: {p.variance:.2e}), its rank correlation "
      f"{p.rank_correlation:.3f}; {self.predictions:,} predictions in {self.seconds[1]:.1f} s"
    )


def search_architectures(
  config: MatLMConfig,
  budgets: Sequence[str],
  number: int,
  measure: Callable[[Sequence[gran.Granularity]], np.ndarray],
  seed: int,
  profile=None,
) -> ArchitectureSearch:
  """Finds an architecture for every budget as OFA does; see evals/nas.py.

  Args:
    number: of architectures to measure.
    measure: granularities -> losses [granularities, windows].
  """
  rng = np.random.default_rng(seed)
  tops = gran.full(config).ffn
  started = time.perf_counter()
  pairs = nas.sample_architectures(tops, number, rng)
  window_losses = measure([gran.parse(layers, config) for layers in pairs])
  losses = window_losses.mean(1)
  measured = time.perf_counter()
  predictor = nas.fit(pairs, losses, config.num_granularities, seed)
  params = functools.cache(lambda layers: gran.count(config, layers).params)
  found, predictions = [], 0
  for budget in budgets:
    limit = params(gran.mix_n_match(config, budget, profile=profile).ffn)
    fits = lambda layers, limit=limit: params(tuple(layers)) <= limit
    start = [g.ffn for g in _random_mixes(config, limit, nas.POPULATION, rng)]
    best, asked = nas.evolve(predictor, fits, start, tops, rng)
    predictions += asked
    found.append(Candidate(gran.parse(best, config), NAS, budget))
    fitting = [(loss, layers) for loss, layers in zip(losses, pairs) if fits(layers)]
    if fitting:
      found.append(Candidate(gran.parse(min(fitting)[1], config), MEASURED, budget))
  seconds = measured - started, time.perf_counter() - measured
  return ArchitectureSearch(
    found, predictor, len(pairs), window_losses.shape[1], seconds, predictions
  )


@dataclasses.dataclass(frozen=True)
class Scored:
  """A candidate with what was measured.

  Attributes:
    loss, stderr: mean over windows and its standard error, nats per token.
    bits_per_byte: the loss in bits, per byte of the windows' text.
    difference, difference_stderr: loss minus the budget's Mix'n'Match loss, window by
      window; None without a budget.
    pareto: no scored configuration has both fewer parameters and a lower loss.
  """

  candidate: Candidate
  params: int
  flops_per_token: int
  loss: float
  stderr: float
  bits_per_byte: float
  difference: float | None
  difference_stderr: float | None
  pareto: bool


def summarize(
  config: MatLMConfig,
  found: Sequence[Candidate],
  window_losses: np.ndarray,
  bits_per_nat: float,
) -> list[Scored]:
  """Means, standard errors and the Pareto front.

  Args:
    window_losses: [configurations, windows], nats per token.
    bits_per_nat: bits per byte of text for each nat per token.
  """
  sizes = [gran.count(config, c.granularity) for c in found]
  means = window_losses.mean(1)
  reference = {c.budget: row for c, row in zip(found, window_losses) if c.kind == MIX_N_MATCH}
  result = []
  for c, n, row, mean in zip(found, sizes, window_losses, means):
    paired = row - reference[c.budget] if c.budget else None
    pareto = not any(
      (m.params <= n.params and other < mean) or (m.params < n.params and other <= mean)
      for m, other in zip(sizes, means)
    )
    result.append(
      Scored(
        c,
        n.params,
        n.flops,
        float(mean),
        stderr(row),
        float(mean * bits_per_nat),
        None if paired is None else float(paired.mean()),
        None if paired is None else stderr(paired),
        pareto,
      )
    )
  return result


# ------------------------------------------------------------------- reports


def comparison_table(config: MatLMConfig, scored: Sequence[Scored]) -> str:
  """Per budget: Mix'n'Match, and how much worse or better the others are."""
  header = (
    "budget",
    "configuration",
    "granularity",
    "parameters",
    "loss",
    "bits/byte",
    "minus Mix'n'Match",
  )
  rows = []
  for budget in dict.fromkeys(s.candidate.budget for s in scored if s.candidate.budget):
    mine = [s for s in scored if s.candidate.budget == budget]
    random = sorted((s for s in mine if s.candidate.kind == "random"), key=lambda s: s.loss)
    picks = [(_label(s.candidate.kind), s) for s in mine if s.candidate.kind != "random"]
    if random:
      picks += [
        (f"best of {len(random)} random", random[0]),
        ("median random", random[len(random) // 2]),
      ]
    for label, s in picks:
      rows.append(
        (
          budget,
          label,
          gran.to_text(s.candidate.granularity, config),
          f"{s.params:,}",
          f"{s.loss:.4f} ± {s.stderr:.4f}",
          f"{s.bits_per_byte:.4f}",
          ""
          if s.candidate.kind == MIX_N_MATCH
          else f"{s.difference:+.4f} ± {s.difference_stderr:.4f}",
        )
      )
      budget = ""
  return tables.table(header, rows)


def _label(kind: str) -> str:
  if kind == MIX_N_MATCH:
    return "Mix'n'Match (increasing)"
  return "NAS" if kind == NAS else kind


def as_rows(config: MatLMConfig, scored: Sequence[Scored]) -> list[dict]:
  """One flat dict per configuration, smallest first: what the CSV and JSON hold."""
  rows = []
  for s in sorted(scored, key=lambda s: (s.params, s.loss)):
    kind = "mix_n_match" if s.candidate.kind == MIX_N_MATCH else s.candidate.kind
    rows.append(
      {
        "granularity": gran.to_text(s.candidate.granularity, config),
        "kind": kind,
        "budget": s.candidate.budget,
        **{f.name: getattr(s, f.name) for f in dataclasses.fields(s)[1:]},
      }
    )
  return rows


def plot(config: MatLMConfig, scored: Sequence[Scored], title: str, path: pathlib.Path) -> None:
  """Loss against parameters: trained sizes, Mix'n'Match, other shapes, random mixes, front."""
  with plots.figure(path, (8, 5)) as axes:
    styles = [
      ("random", "random mixes", dict(marker=".", color="0.7", s=30)),
      *[
        (shape, shape, dict(marker=marker, s=32, alpha=0.8, color=color))
        for shape, marker, color in zip(gran.SHAPES[1:], "v^s", ("C1", "C2", "C4"))
      ],
      (NAS, "NAS", dict(marker="P", s=44, color="C5")),
      (MIX_N_MATCH, "Mix'n'Match (increasing)", dict(marker="D", s=34, color="C0")),
      ("trained", "trained sizes", dict(marker="o", s=90, color="C3")),
    ]
    for order, (kind, label, style) in enumerate(styles):
      mine = [s for s in scored if s.candidate.kind == kind]
      if not mine:
        continue
      axes.scatter(
        [s.params / 1e6 for s in mine],
        [s.loss for s in mine],
        label=label,
        zorder=order + 2,
        linewidths=0,
        **style,
      )
      for s in mine if kind == "trained" else ():
        axes.annotate(
          gran.to_text(s.candidate.granularity, config),
          (s.params / 1e6, s.loss),
          textcoords="offset points",
          xytext=(8, 6),
        )
    front = sorted((s.params / 1e6, s.loss) for s in scored if s.pareto)
    axes.step(*zip(*front), where="post", color="0.3", linewidth=1, zorder=1, label="Pareto front")
    axes.set(xlabel="parameters (million)", ylabel="validation loss (nats per token)", title=title)
    plots.bits_per_byte_axis(axes, scored[0].bits_per_byte / scored[0].loss)
    axes.margins(0.06, 0.08)
    axes.legend()


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  if _SOURCE.value and not _OUT.value:
    raise UserError("--source needs --out, since WORKDIR/search is for the training data")
  out = storage.path(_OUT.value or storage.path(workdir) / "search")
  runtime.enable_compilation_cache()
  model = load(workdir, _STEP.value, LanguageModel)
  config = model.config
  profile = latency.read(model.workdir, config)
  found = candidates(config, _BUDGETS.value, _RANDOM.value, _SEED.value, _RUNGS.value, profile)
  task = open_task(model, _SOURCE.value)
  batches = validation_batches(task, _BATCHES.value, _BATCH_SIZE.value)
  architectures = _find_architectures(model, task, profile) if _NAS.value else None
  found += architectures.found if architectures else []
  distinct = list(dict.fromkeys(c.granularity for c in found))
  windows = int(sum(b["weight"].sum() for b in batches))
  if windows < 2:
    raise UserError("one validation window has no standard error; raise --batches or --batch_size")
  tokens = windows * config.seq_len
  rows = dict(zip(distinct, score(config, model.execution, model.params, distinct, batches)))
  scored = summarize(
    config,
    found,
    np.stack([rows[c.granularity] for c in found]),
    bits_per_nat(batches),
  )
  flat = as_rows(config, scored)
  with storage.local_directory(out) as files:
    tables.write_csv(files / "search.csv", flat)
    (files / "search.json").write_text(
      runtime.to_json(
        {
          "workdir": str(model.workdir),
          "step": model.step,
          "source": _SOURCE.value or model.card["config"]["data"]["source"],
          "tokens": tokens,
          "rows": flat,
          **({"nas": architectures.to_json()} if architectures else {}),
        },
        indent=1,
      )
    )
    plot(
      config,
      scored,
      f"{len(distinct)} submodels of {model.workdir.name}, step {model.step:,}, "
      f"{tokens:,} tokens each",
      files / "search.png",
    )
  print(
    f"{model.workdir}, step {model.step:,}: {len(distinct)} submodels, {tokens:,} validation "
    f"tokens each{f' of {_SOURCE.value}' if _SOURCE.value else ''}\n"
  )
  if architectures:
    print(f"{architectures}\n")
  if _BUDGETS.value:
    print(comparison_table(config, scored) + "\n")
  print(f"wrote {out / 'search.csv'}, search.json, search.png")


def _find_architectures(
  model: LanguageModel, task: LanguageModeling, profile
) -> ArchitectureSearch:
  """As --nas says, on windows after those that everything is compared on."""
  if not _BUDGETS.value:
    raise UserError(f"--nas={_NAS.value} searches within budgets; give --budgets, e.g. 0.6x,0.8x")
  if _NAS.value < nas.LEAST:
    raise UserError(f"--nas={_NAS.value} is too few to learn from; give at least {nas.LEAST}")
  sample, batch_size = task.sample(_BATCHES.value, _BATCH_SIZE.value)
  left = task.validation.num_windows - len(sample)
  batches = min(_NAS_BATCHES.value or math.ceil(len(sample) / batch_size), left // batch_size)
  if not batches:
    raise UserError(
      f"--nas={_NAS.value} needs validation windows beside the {len(sample)} that everything is "
      f"compared on, and there are {left}, less than a batch of {batch_size}; lower --batches"
    )
  places = range(len(sample), len(sample) + batches * batch_size)
  others = _read_windows(task, places, batch_size)
  measure = functools.partial(score, model.config, model.execution, model.params, batches=others)
  return search_architectures(
    model.config, _BUDGETS.value, _NAS.value, measure, _SEED.value, profile
  )


def bits_per_nat(batches: Sequence[Mapping[str, np.ndarray]]) -> float:
  """Bits per byte of the batches' text for each nat per token."""
  tokens = sum(float(b["weight"].sum()) * (b["tokens"].shape[1] - 1) for b in batches)
  return tokens / sum(float(b["bytes"] @ b["weight"]) for b in batches) / math.log(2)


def validation_batches(
  task: LanguageModeling, batches: int | None = None, batch_size: int | None = None
) -> list[dict[str, np.ndarray]]:
  """The windows that training and `evaluate` measure, in batches."""
  sample, batch_size = task.sample(batches, batch_size)
  return _read_windows(task, sample, batch_size)


def _read_windows(task: LanguageModeling, places: range, batch_size: int):
  """Batches of the windows at places of the validation sample's order."""
  starts = range(places.start, places.stop, batch_size)
  return [task.validation.read(range(s, s + batch_size), places.stop) for s in starts]


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained or extracted model.")
  _STEP = cli.define_step()
  _SOURCE = cli.define_source()
  _BUDGETS = flags.DEFINE_list(
    "budgets",
    [],
    "Budgets to compare shapes and random mixes at, "
    "e.g. 0.55x,0.7x or 1.3M,1.6M; see describe --budget.",
  )
  _RANDOM = flags.DEFINE_integer("random", 20, "Random mixes per budget.", lower_bound=0)
  _RUNGS = flags.DEFINE_integer(
    "rungs", 25, "About how many models of the Mix'n'Match ladder.", lower_bound=2
  )
  _NAS = flags.DEFINE_integer(
    "nas",
    0,
    "Also search architectures: measure so many, train a predictor on them, and let evolution ask "
    "it for the best within each budget; 0 does not.",
    lower_bound=0,
  )
  _NAS_BATCHES = flags.DEFINE_integer(
    "nas_batches",
    0,
    "Batches that each of them is measured on, other ones than --batches; 0: as many.",
    lower_bound=0,
  )
  _BATCHES, _BATCH_SIZE = cli.define_sample()
  _SEED = cli.define_seed("Of the random mixes, and of the architecture search.")
  _OUT = flags.DEFINE_string("out", None, "Directory for the results; default WORKDIR/search.")
  cli.run(main)
