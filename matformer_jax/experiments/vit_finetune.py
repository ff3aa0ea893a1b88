"""Nesting in pretraining, in fine-tuning, in both or neither (Table 7).

  python -m matformer_jax.experiments.vit_finetune --config=configs/matvit.py:fashion \\
      --workdir=runs/table7 --pretrain_classes=1,3,5,7,9 --finetune_classes=0,2,4,6,8

Pretrains on some classes and fine-tunes on others, each once plain and once nested:

  plain, plain     a ViT of every size, pretrained and fine-tuned alone
  plain, nested    the largest of these, fine-tuned as a MatViT
  nested, plain    a MatViT; every size extracted and fine-tuned alone
  nested, nested   the MatViT, fine-tuned as one

Nested training takes config.steps (--finetune_steps), plain training a g-th of that, as in
Appendix B.4. Top-1 is of the fine-tuning classes' validation images.
"""

from __future__ import annotations

import pathlib

from absl import flags

from matformer_jax import cli, runtime, tables
from matformer_jax import granularity as gran
from matformer_jax.config import MatViTConfig
from matformer_jax.experiments import commands

CELLS = ("plain, plain", "plain, nested", "nested, plain", "nested, nested")


def run(
  config, model: MatViTConfig, root: pathlib.Path, pretrain: str, finetune: str, finetune_steps: int
) -> dict[str, dict[str, float]]:
  """{cell: {size: top-1}}, trained and measured where not yet done."""
  names, g = gran.names(model), model.num_granularities
  largest_only = "--config.sampling=" + "/".join("0" * (g - 1) + "1")

  def train(name: str, classes: str, steps: int, *args: str) -> pathlib.Path:
    workdir = root / name
    warmup = max(config.optim.warmup_steps * steps // config.steps, 1)
    commands.run(
      "train",
      *commands.overrides(),
      f"--workdir={workdir}",
      "--config.eval.every=0",
      f"--config.data.classes=({classes},)",
      f"--config.steps={steps}",
      f"--config.model.num_classes={len(classes.split(','))}",
      f"--config.optim.warmup_steps={warmup}",
      *args,
    )
    return workdir

  def tuned(name: str, source: pathlib.Path, steps: int, *args: str) -> dict[str, float]:
    workdir = train(name, finetune, steps, f"--config.init_from={source}", *args)
    rows = commands.measured(
      workdir,
      "evaluation.json",
      "evaluate",
      "--metrics=accuracy",
      "--batches=0",  # the whole split
      f"--json={workdir / 'evaluation.json'}",
    )["granularities"]
    return {size: row["accuracy"] for size, row in rows.items()}

  cells: dict[str, dict[str, float]] = {cell: {} for cell in CELLS}
  for name, ratio in zip(names, model.ffn_ratios):
    # The largest one keeps its inner sizes' names, untrained, to be nested later.
    own = [largest_only] if name == names[-1] else [f"--config.model.ffn_ratios=({ratio},)"]
    alone = train(f"pretrained_vit_{name}", pretrain, config.steps // g, *own)
    *_, accuracy = tuned(f"plain_plain_{name}", alone, finetune_steps // g, *own).values()
    cells["plain, plain"][name] = accuracy
  cells["plain, nested"] = tuned("plain_nested", alone, finetune_steps)
  nested = train("pretrained_matvit", pretrain, config.steps)
  for name in names:
    source = nested if name == names[-1] else root / f"extracted_{name}"
    if not source.exists():
      commands.run("extract", f"--workdir={nested}", f"--granularity={name}", f"--out={source}")
    rows = tuned(f"nested_plain_{name}", source, finetune_steps // g, largest_only)
    cells["nested, plain"][name] = rows[name]
  cells["nested, nested"] = tuned("nested_nested", nested, finetune_steps)
  return cells


def table_7(model: MatViTConfig, cells: dict[str, dict[str, float]]) -> str:
  """Table 7: a row per size, a column per cell, in percent."""
  return tables.table(
    ("pretrained, fine-tuned:", "parameters", *CELLS),
    [
      (name, f"{gran.count(model, name).params:,}", *(f"{100 * cells[c][name]:.2f}" for c in CELLS))
      for name in reversed(gran.names(model))
    ],
  )


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  config, model = commands.read_matvit(_CONFIG)
  root = pathlib.Path(workdir)
  pretrain, finetune = ",".join(_PRETRAIN.value), ",".join(_FINETUNE.value)
  steps = _STEPS.value or config.steps
  cells = run(config, model, root, pretrain, finetune, steps)
  print(
    f"\n{config.data.source}: pretrained on classes {pretrain}, fine-tuned and measured on "
    f"{finetune}; top-1 (%), Table 7\n\n{table_7(model, cells)}"
  )
  path = root / "table7.json"
  path.write_text(
    runtime.to_json(
      {
        "model": model.to_dict(),
        "steps": config.steps,
        "finetune_steps": steps,
        "pretrain_classes": pretrain,
        "finetune_classes": finetune,
        "top1": cells,
      },
      indent=1,
    )
  )
  print(f"\nwrote {path}")


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all runs and results.")
  _PRETRAIN = flags.DEFINE_list(
    "pretrain_classes", ["1", "3", "5", "7", "9"], "Classes to pretrain on."
  )
  _FINETUNE = flags.DEFINE_list(
    "finetune_classes", ["0", "2", "4", "6", "8"], "Classes to fine-tune and measure on."
  )
  _STEPS = flags.DEFINE_integer(
    "finetune_steps", 0, "Steps of nested fine-tuning; 0: as many as of pretraining.", lower_bound=0
  )
  flags.adopt_module_key_flags(cli)
  cli.run(main)
