"""The paper's comparisons of language models (Section 4.1, Appendices B to F)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import functools
import math
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats

from matformer_jax import granularity as gran
from matformer_jax import plots, search, tables
from matformer_jax.experiments import claims, speculation
from matformer_jax.experiments.claims import Claim, at_every_size, interval
from matformer_jax.experiments.families import (
  DYNABERT,
  INDEPENDENT,
  MATFORMER,
  OFA,
  Family,
)
from matformer_jax.experiments.lab import Finding, Lab, Row, by_size, differences
from matformer_jax.experiments.runs import Run
from matformer_jax.loading import open_task

LADDER = 13  # Mix'n'Match models, about
MIXES = "mix'n'match"
LABELS = {
  INDEPENDENT: "trained alone",
  MATFORMER: "MatFormer",
  DYNABERT: "DynaBERT",
  OFA: "OFA",
  MIXES: "MatFormer, Mix'n'Match",
}
TABLE_6 = {f"table6_{row}": f"table6_{row}" for row in (1, 2, 4, 5)} | {"table6_3": MATFORMER}
# Fractions of the layers that have the larger of two neighbouring sizes in Table 5's four
# Mix'n'Match models: (sizes, layers of 16 with the second).
TABLE_5 = ((("M", "M"), 0), (("M", "L"), 4), (("M", "L"), 11), (("L", "XL"), 13))


# ---------------------------------------------------------------------- runs


def compared_runs(lab: Lab) -> list[Run]:
  """What Figures 2 and 7 compare."""
  family = lab.scale.text
  runs = []
  for seed in lab.seeds:
    runs += [lab.universal(family, m, seed) for m in (MATFORMER, DYNABERT, OFA)]
    runs += lab.independents(family, seed).values()
  return runs


def matformer_runs(lab: Lab) -> list[Run]:
  """MatFormer alone."""
  return [lab.universal(lab.scale.text, MATFORMER, seed) for seed in lab.seeds]


def drafting_runs(lab: Lab) -> list[Run]:
  """MatFormer, and what drafts and verifies without it."""
  family = lab.scale.text
  alone = [lab.independents(family, seed) for seed in lab.seeds]
  ends = [runs[size] for runs in alone for size in (family.sizes[0], family.sizes[-1])]
  return matformer_runs(lab) + ends


def table6_runs(lab: Lab) -> list[Run]:
  """Every row of Table 6."""
  methods = [MATFORMER, *TABLE_6.values()]
  return [lab.universal(lab.scale.text, m, s) for s in lab.seeds for m in dict.fromkeys(methods)]


def both_sides(lab: Lab, families: Iterable[Family]) -> list[Run]:
  """MatFormer and independent models of several families."""
  runs = []
  for family in families:
    for seed in lab.seeds:
      runs += [lab.universal(family, MATFORMER, seed), *lab.independents(family, seed).values()]
  return runs


def widths(lab: Lab) -> list[Family]:
  """Families of the scaling law, narrow to wide."""
  families = [*lab.scale.widths, lab.scale.text]
  return sorted(families, key=lambda family: family.model.d_model)


def width_runs(lab: Lab) -> list[Run]:
  """What the scaling law is fitted to."""
  return both_sides(lab, widths(lab))


def head_runs(lab: Lab) -> list[Run]:
  """What Figure 8 compares."""
  return both_sides(lab, lab.scale.nested_heads)


BEYOND = (
  *("sandwich", "joint, same batch", "distilled", "sliced"),
  *("muon", "muon, nested blocks", "muon, sliced"),
)


def beyond_methods(lab: Lab) -> list[str]:
  """Those that go with the family's optimizer: Adafactor cannot update a slice."""
  factored = lab.scale.text.config.optim.name == "adafactor"
  return [method for method in BEYOND if not (factored and method == "sliced")]


def beyond_runs(lab: Lab) -> list[Run]:
  """Options that the paper does not have, beside MatFormer as it is."""
  methods = (MATFORMER, *beyond_methods(lab))
  return [lab.universal(lab.scale.text, m, s) for s in lab.seeds for m in methods]


# --------------------------------------------------------------- measurements


def pair_rows(lab: Lab, family: Family, ladder: int = LADDER) -> list[Row]:
  """MatFormer with its mixes, and independent models."""
  rows = []
  for seed in lab.seeds:
    run = lab.universal(family, MATFORMER, seed)
    found = lab.text_rows(run, MATFORMER, seed, ladder=ladder)
    rows += [r if r.size in family.sizes else _mix(r) for r in found]
    rows += lab.independent_rows(family, seed)
  return rows


def _mix(row: Row) -> Row:
  return Row(MIXES, *(getattr(row, f) for f in ("seed", "size", "params", "flops", "metrics")))


def compared_rows(lab: Lab) -> list[Row]:
  """What Figures 2 and 7 show."""
  family = lab.scale.text
  rows = pair_rows(lab, family)
  for seed in lab.seeds:
    for method in (DYNABERT, OFA):
      found = lab.text_rows(lab.universal(family, method, seed), method, seed)
      rows += [r for r in found if r.size in family.sizes]
  return rows


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
  gaps = [a - b for a, b in zip(alone[sizes[0]], alone[sizes[-1]])]
  own = max(
    math.hypot(*(r.metrics[f"{metric}_stderr"] for r in rows if _is(r, seed, sizes)))
    for seed in {r.seed for r in rows}
  )
  spread = float(np.std(gaps, ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else 0.0
  error = max(own, spread)
  times = abs(float(np.mean(gaps))) / error
  verdict = claims.HOLDS if times > 5 else claims.FAILS
  return Claim(
    f"{sizes[0]} and {sizes[-1]} trained alone differ, or nothing can be compared here",
    "5 standard errors",
    f"{interval(gaps)}, {times:.0f} standard errors",
    verdict,
  )


def _is(row: Row, seed: int, sizes: Sequence[str]) -> bool:
  return row.method == INDEPENDENT and row.seed == seed and row.size in (sizes[0], sizes[-1])


# ------------------------------------------------------------------- reporting


def rows_table(rows: Sequence[Row], metric: str, digits: int = 4, scale: float = 1.0) -> str:
  """A row per method, a column per size; means with confidence intervals."""
  methods = [m for m in dict.fromkeys(r.method for r in rows) if m != MIXES]
  sizes = list(by_size(rows, methods[0], metric))

  def cell(values: Sequence[float]) -> str:
    found = interval([scale * v for v in values])
    half = f" ± {found.half:.{digits}f}" if math.isfinite(found.half) else ""
    return f"{found.mean:.{digits}f}{half}"

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
        **STYLES.get(method, dict(marker=".")),
      )
    axes.set(xlabel="parameters without embedding (million)", ylabel=label, title=title)
    axes.legend()
  return path, title


def seeds_title(lab: Lab) -> str:
  """How often everything was repeated."""
  n = len(lab.seeds)
  return "1 seed" if n == 1 else f"{n} seeds, 95% confidence"


# ---------------------------------------------------------------- experiments


def figure2(lab: Lab) -> Finding:
  """Loss and consistency of MatFormer, independent models, DynaBERT, OFA and Mix'n'Match."""
  rows, sizes = compared_rows(lab), lab.scale.text.sizes
  minus = lambda a, b, metric="loss": differences(rows, a, b, metric, sizes)
  ends = {s: v for s, v in minus(OFA, MATFORMER).items() if s in (sizes[0], sizes[-1])}
  between = {s: v for s, v in minus(OFA, MATFORMER).items() if s not in ends}
  mean = lambda values: [float(np.mean(seed)) for seed in zip(*values.values())]
  joint = mean(minus(DYNABERT, MATFORMER))
  bell = [e - b for e, b in zip(mean(ends), mean(between))]
  lines = off_the_line(rows, "loss")
  off = [float(np.mean(seed)) for seed in zip(*lines.values())]
  below_xl = {
    s: [100 * v for v in values]
    for s, values in minus(MATFORMER, INDEPENDENT, "agreement").items()
    if s != sizes[-1]
  }
  found = [
    separation(rows, "loss", sizes),
    at_every_size(
      "Every size has a lower loss than the same size trained alone",
      "-0.047 (S), -0.037 (M), -0.024 (L), +0.006 (XL), Table 6",
      minus(MATFORMER, INDEPENDENT),
      claims.below,
    ),
    Claim(
      "DynaBERT, with a quarter of the updates, has a higher loss than MatFormer (mean over sizes)",
      "+0.01",
      str(interval(joint)),
      claims.above(joint),
    ),
    at_every_size(
      "OFA has a higher loss than MatFormer at the smallest and the largest size",
      "much higher",
      ends,
      claims.above,
    ),
    Claim(
      "OFA loses more at the ends than between them (the bell)",
      "matches in between",
      str(interval(bell)),
      claims.above(bell),
    ),
    Claim(
      "Mix'n'Match models lie on the line between trained sizes, or below it (within 0.01)",
      "on the curve",
      str(interval(off)),
      claims.below(off, 0.01),
    ),
    at_every_size(
      "Every smaller size agrees more with its XL than one trained alone (points)",
      "up to 11.5",
      below_xl,
      claims.above,
    ),
  ]
  title = seeds_title(lab)
  return Finding(
    [r.flat() for r in rows],
    found,
    [
      ("Validation loss, nats per token", rows_table(rows, "loss")),
      ("Bits per byte", rows_table(rows, "bits_per_byte")),
      ("Same next token as XL, %", rows_table(rows, "agreement", 2, 100)),
    ],
    [
      draw(lab, "figure2a", rows, "loss", "validation loss (nats per token)", title),
      draw(lab, "figure2c", _without_ofa(rows), "agreement", "agrees with XL (%)", title, 100),
    ],
  )


def _without_ofa(rows: Sequence[Row]) -> list[Row]:
  return [r for r in rows if r.method not in (OFA, DYNABERT)]


def figure7(lab: Lab) -> Finding:
  """KL divergence of smaller sizes from the largest (Appendix F.1)."""
  rows, sizes = compared_rows(lab), lab.scale.text.sizes[:-1]
  rows = [r for r in _without_ofa(rows) if r.size in sizes]
  found = at_every_size(
    "Every smaller size is nearer its XL, by KL divergence, than one trained alone",
    "a significant gap",
    differences(rows, MATFORMER, INDEPENDENT, "kl", sizes),
    claims.below,
  )
  return Finding(
    [r.flat() for r in rows],
    [found],
    [("KL divergence from XL, nats per token", rows_table(rows, "kl"))],
    [draw(lab, "figure7", rows, "kl", "KL from XL (nats per token)", seeds_title(lab))],
  )


def table6(lab: Lab) -> Finding:
  """Sampling probabilities (Appendix F.3)."""
  family = lab.scale.text
  rows = [r for seed in lab.seeds for r in lab.independent_rows(family, seed)]
  for name, method in sorted(TABLE_6.items()):
    for seed in lab.seeds:
      found = lab.text_rows(lab.universal(family, method, seed), name, seed, ladder=LADDER)
      rows += [r for r in found if r.size in family.sizes]
  small, large = family.sizes[0], family.sizes[-1]
  minus = lambda row, size: differences(rows, row, "table6_3", "loss", [size])[size]
  up, cost = minus("table6_5", large), minus("table6_5", small)
  rising = {
    size: differences(rows, "table6_5", "table6_1", "loss", [size])[size] for size in (small, large)
  }
  found = [
    Claim(
      "Drawing XL more often (0.17/0.20/0.22/0.41) lowers its loss, beside uniform",
      "-0.017",
      str(interval(up)),
      claims.below(up),
    ),
    Claim("... and raises that of S", "+0.040", str(interval(cost)), claims.above(cost)),
    Claim(
      "... by more than XL gains",
      "0.040 and 0.017",
      f"{interval(cost)} and {interval([-v for v in up])}",
      claims.above([c + u for c, u in zip(cost, up)]),
    ),
    Claim(
      "From the first row of Table 6 to the last S gets worse and XL better",
      "+0.047 and -0.048",
      f"{interval(rising[small])} and {interval(rising[large])}",
      claims.all_of([claims.above(rising[small]), claims.below(rising[large])]),
    ),
  ]
  probabilities = lambda name: "/".join(f"{p:.2f}" for p in gran.SAMPLING_PRESETS[name])
  shown = [r if r.method == INDEPENDENT else Row(probabilities(r.method), *_rest(r)) for r in rows]
  text = rows_table(shown, "loss")
  return Finding([r.flat() for r in rows], found, [("Validation loss, nats per token", text)])


def _rest(row: Row) -> list[Any]:
  return [getattr(row, f) for f in ("seed", "size", "params", "flops", "metrics")]


# ---------------------------------------------------------------------- search


def figure6_table5(lab: Lab) -> Finding:
  """Evolutionary search beside Mix'n'Match at four budgets (Appendix D)."""
  family = lab.scale.text
  rows: list[dict[str, Any]] = []
  for seed in lab.seeds:
    run = lab.universal(family, MATFORMER, seed)
    found = lab.measured(
      f"{run.name.replace('/', '-')}-nas{lab.scale.architectures}",
      [run],
      lambda run=run, seed=seed: _search(lab, run, seed),
    )
    rows += [{"seed": seed, **row} for row in found]
  minus = {
    budget: [r["nas_minus_mix"] for r in rows if r["budget"] == budget]
    for budget in dict.fromkeys(r["budget"] for r in rows)
  }
  mean = [
    float(np.mean([r["nas_minus_mix"] for r in rows if r["seed"] == seed])) for seed in lab.seeds
  ]
  found = [
    Claim(
      "Mix'n'Match is at least as good as the search (mean over budgets; within 0.002)",
      "+0.013, +0.006, +0.010 for three of the four",
      ", ".join(f"{b} {interval(v)}" for b, v in minus.items()) + f"; mean {interval(mean)}",
      claims.above(mean, -0.002),
    ),
    _monotone(rows, lab),
  ]
  cost = tables.table(
    ("seed", "architectures", "windows each", "measuring, s", "searching, s", "rank correlation"),
    [
      (
        str(r["seed"]),
        str(r["measured"]),
        str(r["windows"]),
        f"{r['seconds_measuring']:.0f}",
        f"{r['seconds_searching']:.0f}",
        f"{r['rank_correlation']:.3f}",
      )
      for r in rows
      if r["budget"] == rows[0]["budget"]
    ],
  )
  chosen = tables.table(
    ("budget", "seed", "Mix'n'Match", "loss", "search", "loss", "difference"),
    [
      (
        r["budget"],
        str(r["seed"]),
        r["mix"],
        f"{r['mix_loss']:.4f}",
        r["nas"],
        f"{r['nas_loss']:.4f}",
        f"{r['nas_minus_mix']:+.4f} ± {r['stderr']:.4f}",
      )
      for r in rows
    ],
  )
  return Finding(rows, found, [("Table 5", chosen), ("What the search took", cost)])


def _monotone(rows: Sequence[Mapping[str, Any]], lab: Lab) -> Claim:
  """Whether what the search found gets better with the budget, which Gemma 3n's does not."""
  ok = []
  for seed in lab.seeds:
    losses = [r["nas_loss"] for r in rows if r["seed"] == seed]
    ok.append(all(a >= b for a, b in zip(losses, losses[1:])))
  return Claim(
    "Searched mixes get better with the budget (Gemma 3n's published curve does not always)",
    "yes",
    f"for {sum(ok)} of {len(ok)} seeds",
    claims.HOLDS if all(ok) else claims.FAILS,
  )


def budget_mixes(num_layers: int) -> list[str]:
  """Table 5's four Mix'n'Match models, for a model of any depth."""
  texts = []
  for (small, large), of_16 in TABLE_5:
    more = max(1, min(num_layers - 1, round(of_16 * num_layers / 16))) if of_16 else 0
    less = num_layers - more
    texts.append(f"{small}*{less}+{large}*{more}" if more else small)
  return texts


def _search(lab: Lab, run: Run, seed: int) -> list[dict[str, Any]]:
  """A row per budget: what each finds there, and its loss on text that neither has seen."""
  model = lab.load_text(run)
  config = model.config
  compared = lab.scale.batches
  batches = search.validation_batches(open_task(model), 2 * compared)
  seen = batches[compared : compared + max(compared // 4, 1)]  # by the search
  measure = functools.partial(search.score, config, model.execution, model.params)
  mixes = [gran.parse(text, config) for text in budget_mixes(config.num_layers)]
  budgets = [str(gran.count(config, mix).params) for mix in mixes]
  number = lab.scale.architectures
  found = search.search_architectures(
    config, budgets, number, functools.partial(measure, batches=seen), seed
  )
  by_budget: dict[str, list[gran.Granularity]] = {}
  for candidate in found.found:
    by_budget.setdefault(candidate.budget, []).append(candidate.granularity)
  rows = []
  for mix, budget in zip(mixes, budgets):
    # As in D.2: the better of what evolution found and of what was measured.
    on_search = measure(by_budget[budget], batches=seen).mean(1)
    best = by_budget[budget][int(np.argmin(on_search))]
    ours, theirs = measure([mix, best], batches=batches[:compared])
    paired = theirs - ours
    text = lambda g: gran.to_text(g, config)
    top = gran.count(config, gran.full(config)).params
    rows.append(
      {
        "budget": f"{int(budget) / top:.2f}x",
        "params": int(budget),
        "mix": text(mix),
        "mix_loss": float(ours.mean()),
        "nas": text(best),
        "nas_loss": float(theirs.mean()),
        "nas_minus_mix": float(paired.mean()),
        "stderr": float(paired.std(ddof=1) / math.sqrt(len(paired))) if len(paired) > 1 else 0.0,
        "measured": found.measured,
        "windows": found.windows,
        "seconds_measuring": found.seconds[0],
        "seconds_searching": found.seconds[1],
        "rank_correlation": found.predictor.rank_correlation,
        "predictor_mse": found.predictor.mse,
      }
    )
  return rows


# --------------------------------------------------------------------- scaling


def figure3_table3(lab: Lab) -> Finding:
  """The scaling law a (N D)^b + c, fitted to both families (Section 4.1.2)."""
  points: list[dict[str, Any]] = []
  for family in widths(lab):
    g = family.model.num_granularities
    for row in pair_rows(lab, family, ladder=0):
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
  text = tables.table(
    ("family", "a", "b", "c"),
    [(LABELS[m], *(str(interval([fit[i] for fit in fits[m]])) for i in range(3))) for m in fits],
  )
  path = lab.root / "report" / "figure3.png"
  with plots.figure(path) as axes:
    for method, color, marker in ((INDEPENDENT, "C1", "s"), (MATFORMER, "C0", "o")):
      mine = [p for p in points if p["method"] == method]
      x = np.array([p["params"] * p["tokens"] for p in mine])
      axes.scatter(x, [p["loss"] for p in mine], marker=marker, color=color, s=14, alpha=0.7)
      a, b, c = np.mean(fits[method], axis=0)
      line = np.geomspace(x.min(), x.max(), 50)
      label = f"{LABELS[method]}: {a:.3g} (ND)^{b:.3f} + {c:.3g}"
      axes.plot(line, power_law(line, a, b, c), color=color, label=label)
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
    found = [r for r in pair_rows(lab, family, ladder=0)]
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


# ----------------------------------------------------------------------- heads


def figure8(lab: Lab) -> Finding:
  """Nested attention heads, alone and with the FFN (Appendix F.2)."""
  rows: list[dict[str, Any]] = []
  found, drawn, texts = [], [], []
  for family, what in zip(lab.scale.nested_heads, ("heads", "heads and FFN")):
    mine = pair_rows(lab, family)
    rows += [{"nested": what, **r.flat()} for r in mine]
    gaps = differences(mine, MATFORMER, INDEPENDENT, "loss", family.sizes)
    off = [float(np.mean(seed)) for seed in zip(*off_the_line(mine, "loss").values())]
    found += [
      at_every_size(
        f"Nested in {what}: every size has a lower loss than the same size trained alone",
        "similar to the FFN's",
        gaps,
        claims.below,
      ),
      Claim(
        f"Nested in {what}: Mix'n'Match models lie on the line, or below it (within 0.01)",
        "on the curve",
        str(interval(off)),
        claims.below(off, 0.01),
      ),
    ]
    name = f"figure8_{what.replace(' ', '_')}"
    title = f"nested in {what}, {seeds_title(lab)}"
    drawn.append(draw(lab, name, mine, "loss", "validation loss (nats per token)", title))
    texts.append((f"Nested in {what}: validation loss", rows_table(mine, "loss")))
  return Finding(rows, found, texts, drawn)


# ------------------------------------------------------------------- decoding


def table2(lab: Lab) -> Finding:
  """Speculative decoding: S drafts, XL verifies (Section 4.1.1)."""
  family = lab.scale.text
  rows: list[dict[str, Any]] = []
  for seed in lab.seeds:
    run, alone = lab.universal(family, MATFORMER, seed), lab.independents(family, seed)
    of = [run, alone[family.sizes[0]], alone[family.sizes[-1]]]
    found = lab.measured(
      f"{run.name.replace('/', '-')}-speculation",
      of,
      lambda of=of: speculation.measure(*map(lab.load_text, of)),
    )
    rows += [{"seed": seed, **row} for row in found]
  by = {
    draft: {key: [r[key] for r in rows if r["draft"] == draft] for key in ("acceptance", "speedup")}
    for draft in dict.fromkeys(r["draft"] for r in rows)
  }
  alone, ours, shared = by.values()
  minus = lambda a, b, key: [x - y for x, y in zip(a[key], b[key])]
  accepted = minus(ours, alone, "acceptance")
  claim = lambda says, paper, values, verdict: Claim(says, paper, str(interval(values)), verdict)
  found = [
    claim(
      "XL accepts more of the drafts of MatLM's S than XL trained alone does of S trained alone",
      "more consistent",
      accepted,
      claims.above(accepted),
    ),
    *(
      claim(says, paper, minus(a, b, "speedup"), claims.above(minus(a, b, "speedup")))
      for says, paper, a, b in (
        ("... and gains more speed", "1.14x beside 1.10x, 1.11x beside 1.08x", ours, alone),
        ("A shared attention cache gains more", "1.16x, 1.14x", shared, ours),
      )
    ),
    claim(
      "Drafting is faster than plain decoding (speed-up minus 1, shared cache)",
      "1.16x, 1.14x",
      [v - 1 for v in shared["speedup"]],
      claims.above(shared["speedup"], 1.0),
    ),
  ]
  text = tables.table(
    ("draft", "accepted", "speed-up"),
    [(d, str(interval(v["acceptance"])), str(interval(v["speedup"]))) for d, v in by.items()],
  )
  return Finding(rows, found, [("Table 2", text)])


# --------------------------------------------------------------------- beyond


def beyond(lab: Lab) -> Finding:
  """Options that the paper does not have, beside its method."""
  family = lab.scale.text
  rows = []
  for method in (MATFORMER, *beyond_methods(lab)):
    for seed in lab.seeds:
      found = lab.text_rows(lab.universal(family, method, seed), method, seed, ladder=LADDER)
      rows += [r for r in found if r.size in family.sizes]
  found = [
    at_every_size(
      f"{method}: a lower loss than MatFormer as it is, at every size",
      "not in the paper",
      differences(rows, method, MATFORMER, "loss", family.sizes),
      claims.below,
    )
    for method in beyond_methods(lab)
  ]
  return Finding(
    [r.flat() for r in rows],
    found,
    [("Validation loss, nats per token", rows_table(rows, "loss"))],
    [draw(lab, "beyond", rows, "loss", "validation loss (nats per token)", seeds_title(lab))],
  )
