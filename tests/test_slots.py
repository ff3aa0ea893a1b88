"""Continuous batching: whoever else is there, a sequence is what it would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode import CHANGES, EXECUTIONS, decoder

from matformer_jax import granularity as gran
from matformer_jax.config import Execution
from matformer_jax.decoding import decode, slots
from matformer_jax.decoding.decode import Sampling
from matformer_jax.decoding.slots import SlotDecoder
from matformer_jax.decoding.speculative import SpeculativeDecoder
from matformer_jax.models import matlm, slicing

GREEDY = Sampling()
# (prompt, size, sampling, seed, tokens): more than there are slots, some longer than a piece.
RNG = np.random.default_rng(0)
SEQUENCES = [
  ([5, 6, 7, 1, 2], "S", GREEDY, 0, 9),
  ([9], "XL", GREEDY, 0, 14),
  (RNG.integers(0, 64, 40).tolist(), "M*2+L*2", GREEDY, 0, 12),
  ([60, 2], "M", Sampling(0.9, top_k=20), 5, 7),
  (RNG.integers(0, 64, 17).tolist(), "L", Sampling(1.1, top_p=0.8), 2**32 - 1, 10),
  ([3, 1, 4], "S*1+XL*3", Sampling(0.7), 1, 5),
]


def alone(config, params, execution, sequence, eos_id=-1):
  prompt, size, sampling, seed, count = sequence
  d = decoder(config, size, execution, sampling=sampling, eos_id=eos_id)
  weights = d.lay_out(params)
  state = d.prefill(weights, [prompt], count, [seed])
  return d.advance(weights, state, count).sequences()[0]


def served(config, params, execution, sequences, length=64, eos_id=-1, draft=None):
  """Each sequence in the first slot that becomes free, two tokens a call."""
  d = SlotDecoder(config, execution, gran.full(config), eos_id=eos_id)
  weights = d.lay_out(params)
  state = d.empty(weights, 3, length)
  waiting, results = list(enumerate(sequences)), {}
  running: dict[int, int] = {}
  speculative = draft and SpeculativeDecoder(
    d, dataclasses.replace(d, granularity=gran.parse(draft, config)), (2,)
  )
  while waiting or running:
    for slot in sorted({0, 1, 2} - running.keys()):
      if waiting:
        running[slot], (prompt, size, sampling, seed, count) = waiting.pop(0)
        g = gran.parse(size, config)
        for tokens, start in d.pieces(prompt):
          state = d.read(weights, state, slot, tokens, start, g)
          state = d.advance(weights, state, 1)  # the others go on between the pieces
        state = d.join(state, slot, prompt, count, g, sampling, seed)
    if speculative:
      state, _ = speculative.advance(weights, weights, state, 2)
    else:
      state = d.advance(weights, state, 2)
    for slot, number in list(running.items()):
      if state.done[slot]:
        results[number] = state.sequences()[slot]
        del running[slot]
  return [results[i] for i in range(len(sequences))]


@pytest.mark.parametrize(
  "change, execution, chosen",
  [
    ("plain", "unrolled", range(6)),
    ("gated, groups", "unrolled", (0, 2, 3)),
    ("nested heads", "scan", (0, 2, 4)),
    ("nested heads alone", "scan", (0, 1, 4)),
    ("nested groups of queries", "unrolled", (0, 1, 2)),
    ("nested groups of queries", "scan", (0, 2, 3)),
  ],
)
def test_a_sequence_is_what_it_would_be_alone(small, change, execution, chosen):
  config = dataclasses.replace(small, seq_len=64, **CHANGES[change])
  params = matlm.init_params(config, jax.random.key(1))
  params["blocks"] = jax.tree.map(lambda x: 3 * x, params["blocks"])
  sequences = [SEQUENCES[i] for i in chosen]
  got = served(config, params, EXECUTIONS[execution], sequences)
  for sequence, mine in zip(sequences, got):
    assert mine == alone(config, params, EXECUTIONS[execution], sequence), sequence


def test_in_an_extracted_model(small, lively_params):
  """Whose layers are stored at widths of their own."""
  g = gran.parse("S*1+M*2+L*1", small)
  config = gran.submodel_config(small, g)
  params = slicing.slice_params(lively_params, small, g)
  sequences = [(p, size, *rest) for (p, _, *rest), size in zip(SEQUENCES, ("S", "S*1+M*2+L*1"))]
  got = served(config, params, Execution(), sequences)
  assert got == [alone(config, params, Execution(), s) for s in sequences]


def test_it_ends_at_end_of_text(small, lively_params):
  greedy = [s for s in SEQUENCES if s[2] == GREEDY]
  whole = [alone(small, lively_params, Execution(), s) for s in greedy]
  eos = whole[1][len(greedy[1][0]) + 3]
  got = served(small, lively_params, Execution(), greedy, eos_id=eos)
  assert got == [alone(small, lively_params, Execution(), s, eos) for s in greedy]
  assert got[1] == whole[1][: whole[1].index(eos, 1) + 1]


@pytest.mark.parametrize("change", ["plain", "nested heads"])
def test_a_draft_for_all_slots_changes_nothing(small, change):
  config = dataclasses.replace(small, **CHANGES[change])
  params = matlm.init_params(config, jax.random.key(1))
  params["blocks"] = jax.tree.map(lambda x: 3 * x, params["blocks"])
  greedy = [s for s in SEQUENCES if s[2] == GREEDY]
  got = served(config, params, Execution(), greedy, draft="S")
  assert got == [alone(config, params, Execution(), s) for s in greedy]


def test_a_step_compiles_once(small, lively_params):
  d = SlotDecoder(small, Execution(), gran.full(small))
  weights = d.lay_out(lively_params)
  before = SlotDecoder._advance._cache_size()
  state = d.empty(weights, 5, 64)
  for slot, (prompt, size, sampling, seed, count) in enumerate(SEQUENCES[1:4]):
    g = gran.parse(size, small)
    for piece in d.pieces(prompt):
      state = d.read(weights, state, slot, *piece, g)
    state = d.join(state, slot, prompt, count, g, sampling, seed)
    state = d.advance(weights, state, 1 + slot)
  assert SlotDecoder._advance._cache_size() == before + 1


def test_more_room_keeps_what_is_there(small, lively_params):
  d = SlotDecoder(small, Execution(), gran.full(small))
  weights = d.lay_out(lively_params)
  prompt, size, sampling, seed, count = SEQUENCES[2]
  state, g = d.empty(weights, 2, 64), gran.parse(size, small)
  for piece in d.pieces(prompt):
    state = d.read(weights, state, 1, *piece, g)
  state = d.join(state, 1, prompt, count, g, sampling, seed)
  for length in (128, 64, 128):
    state = d.advance(weights, d.resize(state, length), 4)
    assert state.cache[0]["k"].shape[-2] == state.tokens.shape[1] == length
  assert state.sequences()[1] == alone(small, lively_params, Execution(), SEQUENCES[2])


def test_a_slot_that_is_left_stops(small, lively_params):
  d = SlotDecoder(small, Execution(), gran.full(small))
  weights = d.lay_out(lively_params)
  state = d.empty(weights, 2, 64)
  for slot in (0, 1):
    state = d.join(state, slot, [9], 20, gran.full(small), GREEDY, 0)
  state = d.leave(d.advance(weights, state, 3), np.array([True, False]))
  state = d.advance(weights, state, 3)
  assert state.length.tolist() == [4, 7]


@pytest.mark.parametrize(
  "sampling",
  [Sampling(0.8), Sampling(0.8, 5), Sampling(1.0, 0, 0.7), Sampling(1.3, 7, 0.9), Sampling(1, 99)],
)
def test_each_slot_has_its_own_distribution(small, lively_params, sampling):
  d = SlotDecoder(small, Execution(), gran.full(small))
  state = d.empty(d.lay_out(lively_params), 3, 64)
  others = [GREEDY, Sampling(0.5, 2)]
  for slot, mine in enumerate([*others, sampling]):
    state = d.join(state, slot, [1], 5, gran.full(small), mine, 0)
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)).round(1), jnp.float32)
  want = decode.log_probs(logits[2], sampling)
  np.testing.assert_allclose(slots.log_probs(logits, state)[2], want, atol=1e-5)
