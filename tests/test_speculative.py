"""Speculative decoding: the verifier's text, and the verifier's distribution."""

import dataclasses

from helpers import GROUPED
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2
from test_decode import EXECUTIONS, PROMPTS, decoder, full_logits, reference_probs, run

import matformer_jax
from matformer_jax import UserError
from matformer_jax.config import MatLMConfig
from matformer_jax.decoding import speculative
from matformer_jax.decoding.decode import Sampling
from matformer_jax.decoding.speculative import SpeculativeDecoder
from matformer_jax.models import matlm


def speculate(
  s: SpeculativeDecoder,
  params,
  prompts=PROMPTS,
  max_tokens=12,
  seeds=None,
  chunks=(100,),
  draft_params=None,
  costs=None,
):
  weights = s.verifier.lay_out(params)
  draft_weights = weights if draft_params is None else s.draft.lay_out(draft_params)
  state = s.prefill(weights, draft_weights, prompts, max_tokens, seeds or range(len(prompts)))
  stats = None
  for steps in chunks:
    state, stats = s.advance(weights, draft_weights, state, steps, stats, costs)
  return state.sequences(), stats


# -------------------------------------------------------------------- greedy


@pytest.mark.parametrize("share", [True, False], ids=["shared", "two caches"])
@pytest.mark.parametrize(
  "sizes,k", [(("S", "XL"), 8), (("L", "XL"), 1), (("S", "M"), 3), (("S*2+M*2", "L"), 3)]
)
def test_greedy_text_is_the_verifiers(small, lively_params, sizes, k, share):
  """Prompts of one token and more, eight sequences, each with its own acceptances."""
  draft, verifier = (decoder(small, name) for name in sizes)
  prompts = PROMPTS + [[i, 7 * i] for i in range(1, 5)]
  have, stats = speculate(SpeculativeDecoder(verifier, draft, (k,), share), lively_params, prompts)
  assert have == run(verifier, lively_params, prompts)
  assert np.all(stats.accepted <= stats.tested) and np.all(stats.tested <= stats.drafted)
  assert len(set(np.asarray(stats.accepted).tolist())) > 1  # sequences differ


@pytest.mark.parametrize("change", [{"nested_heads": True}, GROUPED | {"ffn_groups": 2}])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_greedy_text_of_other_models(small, change, execution):
  config = dataclasses.replace(small, **change)
  params = matlm.init_params(config, jax.random.key(3))
  draft, verifier = (decoder(config, n, EXECUTIONS[execution]) for n in ("S", "XL"))
  for options in ({}, {"share_cache": False}, {"draft_vocab": tuple(range(40))}):
    have, _ = speculate(SpeculativeDecoder(verifier, draft, (3,), **options), params)
    assert have == run(verifier, params)


@pytest.fixture(scope="module")
def trained(tiny_run):
  model = matformer_jax.load(tiny_run)
  texts = ["def ", "import os\n", "class A:\n", "    return ", "x", "for i in ", "\n\n", "# "]
  return model, [model.tokenizer.encode(t) for t in texts]


@pytest.mark.parametrize(
  "kwargs",
  [
    {"draft_lengths": (4,)},
    {"draft_lengths": (0, 1, 2, 4, 8)},
    {"share_cache": False},
    {"draft_vocab": tuple(range(300, 512))},
  ],
  ids=lambda kwargs: next(iter(kwargs)),
)
def test_greedy_text_of_a_trained_model(trained, kwargs):
  """Eight sequences of 150 tokens that end at end-of-text, in several calls."""
  model, prompts = trained
  draft, verifier = (decoder(model.config, n, eos_id=11) for n in ("S", "XL"))
  s = SpeculativeDecoder(verifier, draft, **kwargs)
  have, stats = speculate(s, model.params, prompts, 150, chunks=(1, 7, 40, 150))
  assert have == run(verifier, model.params, prompts, 150, chunks=(150,))
  assert stats.acceptance() > 0.2


def test_a_perfect_draft_is_always_accepted(small, lively_params):
  verifier = decoder(small)
  _, stats = speculate(SpeculativeDecoder(verifier, verifier, (3,)), lively_params, max_tokens=24)
  assert stats.acceptance() == 1 and stats.tokens_per_round() == 4
  assert np.asarray(stats.rounds).tolist() == [6] * 4


def test_a_draft_of_its_own(small, lively_params):
  """An independently initialised model of another shape drafts for ours."""
  config = MatLMConfig(vocab_size=64, num_layers=1, d_model=16, num_heads=2, seq_len=16)
  own = decoder(config)
  params = matlm.init_params(config, jax.random.key(9))
  verifier = decoder(small, "L")
  have, _ = speculate(
    SpeculativeDecoder(verifier, own, (3,), False), lively_params, draft_params=params
  )
  assert have == run(verifier, lively_params)


def test_draft_length_follows_acceptance(small, lively_params):
  verifier = decoder(small)
  good = SpeculativeDecoder(verifier, verifier, (1, 8))
  _, stats = speculate(good, lively_params, max_tokens=90, costs=(1.0, 1.5))
  assert np.all(np.asarray(stats.drafted) > 7 * np.asarray(stats.rounds))  # nearly always 8
  params = matlm.init_params(small, jax.random.key(77))
  poor = SpeculativeDecoder(verifier, decoder(small), (1, 8), False)
  _, stats = speculate(poor, lively_params, max_tokens=90, draft_params=params, costs=(1.0, 3.0))
  assert stats.acceptance() < 0.5
  assert np.all(np.asarray(stats.drafted) < 2.5 * np.asarray(stats.rounds))  # mostly 1


def test_a_length_can_be_forced_and_is_timed(small, lively_params):
  lengths = (0, 2, 5)
  s = SpeculativeDecoder(decoder(small), decoder(small, "S"), lengths)
  want = run(s.verifier, lively_params)
  for i, k in enumerate(lengths):
    have, stats = speculate(s, lively_params, costs=speculative.forced(i, 3))
    assert have == want
    assert np.array_equal(stats.drafted, k * stats.rounds)
  meter = speculative.CostMeter(lengths)
  for seconds in (9.0, 0.2, 0.6, 0.8):  # the first call compiles
    assert meter.costs().count(float("inf")) == 2
    meter.record(seconds, rounds=2)
  assert meter.costs() == [0.1, 0.3, 0.4]


def test_one_compile_and_one_cache(small, lively_params):
  config = dataclasses.replace(small, vocab_size=62)  # programs no other test made
  params = {**lively_params, "embedding": lively_params["embedding"][:62]}
  s = SpeculativeDecoder(decoder(config), decoder(config, "S"), (2,))
  before = SpeculativeDecoder._advance._cache_size()
  for _ in range(2):
    speculate(s, params, [[5]] * 4, chunks=(1, 2, 9))
  assert SpeculativeDecoder._advance._cache_size() - before == 1
  weights = s.verifier.lay_out(params)
  assert s.prefill(weights, weights, [[5]], 4, [0]).draft_cache is None


# ------------------------------------------------------------------- sampling

FALSE_ALARM = 1e-6  # of each statistical test below
V = 8


def chi_square(counts, expected) -> tuple[float, float]:
  """Pearson's statistic over cells with expected counts of 5 or more, and its limit."""
  cells = expected >= 5
  rest = ~cells
  counts = np.append(counts[cells], counts[rest].sum())
  expected = np.append(expected[cells], expected[rest].sum())
  counts, expected = counts[expected > 0], expected[expected > 0]
  return (
    float(np.sum((counts - expected) ** 2 / expected)),
    float(chi2.ppf(1 - FALSE_ALARM, len(counts) - 1)),
  )


class AcceptsTooMuch(SpeculativeDecoder):
  """Deliberately wrong: accepts with probability sqrt(p / q)."""

  def _accept_sampled(self, drafted, draft_logits, logits, state):
    ratio = speculative.accept_sampled
    try:
      speculative.accept_sampled = lambda d, q, p, u: ratio(d, q, p, u**2)
      return super()._accept_sampled(drafted, draft_logits, logits, state)
    finally:
      speculative.accept_sampled = ratio


class ForgetsTheResidual(SpeculativeDecoder):
  """Deliberately wrong: after a rejection draws from p, not from max(p - q, 0)."""

  def _accept_sampled(self, drafted, draft_logits, logits, state):
    right = speculative.accept_sampled

    def wrong(drafted, log_q, log_p, uniform):
      accepted, _ = right(drafted, log_q, log_p, uniform)
      return accepted, jnp.take_along_axis(log_p, accepted[:, None, None], axis=1)[:, 0]

    try:
      speculative.accept_sampled = wrong
      return super()._accept_sampled(drafted, draft_logits, logits, state)
    finally:
      speculative.accept_sampled = right


RULES = {
  "right": (SpeculativeDecoder, {}),
  "two caches": (SpeculativeDecoder, {"share_cache": False}),
  "lengths chosen": (SpeculativeDecoder, {"draft_lengths": (0, 1, 3)}),
  "draft vocabulary": (SpeculativeDecoder, {"draft_vocab": (1, 3, 4, 6)}),
  "accepts too much": (AcceptsTooMuch, {}),
  "no residual": (ForgetsTheResidual, {}),
}
FILTERED = Sampling(0.9, top_k=6, top_p=0.9)


@pytest.fixture(scope="module")
def tiny_vocab():
  config = MatLMConfig(vocab_size=V, num_layers=2, d_model=16, num_heads=2, seq_len=16)
  params = matlm.init_params(config, jax.random.key(5))
  return config, {**params, "blocks": jax.tree.map(lambda x: 4 * x, params["blocks"])}


@pytest.mark.parametrize(
  "rule,sampling", [("right", Sampling(1.0)), *((rule, FILTERED) for rule in RULES)]
)
def test_the_distribution_is_the_verifiers(tiny_vocab, rule, sampling):
  """The joint distribution of three tokens after one prompt, over 20,000 sequences.

  A right rule fails this with probability 1e-6; the deliberately wrong ones must fail it.
  """
  config, params = tiny_vocab
  cls, kwargs = RULES[rule]
  kwargs = {"draft_lengths": (2,), **kwargs}
  draft, verifier = (decoder(config, n, sampling=sampling) for n in ("S", "XL"))
  number, prompt = 20_000, [3, 1]
  have, stats = speculate(
    cls(verifier, draft, **kwargs), params, [prompt] * number, 3, seeds=range(number)
  )
  assert 0.3 < stats.acceptance() < 0.98
  joint = np.zeros((V, V, V))
  probs = lambda tokens: reference_probs(
    full_logits(config, params, "XL", prompt + tokens)[-1], sampling
  )
  for a, p_a in enumerate(probs([])):
    for b, p_b in enumerate(probs([a])):
      joint[a, b] = p_a * p_b * probs([a, b])
  triples = np.array([s[2:] for s in have])
  counts = np.zeros((V, V, V))
  np.add.at(counts, tuple(triples.T), 1)
  if "wrong" not in cls.__doc__:
    assert np.all(joint[counts > 0] > 0)  # nothing that top-k or top-p excludes
  statistic, limit = chi_square(counts.reshape(-1), number * joint.reshape(-1))
  assert (statistic < limit) == ("wrong" not in cls.__doc__), (statistic, limit)


def test_acceptance_by_hand():
  """q = 1/2, 1/2, 0 and p = 3/4, 1/4, 0: token 1 is accepted every other time, token 2 never."""
  log_q = jnp.log(jnp.array([[[0.5, 0.5, 0.0]]]))
  log_p = jnp.log(jnp.array([[[0.75, 0.25, 0.0]] * 2]))

  def accept(token, uniform):
    count, log_weights = speculative.accept_sampled(
      jnp.array([[token]]), log_q, log_p, jnp.array([[uniform]])
    )
    return int(count[0]), np.exp(log_weights[0]).round(6).tolist()

  assert accept(1, 0.49) == accept(0, 0.999) == (1, [0.75, 0.25, 0.0])
  assert accept(1, 0.51) == (0, [0.25, 0.0, 0.0])
  log_q = jnp.log(jnp.array([[[0.25, 0.25, 0.5]]]))  # the draft may want what the verifier excludes
  assert accept(2, 0.0) == (0, [0.5, 0.0, 0.0])


# ------------------------------------------------------------- formula, errors


def test_formula():
  """Figures worked out by hand from Leviathan et al., Equation 1 and Theorem 3.8."""
  assert speculative.expected_tokens(0.5, 2) == pytest.approx(1.75)
  assert speculative.predicted_speedup(0.8, 4, 0.25) == pytest.approx(3.3616 / 2)
  assert speculative.expected_tokens(1.0, 3) == pytest.approx(4, rel=1e-4)


def test_frequent_tokens():
  assert speculative.frequent_tokens(np.array([3, 1, 3, 2, 1, 3]), 2) == (3, 1)
  assert speculative.frequent_tokens(np.array([3, 1, 3]), 5) == (3, 1)


def test_mistakes(small):
  xl, s = decoder(small), decoder(small, "S")
  other = decoder(dataclasses.replace(small, vocab_size=32))
  deep = decoder(dataclasses.replace(small, num_layers=2, spans=None))
  for args, words in [
    ((s, xl), "wider than verifier S"),
    ((xl, other, (2,), False), "vocabulary of 32"),
    ((xl, deep), "share a cache"),
    ((xl, s, (0,)), "draft_length"),
    ((xl, s, ()), "draft_length"),
    ((xl, s, (0, 2), False), "share_cache"),
    ((xl, s, (1,), True, (64,)), "draft_vocab"),
    ((xl, decoder(small, "S", eos_id=3)), "same sampling"),
  ]:
    with pytest.raises(UserError, match=words):
      SpeculativeDecoder(*args)
