"""The paper's comparisons, tables and figures, with error bars.

  python -m matformer_jax.experiments --list
  python -m matformer_jax.experiments --experiment=figure2 --scale=laptop --out=runs/paper

Trains what an experiment compares, measures it, and puts the paper's numbers, the ones found
here and what became of each claim into OUT/report/report.md and report.html, with a CSV and plots
for every experiment. Models that several experiments compare are trained once; run again, it
trains only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import importlib.metadata
import pathlib
import platform
import sys
import time
from typing import Any

from absl import flags

from matformer_jax import cli, runtime, storage, tables
from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.experiments import (
  architectures,
  families,
  language,
  report,
  runs,
  scaling,
  vision,
)
from matformer_jax.experiments.lab import Finding, Lab
from matformer_jax.experiments.rates import Sweep
from matformer_jax.experiments.runs import Pool, Run

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Experiment:
  """An item of the paper.

  Attributes:
    item: its name there.
    runs: what is trained, in stages: the second one starts from models of the first.
    measure: what is found once that is done.
  """

  item: str
  runs: tuple[Callable[[Lab], list[Run]], ...]
  measure: Callable[[Lab], Finding]

  @property
  def about(self) -> str:
    """In one line."""
    return (self.measure.__doc__ or "").partition("\n")[0].rstrip(".")


EXPERIMENTS = {
  "figure2": Experiment("Figure 2", (language.compared_runs,), language.figure2),
  "figure7": Experiment("Figure 7", (language.compared_runs,), language.figure7),
  "table6": Experiment("Table 6", (language.table6_runs,), language.table6),
  "figure6_table5": Experiment(
    "Figure 6, Table 5", (language.matformer_runs,), architectures.figure6_table5
  ),
  "table2": Experiment("Table 2", (language.drafting_runs,), language.table2),
  "figure4": Experiment("Figure 4", (vision.image_runs,), vision.figure4),
  "figure5_table8": Experiment("Figure 5, Table 8", (vision.image_runs,), vision.figure5_table8),
  "figure8": Experiment("Figure 8", (language.head_runs,), language.figure8),
  "beyond": Experiment("Beyond", (language.beyond_runs,), language.beyond),
  "table7": Experiment(
    "Table 7", (vision.pretraining_runs, vision.fine_tuning_runs), vision.table7
  ),
  "figure3_table3": Experiment("Figure 3, Table 3", (scaling.width_runs,), scaling.figure3_table3),
  "figures9_11": Experiment("Figures 9 to 11", (scaling.width_runs,), scaling.figures9_11),
}


def main(argv) -> None:
  cli.check(argv)
  chosen = _chosen(_EXPERIMENT.value)
  root = storage.local(_OUT.value, "--out").absolute()
  if _LIST.value:
    print(_listing())
    if _SCALE.value != "paper":
      return
  if _SCALE.value == "smoke":
    runtime.compile_fast()
  runtime.enable_compilation_cache()
  started = time.monotonic()
  scale = families.make_scale(_SCALE.value, root / "data", _TEXT.value, _IMAGES.value)
  seeds = tuple(range(_SEEDS.value or scale.seeds))
  pool = Pool(root / "runs", _JOBS.value or runtime.cpu_count())
  lab = Lab(scale, pool, root, seeds)
  sweep = Sweep(lab, _planned(chosen, lab))
  sweep.choose()  # where it was trained already, so that the plan has its learning rates
  if _LIST.value:
    _print_commands([*sweep.runs, *_planned(chosen, lab)], pool.root)
    return
  _say_plan(pool, chosen, [*sweep.runs, *_planned(chosen, lab)])
  while not sweep.choose():
    pool.train(sweep.runs, may_diverge=True)
  for stage in range(max(len(e.runs) for e in chosen.values())):
    pool.train(
      [run for e in chosen.values() for run in e.runs[stage : stage + 1] for run in run(lab)]
    )
  (root / "report").mkdir(parents=True, exist_ok=True)
  sections = []
  for name, experiment in chosen.items():
    section = report.Section(name, experiment.item, experiment.about, experiment.measure(lab))
    sections.append(section)
    print(f"\n{experiment.item}: {experiment.about}\n")
    print("\n\n".join(f"{title}\n\n{text}" for title, text in section.finding.tables))
    print()
    for claim in section.finding.claims:
      print(f"- {claim.says}: {claim.verdict}; here {claim.ours}; paper {claim.paper}")
  if sweep.tried:
    sections.append(_sweep_section(sweep.tried))
  facts = _facts(lab, [*sweep.runs, *_planned(chosen, lab)], started)
  title = f"MatFormer's claims at the scale {_SCALE.value!r}"
  report.write(root / "report", title, facts, sections)
  print(f"\nwrote {root / 'report' / 'report.md'}, report.html, a CSV and plots per experiment")


def _chosen(names: Sequence[str]) -> dict[str, Experiment]:
  if not names:
    raise UserError(f"--experiment= names none; give some of {', '.join(EXPERIMENTS)}, or {ALL}")
  if ALL in names:
    return EXPERIMENTS
  for name in names:
    if name not in EXPERIMENTS:
      raise UserError(f"--experiment={name!r} is unknown{did_you_mean(name, [*EXPERIMENTS, ALL])}")
  return {name: EXPERIMENTS[name] for name in EXPERIMENTS if name in names}


def _planned(chosen: dict[str, Experiment], lab: Lab) -> list[Run]:
  """What the experiments train, in all stages; a run that several need is there several times."""
  return [run for e in chosen.values() for stage in e.runs for run in stage(lab)]


def _listing() -> str:
  rows = [(name, e.item, e.about) for name, e in EXPERIMENTS.items()]
  width = max(len(name) for name in EXPERIMENTS)
  wide = max(len(e.item) for e in EXPERIMENTS.values())
  return "\n".join(f"{name:{width}}  {item:{wide}}  {about}" for name, item, about in rows)


def _print_commands(wanted: Sequence[Run], root: pathlib.Path) -> None:
  """What a pod is to run before this program measures it."""
  print("\nTrain these, then run this again without --list:\n")
  for run in dict.fromkeys(wanted):
    print(run.command(root))


def _say_plan(pool: Pool, chosen: dict[str, Experiment], everything: Sequence[Run]) -> None:
  missing = pool.missing(everything)
  distinct = len(dict.fromkeys(everything))
  flops = sum(run.flops for run in missing)
  print(
    f"{', '.join(chosen)}: {distinct} models, {distinct - len(missing)} of them trained already; "
    f"{tables.si(flops)}FLOPs are left, about {runs.duration(pool.estimate_s(everything))} of "
    f"training with {pool.jobs} at a time, and some minutes of measuring",
    flush=True,
  )


def _sweep_section(tried: list[dict[str, Any]]) -> report.Section:
  text = tables.table(
    ("family", "method", "learning rate", "seeds", "mean loss over sizes", ""),
    [
      (
        row["family"],
        row["method"],
        f"{row['learning_rate']:g}",
        str(row["seeds"]),
        f"{row['mean_loss']:.4f}",
        "taken" if row["taken"] else "",
      )
      for row in tried
    ],
  )
  about = "what each method was tried with; on all seeds where the first one did not decide"
  finding = Finding(tried, [], [("Mean of the validation losses of all sizes", text)])
  return report.Section("rates", "Learning rates", about, finding)


def _facts(lab: Lab, trained: Sequence[Run], started: float) -> list[str]:
  distinct = list(dict.fromkeys(trained))
  spent = sum(runs.seconds(run, lab.pool.root) for run in distinct)
  versions = ", ".join(
    f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax")
  )
  return [
    f"`{' '.join(['python -m matformer_jax.experiments', *sys.argv[1:]])}`",
    f"{len(distinct)} models, {len(lab.seeds)} seed{'s' * (len(lab.seeds) > 1)}; "
    f"{runs.duration(spent)} of training in all, {lab.pool.jobs} at a time "
    f"(this call took {runs.duration(time.monotonic() - started)})",
    f"{runtime.cpu_model()}, {runtime.cpu_count()} processors; Python "
    f"{platform.python_version()}, {versions}",
    "± is the half width of a 95% confidence interval over seeds (Student's t), of differences "
    "that are paired by seed; a claim is undecided where the interval holds its limit",
  ]


if __name__ == "__main__":
  _EXPERIMENT = flags.DEFINE_list("experiment", [ALL], "Of those that --list names, or all.")
  _SCALE = flags.DEFINE_enum(
    "scale",
    "smoke",
    families.SCALES,
    "smoke: minutes; laptop: hours on 2 processors; paper: the paper's sizes, for a pod.",
  )
  _OUT = flags.DEFINE_string("out", "runs/experiments", "Directory for everything.")
  _SEEDS = flags.DEFINE_integer("seeds", 0, "Repetitions; 0: as the scale has them.", lower_bound=0)
  _JOBS = flags.DEFINE_integer(
    "jobs", 0, "Models trained at a time; 0: one per processor.", lower_bound=0
  )
  _TEXT = flags.DEFINE_string("text", "", "Text to train on, as data.source; default: made.")
  _IMAGES = flags.DEFINE_string(
    "images", "", "Images, as data.source, of 28 x 28 gray pixels but at --scale=paper."
  )
  _LIST = flags.DEFINE_bool(
    "list", False, "List the experiments; with --scale=paper also what they train, as commands."
  )
  flags.adopt_module_key_flags(cli)
  cli.run(main)
