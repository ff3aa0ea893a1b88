"""What an experiment works with: its runs, their learning rates, and what was measured of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from matformer_jax import granularity as gran
from matformer_jax import runtime, search, storage
from matformer_jax.checkpoints import checkpoint
from matformer_jax.evals import lm
from matformer_jax.experiments import claims
from matformer_jax.experiments.families import INDEPENDENT, RATE_OF, Family, Scale
from matformer_jax.experiments.runs import Pool, Run
from matformer_jax.loading import LanguageModel, load, open_task
from matformer_jax.runtime import say


@dataclasses.dataclass(frozen=True)
class Row:
  """What was measured of one model: a row of the CSV.

  Attributes:
    method, seed: of its training.
    size: its granularity, by the names of the universal model.
    params: without the embedding.
    flops: per token or image.
    metrics: see `evals.Result.metrics`.
  """

  method: str
  seed: int
  size: str
  params: int
  flops: int
  metrics: dict[str, float]

  def flat(self) -> dict[str, Any]:
    """For the CSV."""
    row = dataclasses.asdict(self)
    return row | row.pop("metrics")


@dataclasses.dataclass
class Finding:
  """What an experiment ends with.

  Attributes:
    rows: its CSV.
    claims: the paper's, and what became of them.
    tables: (title, text) for people to read.
    plots: (file, title).
  """

  rows: list[dict[str, Any]]
  claims: list[claims.Claim]
  tables: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  plots: list[tuple[pathlib.Path, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Lab:
  """The place of all experiments of one scale.

  Attributes:
    root: directory of everything.
    rates: (task, method) -> the learning rate that its sweep chose.
  """

  scale: Scale
  pool: Pool
  root: pathlib.Path
  seeds: tuple[int, ...]
  rates: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)

  # ------------------------------------------------------------------- runs

  def rate(self, family: Family, method: str) -> float:
    """The learning rate of a method; the family's first before its sweep is done."""
    key = family.config.task, RATE_OF.get(method, method)
    return self.rates.get(key, family.rates[0])

  def universal(self, family: Family, method: str, seed: int) -> Run:
    """See `Family.universal`."""
    return family.universal(method, seed, self.rate(family, method))

  def independents(self, family: Family, seed: int) -> dict[str, Run]:
    """See `Family.independents`."""
    return family.independents(seed, self.rate(family, INDEPENDENT))

  def directory(self, run: Run) -> pathlib.Path:
    """Where a run is."""
    return self.pool.root / run.name

  # ------------------------------------------------------------- measurements

  def measured(self, name: str, of: Sequence[Run], measure: Callable[[], Any]) -> Any:
    """What `measure` returns, JSON, of the models of runs; kept until one of them changes."""
    path = self.root / "measured" / f"{name}.json"
    seals = {run.name: self._seal(run) for run in of}
    if path.exists():
      kept = json.loads(path.read_text())
      if kept["of"] == seals:
        return kept["measured"]
    say(f"measuring {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = measure()
    storage.replace_file(path, runtime.to_json({"of": seals, "measured": found}, indent=1).encode())
    return found

  def _seal(self, run: Run) -> str:
    steps = checkpoint.steps(self.directory(run))
    return checkpoint.read_meta(self.directory(run), steps[-1])["seal"]

  def load_text(self, run: Run) -> LanguageModel:
    """The language model of a run."""
    return load(self.directory(run), kind=LanguageModel)

  def text_rows(
    self,
    run: Run,
    method: str,
    seed: int,
    size: str | None = None,
    against: Run | None = None,
    ladder: int = 0,
  ) -> list[Row]:
    """Loss and consistency of every size of a run, on the same validation text.

    Args:
      size: what a model of one size is called among the others.
      against: another run, whose largest model consistency is measured with.
      ladder: also about so many Mix'n'Match models.
    """

    def measure() -> list[dict[str, Any]]:
      model = self.load_text(run)
      other = self.load_text(against) if against else model
      batches = search.validation_batches(open_task(model), self.scale.batches)
      chosen = gran.trained(model.config)
      chosen += gran.ladder_points(model.config, ladder) if ladder else []
      results = lm.evaluate(
        model.config,
        model.execution,
        model.params,
        list(dict.fromkeys(chosen)),
        batches,
        against=(other.config, other.params),
      )
      assert results is not None
      return [dataclasses.asdict(result) for result in results]

    name = "-".join([run.key, *([f"ladder{ladder}"] if ladder else [])])
    of = [run, *([against] if against else [])]
    rows = []
    for found in self.measured(name, of, measure):
      counted = gran.count(run.model, found["granularity"])
      rows.append(
        Row(
          method,
          seed,
          size or found["granularity"],
          counted.non_embedding_params,
          counted.flops,
          found["metrics"],
        )
      )
    return rows

  def independent_rows(self, family: Family, seed: int) -> list[Row]:
    """Of all sizes trained alone; consistency is with the largest of these."""
    runs = self.independents(family, seed)
    largest = runs[family.sizes[-1]]
    rows = []
    for size, run in runs.items():
      rows += self.text_rows(run, INDEPENDENT, seed, size, against=largest)
    return rows


def by_size(rows: Sequence[Row], method: str, metric: str) -> dict[str, list[float]]:
  """{size: a value per seed}, smallest size first, seeds in order."""
  mine = sorted((r for r in rows if r.method == method), key=lambda r: (r.params, r.seed))
  found: dict[str, list[float]] = {}
  for row in mine:
    found.setdefault(row.size, []).append(row.metrics[metric])
  return found


def differences(
  rows: Sequence[Row], method: str, other: str, metric: str, sizes: Sequence[str]
) -> dict[str, list[float]]:
  """{size: method minus other, seed by seed}."""
  a, b = by_size(rows, method, metric), by_size(rows, other, metric)
  return {size: [x - y for x, y in zip(a[size], b[size])] for size in sizes}
