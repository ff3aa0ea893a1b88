"""How both families scale (Section 4.1.2, Appendix E)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np
import scipy.optimize

from matformer_jax import granularity as gran
from matformer_jax import plots, tables
from matformer_jax.experiments import claims
from matformer_jax.experiments.claims import Claim, at_every_size, interval
from matformer_jax.experiments.compare import LABELS, seeds_title
from matformer_jax.experiments.families import INDEPENDENT, MATFORMER, Family
from matformer_jax.experiments.lab import Finding, Lab, differences
from matformer_jax.experiments.language import both_sides, pair_rows
from matformer_jax.experiments.runs import Run


def widths(lab: Lab) -> list[Family]:
  """Families of the scaling law, narrow to wide."""
  families = [*lab.scale.widths, lab.scale.text]
  return sorted(families, key=lambda family: family.model.d_model)


def width_runs(lab: Lab) -> list[Run]:
  """What the scaling law is fitted to."""
  return both_sides(lab, widths(lab))


def figure3_table3(lab: Lab) -> Finding:
  """The scaling law a (N D)^b + c, fitted to both families (Section 4.1.2)."""
  points: list[dict[str, Any]] = []
  for family in widths(lab):
    g = family.model.num_granularities
    for row in pair_rows(lab, family, mixes=False):
      tokens = lab.universal(family, MATFORMER, row.seed).examples / g
      points.append({"d_model": family.model.d_model, "tokens": tokens, **row.flat()})
  fits = {
    method: [
      fit_power_law([p for p in points if p["method"] == method and p["seed"] == seed])
      for seed in lab.seeds
    ]
    for method in (INDEPENDENT, MATFORMER)
  }
  gap = [m[1] - b[1] for m, b in zip(fits[MATFORMER], fits[INDEPENDENT])]
  exponents = {m: interval([fit[1] for fit in fits[m]]) for m in fits}
  found = [
    Claim(
      "The exponents of both families are similar (within 0.05)",
      "-0.13 and -0.10",
      f"{exponents[MATFORMER]} and {exponents[INDEPENDENT]}; difference {interval(gap)}",
      claims.all_of([claims.below(gap, 0.05), claims.above(gap, -0.05)]),
    )
  ]
  # a goes with b by orders of magnitude, so that its mean over seeds would say nothing.
  typical = {m: float(np.exp(np.mean([math.log(fit[0]) for fit in fits[m]]))) for m in fits}
  text = tables.table(
    ("family", "a (geometric mean)", "b", "c"),
    [
      (LABELS[m], f"{typical[m]:.3g}", *(str(interval([f[i] for f in fits[m]])) for i in (1, 2)))
      for m in fits
    ],
  )
  path = lab.root / "report" / "figure3.png"
  with plots.figure(path) as axes:
    for method, color, marker in ((INDEPENDENT, "C1", "s"), (MATFORMER, "C0", "o")):
      mine = [p for p in points if p["method"] == method]
      x = np.array([p["params"] * p["tokens"] for p in mine])
      axes.scatter(x, [p["loss"] for p in mine], marker=marker, color=color, s=14, alpha=0.7)
      line = np.geomspace(x.min(), x.max(), 50)
      mean = np.mean([power_law(line, *fit) for fit in fits[method]], axis=0)
      label = f"{LABELS[method]}: b = {exponents[method]}"
      axes.plot(line, mean, color=color, label=label)
    axes.set(xscale="log", xlabel="N D (parameters x tokens)", ylabel="validation loss (nats)")
    axes.set_title(f"All sizes of {len(widths(lab))} families, {seeds_title(lab)}")
    axes.legend()
  return Finding(points, found, [("Table 3: a (N D)^b + c", text)], [(path, "Figure 3")])


def power_law(x, a, b, c):
  """a x^b + c."""
  return a * np.power(x, b) + c


def fit_power_law(points: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
  """(a, b, c) of loss = a (N D)^b + c, by least squares.

  a is fitted at the points' own scale, where b changes it little, and carried back.
  """
  x = np.array([p["params"] * p["tokens"] for p in points], float)
  y = np.array([p["loss"] for p in points], float)
  middle = float(np.exp(np.mean(np.log(x))))
  start = (float(y.mean()) / 2, -0.1, float(y.mean()) / 2)
  bounds = ((0, -2, 0), (np.inf, 0, np.inf))
  (a, b, c), _ = scipy.optimize.curve_fit(power_law, x / middle, y, start, bounds=bounds)
  return float(a * middle**-b), float(b), float(c)


def figures9_11(lab: Lab) -> Finding:
  """Every granularity over scale: loss and consistency (Appendix E)."""
  families = widths(lab)
  rows: list[dict[str, Any]] = []
  gaps: dict[str, dict[str, list[list[float]]]] = {"loss": {}, "agreement": {}}
  for family in families:
    found = pair_rows(lab, family, mixes=False)
    rows += [{"d_model": family.model.d_model, **r.flat()} for r in found]
    for metric, by in gaps.items():
      for size, values in differences(found, MATFORMER, INDEPENDENT, metric, family.sizes).items():
        by.setdefault(size, []).append(values)
  # Slope over the logarithm of parameters, per seed: none means a constant gap.
  sizes = families[0].sizes
  x = [math.log2(gran.count(f.model, f.sizes[-1]).non_embedding_params) for f in families]
  slope = lambda metric, size: [
    float(np.polyfit(x, seed, 1)[0]) for seed in zip(*gaps[metric][size])
  ]
  steady = lambda values: claims.all_of([claims.below(values, 0.02), claims.above(values, -0.02)])
  found = [
    at_every_size(
      "The gap in loss is constant over scale (slope per doubling within 0.02)",
      "appears constant",
      {size: slope("loss", size) for size in sizes},
      steady,
    ),
    at_every_size(
      "The gap in consistency shrinks with scale (slope per doubling, points)",
      "reduces with scale",
      {size: [100 * v for v in slope("agreement", size)] for size in sizes[:-1]},
      claims.below,
    ),
  ]
  drawn = []
  for name, metric, label in (
    ("figure9", "loss", "validation loss (nats per token)"),
    ("figure11", "agreement", "agrees with XL"),
  ):
    path = lab.root / "report" / f"{name}.png"
    with plots.figure(path) as axes:
      for i, size in enumerate(sizes):
        for method, style in ((MATFORMER, "-o"), (INDEPENDENT, "--s")):
          mine = [r for r in rows if r["method"] == method and r["size"] == size]
          params = sorted({r["params"] for r in mine})
          mean = [float(np.mean([r[metric] for r in mine if r["params"] == p])) for p in params]
          label_of = f"{size}, {LABELS[method]}"
          axes.plot(params, mean, style, color=f"C{i}", label=label_of, markersize=4)
      axes.set(xscale="log", xlabel="parameters without embedding", ylabel=label)
      axes.legend(ncols=2, fontsize=7)
    drawn.append((path, name))
  return Finding(rows, found, [], drawn)
