"""What comparisons have in common: lines between sizes, tables and plots of methods."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from matformer_jax import plots, tables
from matformer_jax.evals import stderr
from matformer_jax.experiments import claims
from matformer_jax.experiments.claims import Claim, interval
from matformer_jax.experiments.families import DYNABERT, INDEPENDENT, MATFORMER, OFA, Family
from matformer_jax.experiments.lab import Lab, Row, by_size

MIXES = "mix'n'match"
LABELS = {
  INDEPENDENT: "trained alone",
  MATFORMER: "MatFormer",
  DYNABERT: "DynaBERT",
  OFA: "OFA",
  MIXES: "MatFormer, Mix'n'Match",
}


def off_the_line(rows: Sequence[Row], metric: str) -> dict[str, list[float]]:
  """{mix: by seed, its metric minus what lies between the trained sizes beside it}."""
  trained, mixes = by_size(rows, MATFORMER, metric), by_size(rows, MIXES, metric)
  params = {r.size: r.params for r in rows if r.method in (MATFORMER, MIXES)}
  x = [params[size] for size in trained]
  return {
    mix: [
      value - float(np.interp(params[mix], x, [trained[size][i] for size in trained]))
      for i, value in enumerate(values)
    ]
    for mix, values in mixes.items()
  }


def separation(rows: Sequence[Row], metric: str, sizes: Sequence[str]) -> Claim:
  """Whether the smallest and the largest model trained alone differ by five standard errors."""
  alone = by_size(rows, INDEPENDENT, metric)
  better = -1 if metric == "accuracy" else 1  # the larger one, by that sign
  gaps = [better * (a - b) for a, b in zip(alone[sizes[0]], alone[sizes[-1]])]
  own = max(
    math.hypot(*(r.metrics[f"{metric}_stderr"] for r in rows if _is(r, seed, sizes)))
    for seed in {r.seed for r in rows}
  )
  several = len(gaps) > 1
  # Of two means, not of pairs, which ViTs trained alone are none of.
  spread = [stderr(np.array(alone[size])) for size in (sizes[0], sizes[-1])] if several else []
  error = max(own, math.hypot(*spread))
  gap = float(np.mean(gaps))
  times = gap / error
  verdict = claims.HOLDS if times > 5 else claims.FAILS
  return Claim(
    f"{sizes[-1]} trained alone is better than {sizes[0]}, or nothing can be compared here",
    "no claim; at least 5 standard errors",
    f"{gap:.3g}, {times:.1f} standard errors",
    verdict if several else claims.UNDECIDED,
  )


def where_sizes_differ(apart: Claim, others: Sequence[Claim]) -> list[Claim]:
  """A `separation` and what was compared; without verdicts if the sizes could not be told apart."""
  if apart.verdict == claims.FAILS:
    others = [dataclasses.replace(claim, verdict=claims.UNDECIDED) for claim in others]
  return [apart, *others]


def _is(row: Row, seed: int, sizes: Sequence[str]) -> bool:
  return row.method == INDEPENDENT and row.seed == seed and row.size in (sizes[0], sizes[-1])


def cost_table(lab: Lab, family: Family, methods: Sequence[str]) -> str:
  """What each method was trained on, beside the largest size alone."""
  alone = lab.independents(family, lab.seeds[0])
  xl = alone[family.sizes[-1]]
  groups = {f"{INDEPENDENT}, all sizes": list(alone.values()), f"{INDEPENDENT}, XL": [xl]}
  groups |= {m: [lab.universal(family, m, lab.seeds[0])] for m in methods}
  flops = lambda runs: sum(run.flops for run in runs)
  return tables.table(
    ("method", "steps", "examples", "FLOPs", "of XL alone", "learning rate"),
    [
      (
        name,
        f"{sum(run.config.steps for run in runs):,}",
        tables.si(sum(run.examples for run in runs)),
        f"{flops(runs):.3g}",
        f"{flops(runs) / xl.flops:.2f}x",
        f"{runs[0].config.optim.peak_lr:g}",
      )
      for name, runs in groups.items()
    ],
  )


def rows_table(rows: Sequence[Row], metric: str, digits: int = 4, scale: float = 1.0) -> str:
  """A row per method, a column per size; means with confidence intervals."""
  methods = [m for m in dict.fromkeys(r.method for r in rows) if m != MIXES]
  sizes = list(by_size(rows, methods[0], metric))
  cell = lambda values: interval([scale * v for v in values]).fixed(digits)
  return tables.table(
    ("method", *sizes),
    [
      (LABELS.get(m, m), *(cell(values[size]) if size in values else "" for size in sizes))
      for m, values in ((m, by_size(rows, m, metric)) for m in methods)
    ],
  )


STYLES = {
  INDEPENDENT: dict(marker="s", linestyle="--", color="C1"),
  MATFORMER: dict(marker="o", color="C0"),
  DYNABERT: dict(marker="^", color="C2"),
  OFA: dict(marker="v", color="C3"),
  MIXES: dict(marker="D", linestyle="", color="C0", alpha=0.5, markersize=4),
}


def draw(
  lab: Lab,
  name: str,
  rows: Sequence[Row],
  metric: str,
  label: str,
  title: str,
  scale: float = 1.0,
):
  """A line per method over parameters, with confidence intervals; returns (file, title)."""
  path = lab.root / "report" / f"{name}.png"
  with plots.figure(path) as axes:
    for method in dict.fromkeys(r.method for r in rows):
      values = by_size(rows, method, metric)
      params = {r.size: r.params for r in rows if r.method == method}
      found = [interval([scale * v for v in values[size]]) for size in values]
      axes.errorbar(
        [params[size] / 1e6 for size in values],
        [i.mean for i in found],
        [i.half if math.isfinite(i.half) else 0 for i in found],
        capsize=2,
        label=LABELS.get(method, method),
        **STYLES.get(method, dict(marker="x", linestyle=":")),
      )
    counted = "parameters" if metric == "accuracy" else "parameters without embedding"
    axes.set(xlabel=f"{counted} (million)", ylabel=label, title=title)
    axes.legend()
  return path, title


def seeds_title(lab: Lab) -> str:
  """How often everything was repeated."""
  n = len(lab.seeds)
  return "1 seed" if n == 1 else f"{n} seeds, 95% confidence"
