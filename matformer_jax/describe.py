"""What a model is: sizes and costs of every granularity.

python -m matformer_jax.describe --config=configs/matlm.py:850M
python -m matformer_jax.describe --config=configs/matvit.py:B16_i1k_augreg
python -m matformer_jax.describe --workdir=runs/quickstart --json
python -m matformer_jax.describe --config=configs/matlm.py:850M --budget=nonembedding:245.5M
"""

from __future__ import annotations

import functools
import json

from absl import flags

from matformer_jax import cli
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import card as cards
from matformer_jax.config import model_config
from matformer_jax.errors import UserError
from matformer_jax.evals import latency, sizes
from matformer_jax.training import distill


def main(argv) -> None:
  if bool(_WORKDIR.value) == bool(_CONFIG.value is not None):
    raise UserError("give exactly one of --config=configs/matlm.py:ROW and --workdir=DIR")
  teacher_flops = lambda g: 0
  if _WORKDIR.value:
    config = model_config(cards.read(_WORKDIR.value))
  else:
    run = cards.with_model_of_init(cli.read_config(_CONFIG))
    config = model_config(run)
    distillation = distill.from_config(run, config)
    if distillation is not None:
      teacher_flops = functools.partial(distillation.flops, num_tokens=config.num_tokens)
  chosen = None
  if _BUDGET.value:
    profile = latency.read(_WORKDIR.value, config) if _WORKDIR.value else None
    chosen = gran.mix_n_match(config, _BUDGET.value, profile=profile)
  if _JSON.value:
    print(json.dumps(sizes.as_json(config, chosen, teacher_flops), indent=1))
  else:
    print(sizes.table(config, chosen, _BUDGET.value, teacher_flops))


if __name__ == "__main__":
  _CONFIG = cli.define_config(required=False)
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
  _BUDGET = flags.DEFINE_string("budget", None, cli.BUDGET_HELP)
  _JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
  flags.adopt_module_key_flags(cli)
  cli.run(main)
