"""What a model is: sizes and costs of every granularity.

  python -m matformer_jax.describe --config=configs/matlm.py:850M
  python -m matformer_jax.describe --workdir=runs/quickstart --json
"""

from __future__ import annotations

import json

from absl import flags

from matformer_jax import checkpoint, cli, tables
from matformer_jax import granularity as gran
from matformer_jax.config import ModelConfig
from matformer_jax.errors import UserError


def describe(config: ModelConfig) -> dict:
  """JSON-ready sizes: {"model": ..., "granularities": {"S": {...}, ...}}."""
  rows = {}
  for g in gran.uniform(config):
    n = gran.count(config, g)
    rows[gran.to_text(g, config)] = {
        "params": n.params,
        "non_embedding_params": n.non_embedding_params,
        "ffn_params": n.ffn_params,
        "flops_per_token": n.flops_per_token,
        "train_flops_per_token": n.train_flops_per_token,
        "weight_bytes_float32": 4 * n.params,
        "weight_bytes_bfloat16": 2 * n.params,
    }
  return {"model": config.to_dict(), "granularities": rows}


def report(config: ModelConfig) -> str:
  """The same as a table a person reads."""
  rows = [(name, f"{r['params']:,}", f"{r['non_embedding_params']:,}", f"{r['ffn_params']:,}",
           tables.si(r["flops_per_token"]), tables.si(r["train_flops_per_token"]),
           tables.si(r["weight_bytes_float32"], "B"), tables.si(r["weight_bytes_bfloat16"], "B"))
          for name, r in describe(config)["granularities"].items()]
  header = ("granularity", "parameters", "non-embedding", "FFN", "FLOPs/token", "training",
            "float32", "bfloat16")
  c = config
  what = [f"{c.num_layers} layers", f"d_model {c.d_model}", f"{c.num_heads} heads",
          f"vocabulary {c.vocab_size:,}", f"context {c.seq_len:,}",
          f"{'gated ' if c.gated else ''}{c.activation} FFN widths "
          + "/".join(map(str, c.ffn_widths))]
  if c.nested_heads:
    what.append("heads " + "/".join(map(str, c.head_counts)))
  mixes = len(gran.mix_n_match_ladder(c)) - len(rows)
  return (f"{', '.join(what)}\n\n{tables.table(header, rows)}\n\n"
          f"FLOPs are per token at the training context, attention counted in full. Between the "
          f"sizes lie {mixes:,} Mix'n'Match models.")


def main(argv) -> None:
  if bool(_WORKDIR.value) == bool(_CONFIG.value is not None):
    raise UserError("give exactly one of --config=configs/matlm.py:ROW and --workdir=DIR")
  if _WORKDIR.value:
    model = checkpoint.read_card(_WORKDIR.value)["model"]
  else:
    model = cli.read_config(_CONFIG).model
  config = ModelConfig.from_dict(model)
  print(json.dumps(describe(config), indent=1) if _JSON.value else report(config))


if __name__ == "__main__":
  _CONFIG = cli.define_config(required=False)
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
  _JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
  flags.adopt_module_key_flags(cli)
  cli.run(main)
