"""Evolutionary search beside Mix'n'Match (Appendix D, Figure 6, Table 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from matformer_jax import granularity as gran
from matformer_jax import search, tables
from matformer_jax.errors import UserError
from matformer_jax.evals import stderr
from matformer_jax.experiments import claims
from matformer_jax.experiments.claims import Claim
from matformer_jax.experiments.families import MATFORMER
from matformer_jax.experiments.lab import Finding, Lab
from matformer_jax.experiments.runs import Run
from matformer_jax.loading import open_task

# Fractions of the layers that have the larger of two neighbouring sizes in Table 5's four
# Mix'n'Match models: (sizes, layers of 16 with the second). The fourth is as listed there; its
# budget of 377M would be that of 8 layers.
TABLE_5 = ((("M", "M"), 0), (("M", "L"), 4), (("M", "L"), 11), (("L", "XL"), 13))


def figure6_table5(lab: Lab) -> Finding:
  """Evolutionary search beside Mix'n'Match at four budgets (Appendix D)."""
  family = lab.scale.text
  rows: list[dict[str, Any]] = []
  for seed in lab.seeds:
    run = lab.universal(family, MATFORMER, seed)
    found = lab.measured(
      f"{run.key}-nas{lab.scale.architectures}",
      [run],
      lambda run=run, seed=seed: _search(lab, run, seed),
    )
    rows += [{"seed": seed, **row} for row in found]
  minus = {
    budget: [r["nas_minus_mix"] for r in rows if r["budget"] == budget]
    for budget in dict.fromkeys(r["budget"] for r in rows)
  }
  found = [
    claims.at_every_size(
      "Mix'n'Match is at least as good as the search at every budget (within 0.002)",
      "+0.013, +0.006, +0.010 for three of the four",
      minus,
      lambda values: claims.above(values, -0.002),
    ),
    _monotone(rows, lab),
  ]
  cost = tables.table(
    ("seed", "architectures", "windows each", "measuring, s", "searching, s", "rank correlation"),
    [
      (
        str(r["seed"]),
        str(r["measured"]),
        str(r["windows"]),
        f"{r['seconds_measuring']:.0f}",
        f"{r['seconds_searching']:.0f}",
        f"{r['rank_correlation']:.3f}",
      )
      for r in rows
      if r["budget"] == rows[0]["budget"]
    ],
  )
  chosen = tables.table(
    ("budget", "seed", "Mix'n'Match", "loss", "search", "loss", "difference"),
    [
      (
        r["budget"],
        str(r["seed"]),
        r["mix"],
        f"{r['mix_loss']:.4f}",
        r["nas"],
        f"{r['nas_loss']:.4f}",
        f"{r['nas_minus_mix']:+.4f} ± {r['stderr']:.4f}",
      )
      for r in rows
    ],
  )
  return Finding(rows, found, [("Table 5", chosen), ("What the search took", cost)])


def _monotone(rows: Sequence[Mapping[str, Any]], lab: Lab) -> Claim:
  """Whether what the search found gets better with the budget, which Gemma 3n's does not."""
  ok = []
  for seed in lab.seeds:
    losses = [r["nas_loss"] for r in rows if r["seed"] == seed]
    ok.append(all(a >= b for a, b in zip(losses, losses[1:])))
  return Claim(
    "Searched mixes get better with the budget (Gemma 3n's published curve does not always)",
    "not in the paper",
    f"for {sum(ok)} of {len(ok)} seeds",
    claims.UNDECIDED if len(ok) < 2 else claims.HOLDS if all(ok) else claims.FAILS,
  )


def budget_mixes(num_layers: int) -> list[str]:
  """Table 5's four Mix'n'Match models, for a model of any depth."""
  texts = []
  for (small, large), of_16 in TABLE_5:
    more = max(1, min(num_layers - 1, round(of_16 * num_layers / 16))) if of_16 else 0
    less = num_layers - more
    texts.append(f"{small}*{less}+{large}*{more}" if more else small)
  return texts


def _search(lab: Lab, run: Run, seed: int) -> list[dict[str, Any]]:
  """A row per budget: what each finds there, and its loss on text that neither has seen."""
  model = lab.load_text(run)
  config = model.config
  compared = lab.scale.batches
  batches = search.validation_batches(open_task(model), 2 * compared)
  if len(batches) <= compared:
    raise UserError(
      f"the held-out text has {len(batches)} batches, and the search needs more than {compared}: "
      "give more --text"
    )
  seen = batches[compared : compared + max(compared // 8, 1)]  # by the search
  measure = functools.partial(search.score, config, model.execution, model.params)
  mixes = [gran.parse(text, config) for text in budget_mixes(config.num_layers)]
  budgets = [str(gran.count(config, mix).params) for mix in mixes]
  number = lab.scale.architectures
  found = search.search_architectures(
    config, budgets, number, functools.partial(measure, batches=seen), seed
  )
  # As in D.2: the better of what evolution found and of what was measured. What a program call
  # scores is some models at once, so all are given together.
  on_search = measure([c.granularity for c in found.found], batches=seen).mean(1)
  best = []
  for budget in budgets:
    mine = [i for i, candidate in enumerate(found.found) if candidate.budget == budget]
    best.append(found.found[min(mine, key=lambda i: on_search[i])].granularity)
  losses = measure([*mixes, *best], batches=batches[:compared])
  text = lambda g: gran.to_text(g, config)
  top = gran.count(config, gran.full(config)).params
  rows = []
  columns = mixes, best, budgets, losses[: len(mixes)], losses[len(mixes) :]
  for mix, chosen, budget, ours, theirs in zip(*columns):
    paired = theirs - ours
    rows.append(
      {
        "budget": f"{int(budget) / top:.2f}x",
        "params": int(budget),
        "mix": text(mix),
        "mix_loss": float(ours.mean()),
        "nas": text(chosen),
        "nas_loss": float(theirs.mean()),
        "nas_minus_mix": float(paired.mean()),
        "stderr": stderr(paired) if len(paired) > 1 else 0.0,
        "measured": found.measured,
        "windows": found.windows,
        "seconds_measuring": found.seconds[0],
        "seconds_searching": found.seconds[1],
        "rank_correlation": found.predictor.rank_correlation,
        "predictor_mse": found.predictor.mse,
      }
    )
  return rows
