"""Sizes and costs of a model's granularities, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Callable

from matformer_jax import granularity as gran
from matformer_jax import tables
from matformer_jax.config import ModelConfig

TeacherFlops = Callable[[gran.Granularity], int]


def as_json(
  config: ModelConfig,
  chosen: gran.Granularity | None = None,
  teacher_flops: TeacherFlops = lambda g: 0,
) -> dict:
  """JSON-ready sizes: {"model", "granularities": {"S": {...}, ...}, "mix_n_match": {...}}.

  Args:
    chosen: what a budget chose, for `mix_n_match`; left out where None.
    teacher_flops: forward FLOPs of the teacher that a granularity is trained with.
  """
  size = lambda g: _sizes(config, g, teacher_flops)
  result = {
    "model": config.to_dict(),
    "granularities": {gran.to_text(g, config): size(g) for g in gran.trained(config)},
  }
  if chosen is not None:
    result["mix_n_match"] = {"granularity": gran.to_text(chosen, config), **size(chosen)}
  return result


def _sizes(config: ModelConfig, g: gran.Granularity, teacher_flops: TeacherFlops) -> dict:
  n = gran.count(config, g)
  return {
    "params": n.params,
    "non_embedding_params": n.non_embedding_params,
    "ffn_params": n.ffn_params,
    f"flops_per_{config.unit}": n.flops,
    f"train_flops_per_{config.unit}": n.train_flops + teacher_flops(g),
    "weight_bytes_float32": 4 * n.params,
    "weight_bytes_bfloat16": 2 * n.params,
  }


def table(
  config: ModelConfig,
  chosen: gran.Granularity | None = None,
  budget: str | None = None,
  teacher_flops: TeacherFlops = lambda g: 0,
) -> str:
  """The same as a table a person reads."""
  sizes = {
    gran.to_text(g, config): _sizes(config, g, teacher_flops)
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
  taught = any(map(teacher_flops, gran.trained(c)))
  training = "; training has a teacher's too" if taught else ""
  text = (
    f"{', '.join(what)}\n\n{tables.table(header, rows)}\n\n"
    f"FLOPs are of a forward pass, attention counted in full{training}. Mix'n'Match gives "
    f"{mixes:,} more model{'s' * (mixes != 1)} between these."
  )
  if chosen is not None:
    text += f"\nWithin --budget={budget}: {gran.to_text(chosen, config)}"
  return text
