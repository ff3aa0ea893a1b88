"""A dense model made elastic: what its order, the training and the teacher are each worth.

  python -m matformer_jax.experiments.elastify --config=elastify --workdir=runs/elastify \\
      --from=models/SmolLM2-135M --config.data.source='text:books/*.txt' --others='text:news/*.txt'

The loss of every size, and of mixes between them,

  unordered   cut out of the dense model as it is
  ordered     cut after its neurons were sorted by importance
  sampled     trained with sampled sizes, from `ordered`
  distilled   the same, each size learning from the dense model too

on what is held out of the training text and of other texts. Writes results.json and a plot for
each text; finished work is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from absl import flags

from matformer_jax import cli, plots, runtime, storage, tables
from matformer_jax.errors import UserError
from matformer_jax.experiments import commands
from matformer_jax.formats import sources

MODELS = {
  "unordered": "cut as it is",
  "ordered": "cut in order of importance",
  "sampled": "trained with sampled sizes",
  "distilled": "trained with a teacher",
}
TEACHERS = {
  "sampled": ["--config.distill.teacher=none", "--config.distill.weight=0"],
  "distilled": [],  # as the config has it
}


def make(config, source: str, root: pathlib.Path) -> None:
  """Imports and trains what is not there yet."""
  calibration = f"--calibration={config.data.source}"
  for name, order in (("unordered", "--order=none"), ("ordered", calibration)):
    if not (root / name).exists():
      length = f"--seq_len={config.model.seq_len}"
      commands.run("import_model", f"--from={source}", f"--out={root / name}", length, order)
  for name, teacher in TEACHERS.items():
    commands.run(
      "train",
      *commands.overrides(),
      f"--workdir={root / name}",
      f"--config.init_from={root / 'ordered'}",
      *teacher,
    )


def measure(
  root: pathlib.Path, text: str, file: str, ladder: int, batches: int, batch_size: int
) -> dict[str, Any]:
  """{model: {granularity: its row of `evaluate --json`}} on what is held out of a text."""
  rows = {}
  for name in MODELS:
    path = root / name / file
    rows[name] = commands.measured(
      root / name,
      file,
      "evaluate",
      f"--ladder={ladder}",
      f"--batches={batches}",
      f"--batch_size={batch_size}",
      "--metrics=loss",
      f"--json={path}",
      source=text,
    )["granularities"]
  return rows


def losses_table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
  """A row per granularity, smallest first; a column per model."""
  granularities = sorted(rows["ordered"], key=lambda g: rows["ordered"][g]["params"])
  cell = lambda row: f"{row['loss']:.3f} ± {row['loss_stderr']:.3f}"
  return tables.table(
    ["granularity", "parameters", *MODELS.values()],
    [
      [g, f"{rows['ordered'][g]['params']:,}", *(cell(rows[name][g]) for name in MODELS)]
      for g in granularities
    ],
  )


def draw(rows: Mapping[str, Mapping[str, Any]], title: str, path: pathlib.Path) -> None:
  """Loss against parameters, a line per model, with the dense model's loss."""
  with plots.figure(path) as axes:
    for (name, label), marker in zip(MODELS.items(), "vsDo"):
      points = sorted((row["params"] / 1e6, row["loss"]) for row in rows[name].values())
      axes.plot(*zip(*points), marker=marker, markersize=5, label=label)
    dense = max(rows["unordered"].values(), key=lambda row: row["params"])["loss"]
    axes.axhline(dense, color="0.5", linestyle=":", label="the dense model")
    axes.set(xlabel="parameters (million)", ylabel="held-out loss (nats per token)", title=title)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()


def minutes(workdir: pathlib.Path) -> dict[str, float]:
  """What a run spent its time on, over all restarts, by its goodput; not the time between them."""
  spent: dict[str, float] = {}
  for attempt in json.loads((workdir / "goodput.json").read_text()):
    for phase, seconds in attempt["seconds"].items():
      if phase != "down":
        spent[phase] = spent.get(phase, 0) + seconds / 60
  return spent


def main(argv) -> None:
  cli.check(argv)
  root = storage.local(cli.required(_WORKDIR), "--workdir")
  config = cli.read_config(_CONFIG)
  dense = cli.required(_FROM, sources.WHAT_TO_GIVE)
  if config.distill.teacher == "none":
    raise UserError("config.distill.teacher=none would train the same model twice")
  root.mkdir(parents=True, exist_ok=True)
  make(config, dense, root)
  tokens = config.steps * config.batch_size * config.model.seq_len
  result: dict[str, Any] = {
    "steps": config.steps,
    "tokens": tokens,
    "minutes": {name: minutes(root / name) for name in TEACHERS},
    "texts": {},
  }
  for i, text in enumerate([config.data.source, *_OTHERS.value]):
    rows = measure(
      root, text, f"evaluation_{i}.json", _LADDER.value, _BATCHES.value, config.eval.batch_size
    )
    result["texts"][text] = rows
    print(f"\n{text}: nats per token of what is held out\n\n{losses_table(rows)}")
    where = "held out of the training text" if i == 0 else f"on {text}"
    title = f"{pathlib.Path(dense).stem} made elastic, {where}"
    draw(rows, title, root / f"elastify_{i}.png")
  print(f"\n{config.steps:,} steps, {tokens:,} tokens")
  for name, spent in result["minutes"].items():
    print(
      f"{MODELS[name]}: {sum(spent.values()):.1f} minutes, {spent['step']:.1f} of them in steps"
    )
  (root / "results.json").write_text(runtime.to_json(result, indent=1))
  print(f"\nwrote {root / 'results.json'} and a plot for each text")


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all models and results.")
  _FROM = flags.DEFINE_string("from", None, "Hugging Face directory, or .gguf file.")
  _OTHERS = flags.DEFINE_list("others", [], "More texts to measure on, e.g. text:GLOB.")
  _LADDER = flags.DEFINE_integer("ladder", 9, "About how many mixes to measure.", lower_bound=0)
  _BATCHES = flags.DEFINE_integer(
    "batches", 8, "Batches to measure each on; 0: all that is held out.", lower_bound=0
  )
  flags.adopt_module_key_flags(cli)
  cli.run(main)
