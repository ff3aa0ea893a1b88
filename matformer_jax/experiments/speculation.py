"""Speculative decoding with and without MatFormer, timed beside plain decoding (Table 2)."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax.decoding.decode import Decoder
from matformer_jax.decoding.speculative import SpeculativeDecoder, Stats
from matformer_jax.loading import LanguageModel, open_task

LENGTHS = (1, 2, 3, 4)  # tokens drafted at a time; the speed-up is the fastest's
ACCEPTED_AT = 3  # of these, for which acceptance is reported
SEQUENCES = 8
REPETITIONS = 5
_NEVER_ENDS = -1  # no end-of-text: everything decodes equally many tokens


@dataclasses.dataclass
class _Timed:
  """A way of decoding the prompts; `best` is of the decoding alone, in seconds."""

  decoder: Decoder | SpeculativeDecoder
  weights: tuple[Any, ...]
  best: float = float("inf")
  stats: Stats | None = None

  def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    decoder: Any = self.decoder  # a draft's weights come after the verifier's
    state = decoder.prefill(*self.weights, prompts, tokens, range(len(prompts)))
    jax.block_until_ready(state)
    started = time.perf_counter()
    found = decoder.advance(*self.weights, state, tokens)
    state, self.stats = found if isinstance(found, tuple) else (found, None)
    jax.block_until_ready(state)
    self.best = min(self.best, time.perf_counter() - started)


def measure(
  universal: LanguageModel, small: LanguageModel, large: LanguageModel
) -> list[dict[str, Any]]:
  """Greedy decoding of a batch of prompts, for each row of Table 2.

  Args:
    universal: a MatLM, whose smallest size drafts for the largest.
    small, large: models trained alone, of these sizes.

  Returns:
    {draft, acceptance, length, speedup}: the share of tested draft tokens that are accepted, of
    drafts of ACCEPTED_AT tokens; the draft length that is fastest, and its speed beside plain
    decoding's with the same verifier.
  """
  length = universal.config.seq_len
  prompts = _prompts(universal, length // 4)
  tokens = length // 2
  decoder = lambda model, g: Decoder(model.config, model.execution, g, eos_id=_NEVER_ENDS)
  xl, s = (
    decoder(universal, g) for g in (gran.full(universal.config), gran.trained(universal.config)[0])
  )
  alone_xl, alone_s = (decoder(model, gran.full(model.config)) for model in (large, small))
  ours, theirs = xl.lay_out(universal.params), alone_xl.lay_out(large.params)
  drafts = alone_s.lay_out(small.params)
  plain = {"MatLM": _Timed(xl, (ours,)), "alone": _Timed(alone_xl, (theirs,))}
  ways = {
    "S trained alone": (alone_xl, alone_s, False, (theirs, drafts), "alone"),
    "MatLM": (xl, s, False, (ours, ours), "MatLM"),
    "MatLM, shared cache": (xl, s, True, (ours, ours), "MatLM"),
  }
  timed = {
    (name, k): _Timed(SpeculativeDecoder(verifier, draft, (k,), shared), weights)
    for name, (verifier, draft, shared, weights, _) in ways.items()
    for k in LENGTHS
  }
  everything = [*plain.values(), *timed.values()]
  for way in everything:
    way.run(prompts, tokens)  # compiles
    way.best = float("inf")
  for _ in range(REPETITIONS):
    for way in everything:  # in turn, so that all meet the same machine
      way.run(prompts, tokens)
  rows = []
  for name, (*_, beside) in ways.items():
    k = min(LENGTHS, key=lambda k, name=name: timed[name, k].best)
    stats = timed[name, ACCEPTED_AT].stats
    assert stats is not None
    rows.append(
      {
        "draft": name,
        "acceptance": stats.acceptance(),
        "length": k,
        "speedup": plain[beside].best / timed[name, k].best,
      }
    )
  return rows


def _prompts(model: LanguageModel, length: int) -> list[list[int]]:
  """Evenly spread over the validation text."""
  tokens = np.asarray(open_task(model).store.tokens["validation"])
  starts = np.linspace(0, len(tokens) - length, SEQUENCES + 2)[1:-1].astype(int)
  return [tokens[i : i + length].tolist() for i in starts]
