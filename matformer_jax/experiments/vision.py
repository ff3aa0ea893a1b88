"""The paper's comparisons of vision models (Section 4.2, Appendix G)."""

from __future__ import annotations

import dataclasses
from typing import Any

from matformer_jax import evaluate, retrieve, tables
from matformer_jax import granularity as gran
from matformer_jax.config import MatViTConfig
from matformer_jax.experiments import claims
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
from matformer_jax.experiments.families import INDEPENDENT, MATFORMER, Family
from matformer_jax.experiments.lab import Finding, Lab, Row, differences
from matformer_jax.experiments.language import both_sides
from matformer_jax.experiments.runs import Run
from matformer_jax.loading import VisionModel, load, open_task

BATCH = 250  # images at a time, where they are only embedded
STRANGERS = "trained alone, images by MatViT-XL"


def image_runs(lab: Lab) -> list[Run]:
  """MatViT and independent ViTs."""
  return both_sides(lab, [lab.scale.images])


def _load(lab: Lab, run: Run) -> VisionModel:
  return load(lab.directory(run), kind=VisionModel)


def _row(run: Run, method: str, seed: int, size: str, found: dict[str, Any]) -> Row:
  counted = gran.count(run.model, found["granularity"])
  return Row(method, seed, size, counted.params, counted.flops, found["metrics"])


# -------------------------------------------------------------- classification


def accuracy_rows(lab: Lab, run: Run, method: str, seed: int, size: str | None = None) -> list[Row]:
  """Top-1 of a run's sizes and, of a universal model, its mixes, on all validation images."""

  def measure() -> list[dict[str, Any]]:
    model = load(lab.directory(run))
    chosen = gran.trained(model.config)
    chosen += gran.ladder_points(model.config, lab.scale.ladder) if size is None else []
    found = evaluate.evaluate(model, open_task(model), list(dict.fromkeys(chosen)), True, 0, BATCH)
    return [dataclasses.asdict(result) for result in found]

  rows = []
  for found in lab.measured(f"{run.key}-accuracy", [run], measure):
    name = size or found["granularity"]
    is_mix = name not in lab.scale.images.sizes
    rows.append(_row(run, MIXES if is_mix else method, seed, name, found))
  return rows


def figure4(lab: Lab) -> Finding:
  """Top-1 accuracy of MatViT, of independent ViTs, and of Mix'n'Match."""
  family = lab.scale.images
  rows: list[Row] = []
  for seed in lab.seeds:
    rows += accuracy_rows(lab, lab.universal(family, MATFORMER, seed), MATFORMER, seed)
    for size, run in lab.independents(family, seed).items():
      rows += accuracy_rows(lab, run, INDEPENDENT, seed, size)
  points = lambda values: [100 * v for v in values]
  gaps = differences(rows, MATFORMER, INDEPENDENT, "accuracy", family.sizes)
  off = points(mean_by_seed(off_the_line(rows, "accuracy")))
  found = [
    at_every_size(
      "Every size is as accurate as the same size trained alone (within 0.5 points)",
      "as accurate (B/16), up to +0.35 (L/16)",
      {size: points(values) for size, values in gaps.items()},
      lambda values: claims.above(values, -0.5),
    ),
    Claim(
      "Mix'n'Match models lie on the line between trained sizes, or above (within 0.5 points)",
      "almost on the line",
      str(interval(off)),
      claims.above(off, -0.5),
    ),
  ]
  return Finding(
    [r.flat() for r in rows],
    where_sizes_differ(separation(rows, "accuracy", family.sizes), found),
    [
      ("Top-1 accuracy, %", rows_table(rows, "accuracy", 2, 100)),
      ("What it cost", cost_table(lab, family, (MATFORMER,))),
    ],
    [draw(lab, "figure4", rows, "accuracy", "top-1 accuracy (%)", seeds_title(lab), 100)],
  )


# ------------------------------------------------------------------- retrieval


def _retrieval(lab: Lab, family: Family, seed: int) -> list[dict[str, Any]]:
  """1-NN accuracy of every pair of encoders that Figure 5 and Table 8 show."""
  universal = _load(lab, lab.universal(family, MATFORMER, seed))
  task = open_task(universal)
  queries, corpus = task.validation_images, task.train_images
  root = lab.root / "embeddings" / f"seed{seed}"
  full = gran.full(universal.config)
  embedder = retrieve.Embedder(universal, BATCH)
  rows = []

  def add(what: str, encoder: retrieve.Embedder, size: str, g, images) -> None:
    found = retrieve.measure(encoder, queries, g, images, "", [1], "cosine", "jax", what)
    metrics = {"accuracy": found.accuracy[1]}
    text = gran.to_text(g, encoder.model.config)
    rows.append({"what": what, "size": size, "granularity": text, "metrics": metrics})

  by_xl = retrieve.embed_corpus(embedder, corpus, full, root)
  trained = gran.trained(universal.config)
  ladder = gran.ladder_points(universal.config, lab.scale.ladder)
  for g in dict.fromkeys([*trained, *ladder]):
    name = gran.to_text(g, universal.config)
    add(MATFORMER if g in trained else MIXES, embedder, name, g, by_xl)
  for g in trained:
    own = retrieve.embed_corpus(embedder, corpus, g, root)
    add("both sides", embedder, gran.to_text(g, universal.config), g, own)
  for size, run in lab.independents(family, seed).items():
    alone = retrieve.Embedder(_load(lab, run), BATCH)
    g = gran.full(alone.model.config)
    add(STRANGERS, alone, size, g, by_xl)
    add(INDEPENDENT, alone, size, g, retrieve.embed_corpus(alone, corpus, g, root))
  return rows


def figure5_table8(lab: Lab) -> Finding:
  """1-NN retrieval with elastic query encoders, and with one encoder on both sides."""
  family = lab.scale.images
  rows: list[Row] = []
  for seed in lab.seeds:
    universal, alone = lab.universal(family, MATFORMER, seed), lab.independents(family, seed)
    found = lab.measured(
      f"{universal.key}-retrieval",
      [universal, *alone.values()],
      lambda seed=seed: _retrieval(lab, family, seed),
    )
    for row in found:
      is_alone = row["what"] in (INDEPENDENT, STRANGERS)
      run = alone[row["size"]] if is_alone else universal
      rows.append(_row(run, row["what"], seed, row["size"], row))
  points = lambda values: [100 * v for v in values]
  top = lambda method: {
    r.size: points([q.metrics["accuracy"] for q in rows if (q.method, q.size) == (method, r.size)])
    for r in rows
    if r.method == method
  }
  model = family.model
  assert isinstance(model, MatViTConfig)
  share = lambda size: gran.count(model, size).flops / gran.count(model, family.sizes[-1]).flops
  queries = top(MATFORMER) | top(MIXES)
  cheap = max((size for size in queries if share(size) <= 0.6), key=share)
  lost = [a - b for a, b in zip(queries[family.sizes[-1]], queries[cheap])]
  chance = 100 / model.num_classes
  strangers = top(STRANGERS)
  gaps = differences(rows, "both sides", INDEPENDENT, "accuracy", family.sizes)
  found = [
    Claim(
      "A query encoder of at most 60% of XL's compute loses less than 0.5 points, images by XL",
      "< 0.5 (L/16)",
      f"{cheap} ({share(cheap):.0%}) loses {interval(lost)}",
      claims.below(lost, 0.5),
    ),
    at_every_size(
      f"Queries by ViTs trained alone fail (at most twice chance, {2 * chance:.1f}%)",
      "nearly 0",
      strangers,
      lambda values: claims.below(values, 2 * chance),
    ),
    at_every_size(
      "With one encoder on both sides every size is as good as trained alone (within 0.5 points)",
      "-0.41 to +0.28 (B/16), -0.08 to +0.50 (L/16), Table 8",
      {size: points(values) for size, values in gaps.items()},
      lambda values: claims.above(values, -0.5),
    ),
  ]
  shown = [r for r in rows if r.method != "both sides"]
  return Finding(
    [r.flat() for r in rows],
    found,
    [("1-NN accuracy, %", rows_table(rows, "accuracy", 2, 100))],
    [draw(lab, "figure5", shown, "accuracy", "1-NN accuracy (%)", seeds_title(lab), 100)],
  )


# ----------------------------------------------------------------- fine-tuning

PLAIN, NESTED = "plain", "nested"


@dataclasses.dataclass(frozen=True)
class Grid:
  """The runs of Table 7, of one seed.

  Attributes:
    pretrained: {plain size, or "nested": run}.
    tuned: {(pretrained, fine-tuned, size or "" for all): run}.
  """

  pretrained: dict[str, Run]
  tuned: dict[tuple[str, str, str], Run]


def grid(lab: Lab, seed: int) -> Grid:
  """What Table 7 trains: each of pretraining and fine-tuning once plain and once nested."""
  family = lab.scale.images
  before = lab.scale.pretraining
  everything = range(family.config.model.num_classes)
  after = tuple(c for c in everything if c not in before)
  on = lambda classes: {"data.classes": classes, "model.num_classes": len(classes)}
  largest_only = "/".join("0" * (len(family.sizes) - 1) + "1")
  universal = lab.universal(family, MATFORMER, seed)
  alone = lab.independents(family, seed)
  # The largest one keeps its inner sizes' names, untrained, to be nested later.
  keys = ("steps", "optim.warmup_steps", "optim.peak_lr")
  as_alone = {k: v for k, v in alone[family.sizes[-1]].changes if k in keys}
  xl = universal.but("", {**as_alone, "sampling": largest_only})
  plain = {**alone, family.sizes[-1]: xl}
  name = lambda *parts: "/".join(("table7", "-".join([*parts, f"seed{seed}"])))
  pretrained = {
    size: run.but(name("pretrained", PLAIN, size), on(before)) for size, run in plain.items()
  }
  pretrained[NESTED] = universal.but(name("pretrained", NESTED), on(before))
  tune = lambda run, parts, source: run.but(
    name("tuned", *parts),
    {**on(after), "init_from": str(lab.pool.root / pretrained[source].name)},
  )
  tuned = {
    (PLAIN, PLAIN, size): tune(run, (PLAIN, PLAIN, size), size) for size, run in plain.items()
  }
  top = family.sizes[-1]
  tuned[PLAIN, NESTED, ""] = tune(universal, (PLAIN, NESTED), top)
  # Only XL's part of the nested one is fine-tuned plainly, as in the paper's table.
  tuned[NESTED, PLAIN, top] = tune(xl, (NESTED, PLAIN, top), NESTED)
  tuned[NESTED, NESTED, ""] = tune(universal, (NESTED, NESTED), NESTED)
  return Grid(pretrained, tuned)


def pretraining_runs(lab: Lab) -> list[Run]:
  """What Table 7 trains first."""
  return [run for seed in lab.seeds for run in grid(lab, seed).pretrained.values()]


def fine_tuning_runs(lab: Lab) -> list[Run]:
  """What it trains then."""
  return [run for seed in lab.seeds for run in grid(lab, seed).tuned.values()]


def table7(lab: Lab) -> Finding:
  """Nesting in pretraining, in fine-tuning, in both or neither (Appendix G.1)."""
  family = lab.scale.images
  rows: list[Row] = []
  for seed in lab.seeds:
    for (before, after, size), run in grid(lab, seed).tuned.items():
      method = f"{before}, then {after}"
      found = accuracy_rows(lab, run, method, seed, size or None)
      if size:
        found = [dataclasses.replace(found[-1], size=size)]  # the largest, which was trained
      rows += [dataclasses.replace(r, method=method) for r in found if r.size in family.sizes]
  top = family.sizes[-1]
  cell = lambda method, size: [
    100 * r.metrics["accuracy"] for r in rows if (r.method, r.size) == (method, size)
  ]
  minus = lambda a, b, size: [x - y for x, y in zip(cell(a, size), cell(b, size))]
  names = [f"{a}, then {b}" for a in (PLAIN, NESTED) for b in (PLAIN, NESTED)]
  plain, late, early, both = names
  smaller = {size: minus(late, plain, size) for size in family.sizes[:-1]}
  found = [
    Claim(
      "Nested pretraining makes XL better, or as good, once fine-tuned plainly (within 0.5)",
      "+0.32",
      str(interval(minus(early, plain, top))),
      claims.above(minus(early, plain, top), -0.5),
    ),
    at_every_size(
      "Fine-tuning a plain model as a nested one costs smaller sizes accuracy",
      "up to 2 points",
      smaller,
      claims.below,
    ),
    at_every_size(
      "Nested in both, every size is as good as plain in both (within 0.5)",
      "S -0.01, M 0.00, L +0.28, XL +0.35",
      {size: minus(both, plain, size) for size in family.sizes},
      lambda values: claims.above(values, -0.5),
    ),
  ]
  shown = lambda values: interval(values).fixed(2)
  text = tables.table(
    ("pretrained, fine-tuned", *reversed(family.sizes)),
    [
      (m, *(shown(cell(m, size)) if cell(m, size) else "" for size in reversed(family.sizes)))
      for m in names
    ],
  )
  return Finding([r.flat() for r in rows], found, [("Table 7: top-1, %", text)])
