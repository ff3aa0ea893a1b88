"""Cuts a submodel out of a universal checkpoint, as a model directory of its own.

  python -m matformer_jax.extract --workdir=runs/quickstart --granularity='M*2+L*2' --out=models/ml
  python -m matformer_jax.extract --workdir=runs/quickstart --budget=0.6x --out=models/small

Only the slices it needs are read from disk, so memory follows the submodel's size, not
the universal model's. What comes out loads, evaluates, generates, and can be trained
further (--config.init_from), like any other model.
"""

from __future__ import annotations

import os
import time

from absl import flags
import jax
import tqdm

from matformer_jax import cli, models, sharding, storage
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint, model_dir
from matformer_jax.config import ModelConfig, kind_of, model_config
from matformer_jax.errors import UserError
from matformer_jax.evals import latency, sizes
from matformer_jax.runtime import warn


def extract(
  workdir: str | os.PathLike,
  granularity: gran.GranularityLike,
  out: str | os.PathLike,
  step: int | None = None,
) -> ModelConfig:
  """Writes a submodel as a model directory: config, tokenizer, weights, checksums.

  Args:
    workdir: a trained (or itself extracted) model.
    granularity: e.g. "M*8+L*8".
    out: a directory that does not exist yet, or is empty.
    step: which checkpoint; default the newest whose slices verify.

  Returns:
    The submodel's config.

  Raises:
    UserError: for a missing run or step, a granularity that does not parse, or an `out`
      that is taken.
    checkpoint.DamagedCheckpoint: (a UserError) if no step's slices verify.
  """
  workdir, out = storage.path(workdir), checkpoint.check_place(out)
  card = cards.read(workdir)
  config = model_config(card)
  g = gran.parse(granularity, config)
  model_dir.check_free(out)
  steps = [step] if step is not None else checkpoint.steps(workdir)[::-1]
  if not steps or steps[0] not in checkpoint.steps(workdir):
    raise UserError(
      f"{workdir} has no checkpoint"
      + (f" of step {step}" if step else "")
      + f"; it has {', '.join(map(str, checkpoint.steps(workdir))) or 'none'}"
    )
  for number in steps:
    try:
      params = _read(workdir, number, config, g)
      break
    except checkpoint.DamagedCheckpoint as e:
      if number == steps[-1]:
        raise
      warn(f"{e}; trying the step before")
  sub_config = gran.submodel_config(config, g)
  card = card | {
    "model": sub_config.to_dict(),
    "extracted": {
      "from": str(storage.absolute(workdir)),
      "step": number,
      "granularity": gran.to_text(g, config),
    },
  }

  def copy_files(directory: storage.Path) -> None:
    for name in kind_of(card).resolve("objective").files:
      if (workdir / name).exists():
        storage.copy_file(workdir / name, directory / name)

  model_dir.write(out, card, params, number, copy_files)
  return sub_config


def _read(workdir: storage.Path, step: int, config: ModelConfig, g: gran.Granularity):
  """The submodel's parameter tree, read slice by slice."""
  reader = checkpoint.SliceReader(workdir, step, config)
  parts = gran.slices(config, g)

  def read(path, _):
    names = sharding.path_names(path)
    bar.update()
    if names[0] != "blocks":
      return reader.read(names, slice(None), {})
    part = parts[int(names[1])]
    return reader.read(
      ("blocks", str(part.source), *names[2:]),
      slice(part.start, part.stop),
      config.slice_lengths(part.span),
    )

  wanted = jax.eval_shape(
    lambda: models.init_params(gran.submodel_config(config, g), jax.random.key(0))
  )
  with tqdm.tqdm(total=len(jax.tree.leaves(wanted)), desc="reading slices", mininterval=1.0) as bar:
    return jax.tree_util.tree_map_with_path(read, wanted)


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  out = cli.required(_OUT)
  if bool(_GRANULARITY.value) == bool(_BUDGET.value):
    raise UserError("give exactly one of --granularity='M*2+L*2' and --budget=0.6x")
  config = model_config(cards.read(workdir))
  chosen = _GRANULARITY.value or gran.mix_n_match(
    config, _BUDGET.value, profile=latency.read(workdir, config)
  )
  started = time.perf_counter()
  sub_config = extract(workdir, chosen, out, _STEP.value)
  print(sizes.table(sub_config))
  print(
    f"\nwrote {gran.to_text(gran.full(sub_config), sub_config)} to {out} in "
    f"{time.perf_counter() - started:.1f} s"
  )


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained model.")
  _OUT = flags.DEFINE_string("out", None, "New directory for the submodel.")
  _GRANULARITY = flags.DEFINE_string("granularity", None, "What to extract, e.g. 'M*2+L*2'.")
  _BUDGET = flags.DEFINE_string("budget", None, cli.BUDGET_HELP)
  _STEP = cli.define_step()
  cli.run(main)
