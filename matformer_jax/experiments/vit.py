"""MatViT against independent ViTs: accuracy, Mix'n'Match, retrieval (Figures 4, 5; Table 8).

  python -m matformer_jax.experiments.vit --config=configs/matvit.py:fashion --workdir=runs/vit

Trains one universal model for config.steps, and a ViT of each of its g sizes for
config.steps / g, so that both sides see equally many images (Appendix B.4), each from a seed of
its own: equal initial weights leave embeddings that resemble each other. Then measures
top-1 of all sizes and of Mix'n'Match models between them; 1-NN retrieval with every size
as query encoder against images embedded by XL; the same with one encoder on both sides; and
the independent ViTs as query encoders against XL's embeddings. Ends with tables, two plots
and what became of the paper's claims.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
import pathlib
import statistics

from absl import flags
import numpy as np

from matformer_jax import cli, plots, runtime, tables
from matformer_jax import granularity as gran
from matformer_jax.config import MatViTConfig
from matformer_jax.experiments import commands


@dataclasses.dataclass
class Measured:
  """Percentages by granularity, one per seed.

  Attributes:
    top1: of the universal model.
    independent: of the ViT trained alone at that size.
    asymmetric: 1-NN, queries by this size, images by XL.
    symmetric: 1-NN, both by this size.
    independent_symmetric: both by the ViT trained alone.
    independent_asymmetric: queries by that ViT, images by the universal XL.
    images: how many each accuracy is of.
  """

  top1: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  independent: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  asymmetric: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  symmetric: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  independent_symmetric: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  independent_asymmetric: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  images: int = 0


def run_seed(
  config, model: MatViTConfig, seed: int, root: pathlib.Path, ladder: int, found: Measured
) -> None:
  """Trains and measures everything for one seed; adds to `found`."""
  names, g = gran.names(model), model.num_granularities

  def train(workdir, seed, *args):
    commands.run(
      "train",
      *commands.overrides(),
      "--config.eval.every=0",
      f"--workdir={workdir}",
      f"--config.seed={seed}",
      *args,
    )

  universal = root / "matvit"
  train(universal, seed)
  alone = {name: root / f"vit_{name}" for name in names}
  for i, (name, ratio) in enumerate(zip(names, model.ffn_ratios), 1):
    train(
      alone[name],
      seed + 1000 * i,
      f"--config.model.ffn_ratios=({ratio},)",
      "--config.sampling=uniform",
      f"--config.steps={config.steps // g}",
      f"--config.optim.warmup_steps={config.optim.warmup_steps // g}",
    )

  def evaluation(workdir, *args):
    return commands.measured(
      workdir,
      "evaluation.json",
      "evaluate",
      "--batches=0",  # the whole split
      *args,
      f"--json={workdir / 'evaluation.json'}",
    )

  def retrieval(workdir, *args):
    return commands.measured(workdir, "retrieval/retrieval.json", "retrieve", "--k=1", *args)[
      "rows"
    ]

  def add(where, name, share):
    where.setdefault(name, []).append(100 * share)

  measured = evaluation(universal, f"--ladder={ladder}")
  found.images = measured["images"]
  for name, row in measured["granularities"].items():
    add(found.top1, name, row["accuracy"])
  largest = names[-1]
  for row in retrieval(
    universal,
    f"--ladder={ladder}",
    "--symmetric=trained",
    f"--baselines={','.join(map(str, alone.values()))}",
  ):
    name = row["granularity"]
    if row["encoder"] != "MatViT":
      name = next(n for n, workdir in alone.items() if str(workdir) == row["encoder"])
      add(found.independent_asymmetric, name, row["1-nn"])
      continue
    if row["corpus"] == largest:
      add(found.asymmetric, name, row["1-nn"])
    if row["corpus"] == name:
      add(found.symmetric, name, row["1-nn"])
  for name, workdir in alone.items():
    (row,) = evaluation(workdir)["granularities"].values()
    add(found.independent, name, row["accuracy"])
    (row,) = retrieval(workdir)
    add(found.independent_symmetric, name, row["1-nn"])


# ------------------------------------------------------------------- reporting


def _show(values: Sequence[float] | None) -> str:
  """`84.12`, or `84.12 ±0.31` over seeds (standard deviation)."""
  if not values:
    return ""
  spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
  return f"{statistics.mean(values):.2f}{spread}"


def _difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
  """Seed by seed."""
  return [x - y for x, y in zip(a, b)]


def on_the_line(model: MatViTConfig, top1: dict[str, list[float]]) -> dict[str, list[float]]:
  """For each mix, by seed: what lies between the trained sizes around it, by parameters."""
  params = lambda name: gran.count(model, name).params
  trained = [n for n in gran.names(model) if n in top1]
  seeds = len(next(iter(top1.values())))
  return {
    name: [
      float(np.interp(params(name), [params(t) for t in trained], [top1[t][seed] for t in trained]))
      for seed in range(seeds)
    ]
    for name in top1
    if name not in trained
  }


def summary(model: MatViTConfig, found: Measured) -> str:
  """The tables a person reads, in percent."""
  names = gran.names(model)
  by_size = lambda name: gran.count(model, name).params
  flops = lambda name: gran.count(model, name).flops
  sizes = tables.table(
    ("size", "parameters", "FLOPs/image", "MatViT", "ViT alone", "difference"),
    [
      (
        n,
        f"{by_size(n):,}",
        tables.si(flops(n)),
        _show(found.top1[n]),
        _show(found.independent[n]),
        _show(_difference(found.top1[n], found.independent[n])),
      )
      for n in names
    ],
  )
  line = on_the_line(model, found.top1)
  mixes = tables.table(
    ("mix, never trained", "parameters", "MatViT", "on the line", "difference"),
    [
      (
        n,
        f"{by_size(n):,}",
        _show(found.top1[n]),
        _show(line[n]),
        _show(_difference(found.top1[n], line[n])),
      )
      for n in sorted(line, key=by_size)
    ],
  )
  neighbours = tables.table(
    (
      "query encoder",
      "of XL FLOPs",
      "images by XL",
      "both sides",
      "ViT alone, both sides",
      "ViT alone, images by XL",
    ),
    [
      (
        n,
        f"{flops(n) / flops(names[-1]):.1%}",
        _show(found.asymmetric[n]),
        _show(found.symmetric.get(n)),
        _show(found.independent_symmetric.get(n)),
        _show(found.independent_asymmetric.get(n)),
      )
      for n in sorted(found.asymmetric, key=by_size)
    ],
  )
  share = statistics.mean(found.top1[names[-1]]) / 100
  error = 100 * math.sqrt(share * (1 - share) / found.images)
  return (
    f"Top-1 accuracy (%; Figure 4)\n\n{sizes}\n\nMix'n'Match (Section 4.2.1)\n\n{mixes}\n\n"
    f"1-NN accuracy (%; Figure 5, Table 8)\n\n{neighbours}\n\n"
    f"Standard error of one top-1 accuracy, of {found.images:,} images: {error:.2f} points."
  )


def claims(model: MatViTConfig, found: Measured) -> list[str]:
  """What became of the paper's claims, from means over seeds."""
  mean = statistics.mean
  names = gran.names(model)
  verdict = lambda holds: "holds" if holds else "does NOT hold"
  gaps = {n: mean(_difference(found.top1[n], found.independent[n])) for n in names}
  worst = min(gaps, key=gaps.__getitem__)
  line = on_the_line(model, found.top1)
  off = {n: mean(_difference(found.top1[n], line[n])) for n in line}
  furthest = max(off, key=lambda n: abs(off[n]))
  flops = lambda name: gran.count(model, name).flops / gran.count(model, names[-1]).flops
  cheap = max((n for n in found.asymmetric if flops(n) <= 0.6), key=flops)
  lost = mean(_difference(found.asymmetric[names[-1]], found.asymmetric[cheap]))
  strangers = max(mean(v) for v in found.independent_asymmetric.values())
  chance = 100 / model.num_classes
  return [
    f"Nested matches independent at every size (within 0.5%): {verdict(gaps[worst] > -0.5)}; "
    f"differences {', '.join(f'{n} {v:+.2f}' for n, v in gaps.items())}",
    f"Mixes lie on the line between trained sizes (within 0.5%): "
    f"{verdict(abs(off[furthest]) < 0.5)}; furthest off {furthest} {off[furthest]:+.2f}",
    f"A query encoder of at most 60% of the compute loses under 0.5% 1-NN accuracy: "
    f"{verdict(lost < 0.5)}; {cheap} ({flops(cheap):.0%}) loses {lost:.2f}",
    f"Independent query encoders fail (at most twice chance, {2 * chance:.0f}%): "
    f"{verdict(strangers <= 2 * chance)}; the best reaches {strangers:.2f}",
  ]


def draw_plots(
  model: MatViTConfig, found: Measured, root: pathlib.Path, title: str
) -> list[pathlib.Path]:
  """accuracy.png (Figure 4) and retrieval.png (Figure 5)."""
  names = gran.names(model)
  is_trained = lambda name: name in names

  def draw(axes, values, cost, label, **style):
    chosen = sorted(values, key=cost)
    error = [statistics.stdev(values[n]) if len(values[n]) > 1 else 0 for n in chosen]
    axes.errorbar(
      [cost(n) for n in chosen],
      [statistics.mean(values[n]) for n in chosen],
      error,
      label=label,
      capsize=2,
      **style,
    )

  params = lambda n: gran.count(model, n).params / 1e6
  gflops = lambda n: gran.count(model, n).flops / 1e9
  pick = lambda values, keep: {n: v for n, v in values.items() if keep(n)}
  paths = []
  for file, cost, ours, alone, axis, more in (
    (
      "accuracy",
      params,
      found.top1,
      found.independent,
      ("parameters (million)", "top-1 accuracy (%)"),
      {},
    ),
    (
      "retrieval",
      gflops,
      found.asymmetric,
      found.independent_symmetric,
      ("GFLOPs per query image", "1-NN accuracy (%)"),
      found.independent_asymmetric,
    ),
  ):
    paths.append(root / f"{file}.png")
    with plots.figure(paths[-1]) as axes:
      draw(axes, pick(ours, is_trained), cost, "MatViT, one model", marker="o", color="C0")
      mixes = pick(ours, lambda n: not is_trained(n))
      draw(
        axes,
        mixes,
        cost,
        "MatViT, Mix'n'Match",
        marker="D",
        color="C0",
        linestyle="",
        alpha=0.5,
        markersize=4,
      )
      both = " (own embeddings on both sides)" if more else ""
      draw(axes, alone, cost, f"ViT trained alone{both}", marker="s", color="C1", linestyle="--")
      if more:
        draw(
          axes,
          more,
          cost,
          "ViT trained alone, images by MatViT-XL",
          marker="x",
          color="C3",
          linestyle=":",
        )
      for n in names:
        axes.annotate(
          n, (cost(n), statistics.mean(ours[n])), textcoords="offset points", xytext=(4, 6)
        )
      axes.set(xlabel=axis[0], ylabel=axis[1], title=title)
      axes.margins(y=0.12)
      axes.legend()
  return paths


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  config, model = commands.read_matvit(_CONFIG)
  root = pathlib.Path(workdir)
  found = Measured()
  for seed in range(config.seed, config.seed + _SEEDS.value):
    run_seed(config, model, seed, root / f"seed{seed}", _LADDER.value, found)
  text = summary(model, found)
  held = claims(model, found)
  print(f"\n{text}\n\nThe paper's claims here, {_SEEDS.value} seed{'s' * (_SEEDS.value > 1)}:\n")
  print("\n".join(f"- {line}" for line in held))
  title = f"{config.data.source}, {_SEEDS.value} seed{'s' * (_SEEDS.value > 1)}"
  drawn = draw_plots(model, found, root, title)
  (root / "results.json").write_text(
    runtime.to_json(
      {
        "model": model.to_dict(),
        "steps": config.steps,
        "seeds": _SEEDS.value,
        "measured": dataclasses.asdict(found),
        "claims": held,
      },
      indent=1,
    )
  )
  print(f"\nwrote {', '.join(map(str, drawn))}, {root / 'results.json'}")


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all runs and results.")
  _SEEDS = flags.DEFINE_integer("seeds", 1, "Repetitions with other seeds.", lower_bound=1)
  _LADDER = flags.DEFINE_integer(
    "ladder", 9, "About how many models of the Mix'n'Match ladder.", lower_bound=2
  )
  flags.adopt_module_key_flags(cli)
  cli.run(main)
