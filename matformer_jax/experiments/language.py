"""The paper's comparisons of language models (Section 4.1, Appendices B to F)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any

from matformer_jax import granularity as gran
from matformer_jax import tables
from matformer_jax.experiments import claims, speculation
from matformer_jax.experiments.claims import Claim, at_every_size, interval, mean_by_seed
from matformer_jax.experiments.compare import (
  MIXES,
  cost_table,
  draw,
  off_the_line,
  rows_table,
  seeds_title,
  separation,
  where_sizes_differ,
)
from matformer_jax.experiments.families import (
  DYNABERT,
  INDEPENDENT,
  MATFORMER,
  OFA,
  Family,
)
from matformer_jax.experiments.lab import Finding, Lab, Row, differences
from matformer_jax.experiments.runs import Run

TABLE_6 = {f"table6_{row}": f"table6_{row}" for row in (1, 2, 4, 5)} | {"table6_3": MATFORMER}


# ---------------------------------------------------------------------- runs


def compared_runs(lab: Lab) -> list[Run]:
  """What Figures 2 and 7 compare."""
  family = lab.scale.text
  others = [lab.universal(family, m, seed) for seed in lab.seeds for m in (DYNABERT, OFA)]
  return both_sides(lab, [family]) + others


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
  family = lab.scale.text
  runs = []
  for seed in lab.seeds:
    runs += [lab.universal(family, method, seed) for method in TABLE_6.values()]
    runs += lab.independents(family, seed).values()
  return runs


def both_sides(lab: Lab, families: Iterable[Family]) -> list[Run]:
  """MatFormer and independent models of several families."""
  runs = []
  for family in families:
    for seed in lab.seeds:
      runs += [lab.universal(family, MATFORMER, seed), *lab.independents(family, seed).values()]
  return runs


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


def pair_rows(lab: Lab, family: Family, mixes: bool = True) -> list[Row]:
  """MatFormer, with its mixes or without, and independent models."""
  ladder = lab.scale.ladder if mixes else 0
  rows = []
  for seed in lab.seeds:
    run = lab.universal(family, MATFORMER, seed)
    for row in lab.text_rows(run, MATFORMER, seed, ladder=ladder):
      is_mix = row.size not in family.sizes
      rows.append(dataclasses.replace(row, method=MIXES) if is_mix else row)
    rows += lab.independent_rows(family, seed)
  return rows


def compared_rows(lab: Lab) -> list[Row]:
  """What Figures 2 and 7 show."""
  family = lab.scale.text
  rows = pair_rows(lab, family)
  for seed in lab.seeds:
    for method in (DYNABERT, OFA):
      rows += lab.text_rows(lab.universal(family, method, seed), method, seed)
  return rows


# ---------------------------------------------------------------- experiments


def figure2(lab: Lab) -> Finding:
  """Loss and consistency of MatFormer, independent models, DynaBERT, OFA and Mix'n'Match."""
  rows, sizes = compared_rows(lab), lab.scale.text.sizes
  minus = lambda a, b, metric="loss": differences(rows, a, b, metric, sizes)
  ends = {s: v for s, v in minus(OFA, MATFORMER).items() if s in (sizes[0], sizes[-1])}
  between = {s: v for s, v in minus(OFA, MATFORMER).items() if s not in ends}
  joint = mean_by_seed(minus(DYNABERT, MATFORMER))
  bell = [e - b for e, b in zip(mean_by_seed(ends), mean_by_seed(between))]
  off = mean_by_seed(off_the_line(rows, "loss"))
  below_xl = {
    s: [100 * v for v in values]
    for s, values in minus(MATFORMER, INDEPENDENT, "agreement").items()
    if s != sizes[-1]
  }
  found = [
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
    where_sizes_differ(separation(rows, "loss", sizes), found),
    [
      ("Validation loss, nats per token", rows_table(rows, "loss")),
      ("Bits per byte", rows_table(rows, "bits_per_byte")),
      ("Same next token as XL, %", rows_table(rows, "agreement", 2, 100)),
      ("What it cost", cost_table(lab, lab.scale.text, (MATFORMER, DYNABERT, OFA))),
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
      rows += lab.text_rows(lab.universal(family, method, seed), name, seed)
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
      "From the first row of Table 6 to the last S gets worse and XL better",
      "+0.047 and -0.048",
      f"{interval(rising[small])} and {interval(rising[large])}",
      claims.all_of([claims.above(rising[small]), claims.below(rising[large])]),
    ),
  ]
  probabilities = lambda name: "/".join(f"{p:.2f}" for p in gran.SAMPLING_PRESETS[name])
  named = lambda r: (
    r if r.method == INDEPENDENT else dataclasses.replace(r, method=probabilities(r.method))
  )
  text = rows_table([named(r) for r in rows], "loss")
  return Finding(
    [r.flat() for r in rows],
    where_sizes_differ(separation(rows, "loss", family.sizes), found),
    [("Validation loss, nats per token", text)],
  )


# ----------------------------------------------------------------------- heads


def figure8(lab: Lab) -> Finding:
  """Nested attention heads, alone and with the FFN (Appendix F.2)."""
  rows: list[dict[str, Any]] = []
  found, drawn, texts = [], [], []
  paper = ("heads", "similar to the FFN's"), ("heads and FFN", "not in the paper")
  for family, (what, number) in zip(lab.scale.nested_heads, paper):
    mine = pair_rows(lab, family)
    rows += [{"nested": what, **r.flat()} for r in mine]
    gaps = differences(mine, MATFORMER, INDEPENDENT, "loss", family.sizes)
    off = mean_by_seed(off_the_line(mine, "loss"))
    compared = [
      at_every_size(
        f"Nested in {what}: every size has a lower loss than the same size trained alone",
        number,
        gaps,
        claims.below,
      ),
      Claim(
        f"Nested in {what}: Mix'n'Match models lie on the line, or below it (within 0.01)",
        number,
        str(interval(off)),
        claims.below(off, 0.01),
      ),
    ]
    found += where_sizes_differ(separation(mine, "loss", family.sizes), compared)
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
      f"{run.key}-speculation",
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
      rows += lab.text_rows(lab.universal(family, method, seed), method, seed)
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
    [
      ("Validation loss, nats per token", rows_table(rows, "loss")),
      ("What it cost", cost_table(lab, family, (MATFORMER, *beyond_methods(lab)))),
    ],
    [draw(lab, "beyond", rows, "loss", "validation loss (nats per token)", seeds_title(lab))],
  )
