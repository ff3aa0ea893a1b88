"""Speculative decoding: a small granularity drafts, a larger one verifies (Section 4.1.1).

A round: the draft makes k tokens one at a time, the verifier scores all of them in one
pass, and each sequence keeps its own number of them plus one token of the verifier's.
The output is the verifier's: greedily token for token, sampled in distribution
(Leviathan et al. 2023, Algorithm 1, and its Theorem A.1).

A draft sliced from the verifier can share its attention cache (Appendix C.1): it reads
what the verifier wrote, and its own entries are overwritten when they are verified. So
there is one cache and one set of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax.decoding import decode
from matformer_jax.decoding.decode import Decoder, S, State
from matformer_jax.errors import UserError
from matformer_jax.models import matlm

# Choices of draft length where none is given: none where drafting does not pay, short ones
# for poor drafts, long for good.
AUTO_DRAFT_LENGTHS = (0, 1, 2, 4, 8)

# What a random draw at one position is for; 0 is the token itself, see decode.token_keys.
_ACCEPT, _RESIDUAL = 1, 2
# The acceptance rate assumed before any is measured, worth this many tokens of evidence:
# high, so that drafting is tried, and tried again once the evidence against it has faded.
_PRIOR_RATE, _PRIOR_TOKENS = 0.9, 4.0
_FORGET = 0.98  # per round: old evidence fades, since text changes


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("rounds", "drafted", "tested", "accepted"),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Stats:
  """Counts of one batch, float32 [B] (exact below 2^24).

  Attributes:
    rounds: verifier passes.
    drafted: tokens drafted.
    tested: drafted tokens up to and including the first rejected one of each round.
    accepted: tokens accepted.
  """

  rounds: jax.Array
  drafted: jax.Array
  tested: jax.Array
  accepted: jax.Array

  @classmethod
  def zero(cls, state: State) -> Stats:
    """No rounds yet; placed like the state's arrays."""
    return cls(*(0.0 * state.length.astype(jnp.float32) for _ in range(4)))

  def acceptance(self) -> float:
    """a, the chance that a drafted token whose predecessors stand is accepted."""
    return float(jnp.sum(self.accepted) / jnp.maximum(jnp.sum(self.tested), 1))

  def tokens_per_round(self) -> float:
    """Mean tokens a verifier pass yields: accepted ones plus its own."""
    return float(jnp.sum(self.accepted) / jnp.maximum(jnp.sum(self.rounds), 1)) + 1


def expected_tokens(acceptance, draft_length):
  """(1 - a^(k+1)) / (1 - a): tokens a round yields (Leviathan et al., Equation 1)."""
  a = (
    np.minimum(acceptance, 1 - 1e-6)
    if isinstance(acceptance, float)
    else jnp.minimum(acceptance, 1 - 1e-6)
  )
  return (1 - a ** (draft_length + 1)) / (1 - a)


def predicted_speedup(acceptance: float, draft_length: int, cost_ratio: float) -> float:
  """Expected tokens per round over its cost k c + 1, in verifier steps (their Theorem 3.8)."""
  return float(expected_tokens(acceptance, draft_length) / (draft_length * cost_ratio + 1))


@dataclasses.dataclass(frozen=True)
class SpeculativeDecoder:
  """A draft and a verifier; hashable, its programs are cached by value.

  Attributes:
    verifier: what the output equals. Both must have the same sampling and eos_id.
    draft: a submodel of the verifier's model, or a model of its own.
    draft_lengths: k. Several: chosen each round, for the whole batch, from the measured
      acceptance rate and the cost of a round, without leaving the program. 0 decodes
      plainly; it needs the shared cache, since a draft's own would fall behind.
    share_cache: the draft works on the verifier's cache; needs the same stored model.
    draft_vocab: the draft proposes only these token ids (the most frequent ones, see
      `frequent_tokens`), so that its output head is small. Lossless, since the
      verifier checks against the whole vocabulary. None: all.
  """

  verifier: Decoder
  draft: Decoder
  draft_lengths: tuple[int, ...] = (4,)
  share_cache: bool = True
  draft_vocab: tuple[int, ...] | None = None

  def __post_init__(self):
    v, d = self.verifier, self.draft
    if not self.draft_lengths or max(self.draft_lengths) < 1 or min(self.draft_lengths) < 0:
      raise UserError(f"draft_length={self.draft_lengths} must be at least 1")
    if min(self.draft_lengths) == 0 and not self.share_cache:
      raise UserError("draft_length=0 needs share_cache: a draft's own cache would fall behind")
    if (v.sampling, v.eos_id) != (d.sampling, d.eos_id):
      raise UserError("draft and verifier must have the same sampling and end-of-text id")
    if v.config.vocab_size != d.config.vocab_size:
      raise UserError(
        f"the draft's vocabulary of {d.config.vocab_size} is not the verifier's, "
        f"{v.config.vocab_size}; use a draft trained with the same tokenizer"
      )
    if self.share_cache:
      if v.config != d.config:
        raise UserError(
          "only submodels of one model can share a cache; use share_cache=False "
          "for a draft of its own"
        )
      name = lambda m: gran.to_text(m.granularity, m.config)
      wider = [
        (a, b)
        for a, b in zip(
          d.granularity.ffn + d.granularity.heads, v.granularity.ffn + v.granularity.heads
        )
        if a > b
      ]
      if wider:
        raise UserError(
          f"draft {name(d)} has a layer wider than verifier {name(v)}; draft with a "
          "smaller granularity"
        )
    if self.draft_vocab is not None and not all(
      0 <= t < v.config.vocab_size for t in self.draft_vocab
    ):
      raise UserError(f"draft_vocab must be token ids in 0..{v.config.vocab_size - 1}")

  def prefill(
    self,
    weights,
    draft_weights,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    seeds: Sequence[int],
    segments: Sequence[Sequence[int]] | None = None,
  ) -> State:
    """As Decoder.prefill; fills the draft's cache too where it has its own."""
    state = self.verifier.prefill(
      weights, prompts, max_tokens, seeds, max(self.draft_lengths) + 2, segments
    )
    if self.share_cache:
      return state
    width = decode.bucket(max(map(len, prompts)))
    origins = decode.prompt_origins(prompts, segments)
    draft_cache = self.draft.fill(draft_weights, state.tokens, width, origins)
    return dataclasses.replace(state, draft_cache=draft_cache)

  def advance(
    self,
    weights,
    draft_weights,
    state: S,
    steps: int,
    stats: Stats | None = None,
    costs: Sequence[float] | None = None,
  ) -> tuple[S, Stats]:
    """Adds at least `steps` tokens to every sequence that is not done, unless it ends.

    `state` is consumed. A sequence may get up to k more than `steps`.

    Args:
      weights: verifier.lay_out(params).
      draft_weights: draft.lay_out(params); with share_cache pass `weights`.
      stats: counts so far, continued.
      costs: time of a round for each of draft_lengths, in any unit; default k c + 1 with
        c the ratio of matmul parameters.
    """
    self.verifier.check_heads(state)
    if self.share_cache:
      self.draft.check_heads(state)
    counts = Stats.zero(state) if stats is None else stats
    if costs is None:
      costs = [k * self.cost_ratio() + 1 for k in self.draft_lengths]
    state, counts = self._advance(
      weights, draft_weights, state, counts, jnp.int32(steps), jnp.asarray(costs, jnp.float32)
    )
    return dataclasses.replace(state, heads=self.verifier.heads), counts

  def cost_ratio(self) -> float:
    """c by matmul parameters: a draft step's cost over a verifier step's, when memory-bound."""
    size = lambda d: gran.count(d.config, d.granularity).params
    draft = size(self.draft)
    if self.draft_vocab is not None:
      draft -= (self.draft.config.vocab_size - len(self.draft_vocab)) * self.draft.config.d_model
    return draft / size(self.verifier)

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
  def _advance(self, weights, draft_weights, state: State, stats: Stats, steps, costs):
    target = jnp.minimum(state.length + steps, state.limit)
    weights = self.verifier.submodel(weights, state)
    draft_weights = self.draft.submodel(draft_weights, state)
    if self.draft_vocab is not None:
      head = matlm.output_head(draft_weights)
      rows = jnp.take(head, np.array(self.draft_vocab), axis=0)
      draft_weights = {**draft_weights, "draft_head": rows}
    lengths = jnp.array(self.draft_lengths)

    def more(carry):
      state = carry[0]
      return ~jnp.all(state.done | (state.length >= target))

    def choice(carry):
      accepted, tested = carry[2]
      rate = (accepted + _PRIOR_RATE * _PRIOR_TOKENS) / (tested + _PRIOR_TOKENS)
      return jnp.argmax(expected_tokens(rate, lengths) / costs)

    def round_of(k, carry):
      before, evidence = carry[1:]
      state, stats = self._round(weights, draft_weights, k, *carry[:2])
      new = (jnp.sum(stats.accepted - before.accepted), jnp.sum(stats.tested - before.tested))
      return state, stats, tuple(_FORGET * old + n for old, n in zip(evidence, new))

    def body(carry):
      # A loop per length, left once another is better: a switch would copy the cache.
      for i, k in enumerate(self.draft_lengths):
        wanted = lambda carry, i=i: more(carry) & (choice(carry) == i)
        carry = jax.lax.while_loop(wanted, functools.partial(round_of, k), carry)
      return carry

    evidence = (jnp.sum(stats.accepted), jnp.sum(stats.tested))
    return jax.lax.while_loop(more, body, (state, stats, evidence))[:2]

  # What follows is traced inside the program.

  def _round(self, weights, draft_weights, k: int, state: State, stats: Stats):
    start = state.length - 1  # the last token is in no cache yet
    drafted, draft_logits, cache, draft_cache = self._draft(draft_weights, k, state)
    tokens = jnp.concatenate([state.last(), drafted], axis=1)
    hidden, cache = self.verifier.extend(weights, tokens, cache, start, state.origin)
    logits = self.verifier.logits(weights, hidden)
    if self.verifier.sampling.temperature == 0:
      accepted, own = accept_greedy(drafted, logits)
    else:
      accepted, own = self._accept_sampled(drafted, draft_logits, logits, state)
    new = jnp.concatenate([drafted, jnp.zeros_like(own)[:, None]], axis=1)
    new = jnp.where(jnp.arange(k + 1) == accepted[:, None], own[:, None], new)
    alive = 1.0 - state.done
    stats = Stats(
      stats.rounds + alive,
      stats.drafted + k * alive,
      stats.tested + alive * jnp.minimum(accepted + 1, k),
      stats.accepted + alive * accepted,
    )
    state = state.append(
      new, accepted + 1, self.verifier.eos_id, cache=cache, draft_cache=draft_cache
    )
    return state, stats

  def _draft(self, weights, k: int, state: State):
    """k drafted tokens [B, k], their logits [k, B, F], the cache and the draft's own."""
    step = functools.partial(self._draft_step, weights, state)
    if self.share_cache:
      carry = (state.cache, state.last())
    else:
      # Its own cache lacks the last drafted token where all were accepted: two tokens.
      carry = (state.draft_cache, state.last(2))
      carry, first = step(carry, 0)
    rest = jnp.arange(0 if self.share_cache else 1, k)
    (cache, _), outs = jax.lax.scan(step, carry, rest)
    if not self.share_cache:
      outs = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, outs)
    tokens, logits = outs
    caches = (cache, state.draft_cache) if self.share_cache else (state.cache, cache)
    return tokens.T, logits, *caches

  def _draft_step(self, weights, state: State, carry, i):
    cache, tokens = carry
    length = state.length + i
    # After a prompt of one token, two tokens start at -1: what is written there is
    # dropped, and the prompt's own entry is in the cache from the prefill. After a last
    # document of one token the first of the two is another document's: nothing reads it.
    start = length - tokens.shape[1]
    hidden, cache = self.draft.extend(weights, tokens, cache, start, state.origin)
    logits = self._draft_logits(weights, hidden[:, -1:])[:, 0]
    chosen = self.draft.choose(logits, dataclasses.replace(state, length=length))
    if self.draft_vocab is not None:
      chosen = jnp.take(jnp.array(self.draft_vocab, jnp.int32), chosen)
    return (cache, chosen[:, None]), (chosen, logits)

  def _draft_logits(self, weights, hidden):
    """[B, T, F] over the tokens the draft may propose."""
    if self.draft_vocab is None:
      return self.draft.logits(weights, hidden)
    return self.draft.logits({"head": weights["draft_head"]}, hidden)

  def _accept_sampled(self, drafted, draft_logits, logits, state: State):
    sampling = self.verifier.sampling
    p = decode.log_probs(logits, sampling)  # [B, k+1, V]
    q = jnp.moveaxis(decode.log_probs(draft_logits, sampling), 0, 1)  # [B, k, F]
    if self.draft_vocab is not None:
      whole = jnp.full(q.shape[:2] + p.shape[-1:], -jnp.inf)
      q = whole.at[..., np.array(self.draft_vocab)].set(q)
    positions = state.length[:, None] + jnp.arange(drafted.shape[1])
    uniform = jax.vmap(
      lambda at: jax.vmap(jax.random.uniform)(decode.token_keys(state.keys, at, _ACCEPT)), 1, 1
    )(positions)
    accepted, log_residual = accept_sampled(drafted, q, p, uniform)
    keys = decode.token_keys(state.keys, state.length + accepted, _RESIDUAL)
    return accepted, decode.draw(keys, log_residual)


class CostMeter:
  """Times a round of every draft length in the course of generation, for `costs`.

  Each length is made to run for a call or two; then the fastest per token is chosen.
  """

  def __init__(self, lengths: Sequence[int]):
    self._seconds: list[float | None] = [None] * len(lengths)
    self._warm = False

  def costs(self) -> list[float]:
    """What to pass to the next `advance`."""
    known = [s for s in self._seconds if s is not None]
    if len(known) < len(self._seconds):
      return forced(self._seconds.index(None), len(self._seconds))
    return known

  def record(self, seconds: float, rounds: float) -> None:
    """Tells what that call took; the first compiles, and is not counted."""
    if self._warm and None in self._seconds:
      self._seconds[self._seconds.index(None)] = seconds / max(rounds, 1)
    self._warm = True


def forced(index: int, count: int) -> list[float]:
  """Costs that make `advance` choose the draft length at `index` of `count`."""
  return [1.0 if i == index else float("inf") for i in range(count)]


def accept_greedy(drafted, logits) -> tuple[jax.Array, jax.Array]:
  """([B] drafted tokens that are the verifier's choice too, [B] its choice after them).

  Args:
    drafted: [B, k].
    logits: the verifier's, [B, k+1, V].
  """
  choice = jnp.argmax(logits, -1).astype(jnp.int32)
  accepted = _leading(choice[:, :-1] == drafted)
  return accepted, jnp.take_along_axis(choice, accepted[:, None], axis=1)[:, 0]


def accept_sampled(drafted, log_q, log_p, uniform) -> tuple[jax.Array, jax.Array]:
  """Accepts a drafted x with probability min(1, p(x)/q(x)), up to the first rejected.

  Args:
    drafted: [B, k] tokens drawn from q.
    log_q: the draft's log-probabilities, [B, k, V].
    log_p: the verifier's, [B, k+1, V].
    uniform: [B, k] draws in [0, 1).

  Returns:
    ([B] how many are accepted, [B, V] log-weights of the token that follows them:
    max(p - q, 0) after a rejection, p after none).
  """
  at = lambda x, index: jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
  ratio = jnp.exp(at(log_p[:, :-1], drafted) - at(log_q, drafted))
  accepted = _leading(uniform < ratio)
  q = jnp.concatenate([jnp.exp(log_q), jnp.zeros_like(log_p[:, :1])], axis=1)
  row = lambda x: jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0]
  return accepted, jnp.log(jnp.maximum(row(jnp.exp(log_p)) - row(q), 0.0))


def _leading(ok) -> jax.Array:
  """[B] number of leading True of [B, k]."""
  return jnp.sum(jnp.cumprod(ok.astype(jnp.int32), axis=1), axis=1)


def frequent_tokens(tokens: np.ndarray, count: int) -> tuple[int, ...]:
  """The `count` most frequent ids of a token array, most frequent first."""
  frequency = np.bincount(np.asarray(tokens).reshape(-1))
  order = np.argsort(-frequency, kind="stable")[:count]
  return tuple(int(t) for t in order if frequency[t])
