"""Sizes and costs of a model's granularities, as JSON and as a table."""

from __future__ import annotations

from matformer_jax import granularity as gran
from matformer_jax import tables
from matformer_jax.config import ModelConfig


def as_json(config: ModelConfig, chosen: gran.Granularity | None = None) -> dict:
  """JSON-ready sizes: {"model", "granularities": {"S": {...}, ...}, "mix_n_match": {...}}.

  Args:
    chosen: what a budget chose, for `mix_n_match`; left out where None.
  """
  result = {
    "model": config.to_dict(),
    "granularities": {gran.to_text(g, config): _sizes(config, g) for g in gran.trained(config)},
  }
  if chosen is not None:
    result["mix_n_match"] = {"granularity": gran.to_text(chosen, config), **_sizes(config, chosen)}
  return result


def _sizes(config: ModelConfig, g: gran.Granularity) -> dict:
  n = gran.count(config, g)
  return {
    "params": n.params,
    "non_embedding_params": n.non_embedding_params,
    "ffn_params": n.ffn_params,
    f"flops_per_{config.unit}": n.flops,
    f"train_flops_per_{config.unit}": n.train_flops,
    "weight_bytes_float32": 4 * n.params,
    "weight_bytes_bfloat16": 2 * n.params,
  }


def table(
  config: ModelConfig, chosen: gran.Granularity | None = None, budget: str | None = None
) -> str:
  """The same as a table a person reads."""
  sizes = {
    gran.to_text(g, config): _sizes(config, g)
    for g in [*gran.trained(config), *([chosen] if chosen else [])]
  }
  rows = [
    (
      name,
      f"{r['params']:,}",
      f"{r['non_embedding_params']:,}",
      f"{r['ffn_params']:,}",
      tables.si(r[f"flops_per_{config.unit}"]),
      tables.si(r[f"train_flops_per_{config.unit}"]),
      tables.si(r["weight_bytes_float32"], "B"),
      tables.si(r["weight_bytes_bfloat16"], "B"),
    )
    for name, r in sorted(sizes.items(), key=lambda item: item[1]["params"])
  ]
  c = config
  header = (
    "granularity",
    "parameters",
    c.blocks_name,
    "FFN",
    f"FLOPs/{c.unit}",
    "training",
    "float32",
    "bfloat16",
  )
  what = [
    c.summary,
    f"{'gated ' if c.gated else ''}{c.activation} FFN widths " + "/".join(map(str, c.ffn_widths)),
  ]
  mixes = len(gran.mix_n_match_ladder(c)) - len(gran.trained(c))
  text = (
    f"{', '.join(what)}\n\n{tables.table(header, rows)}\n\n"
    "FLOPs are of a forward pass, attention counted in full. Mix'n'Match gives "
    f"{mixes:,} more model{'s' * (mixes != 1)} between these."
  )
  if chosen is not None:
    text += f"\nWithin --budget={budget}: {gran.to_text(chosen, config)}"
  return text
