"""Decoding with a cache against running the whole model at every token."""

import dataclasses
import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matformer_jax import UserError, sharding
from matformer_jax import granularity as gran
from matformer_jax.config import Execution
from matformer_jax.decoding.decode import Decoder, Sampling, log_probs
from matformer_jax.models import matlm, ops

PROMPTS = [[5, 6, 7, 1, 2], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [60, 2]]
EXECUTIONS = {"unrolled": Execution(), "scan": Execution(scan_layers=True, flat_weights=False)}
CHANGES = {
  "plain": {},
  "gated, groups": {"gated": True, "ffn_groups": 2, "head_groups": 2},
  "nested heads": {"nested_heads": True},
  "nested heads alone": helpers.HEADS_ONLY,
  "grouped queries": helpers.GROUPED | {"head_groups": 2},
  "nested groups of queries": helpers.GROUPED | {"nested_heads": True},
}


def decoder(config, granularity="XL", execution=Execution(), **kwargs) -> Decoder:
  return Decoder(config, execution, gran.parse(granularity, config), **kwargs)


def run(d: Decoder, params, prompts=PROMPTS, max_tokens=12, seeds=None, chunks=(100,)):
  weights = d.lay_out(params)
  state = d.prefill(weights, prompts, max_tokens, seeds or range(len(prompts)))
  for steps in chunks:
    state = d.advance(weights, state, steps)
  return state.sequences()


@functools.partial(jax.jit, static_argnums=(2, 3))
def _full(params, tokens, config, granularity):
  return matlm.MatLM(config).apply({"params": params}, tokens, granularity=granularity)


def full_logits(config, params, granularity, sequence) -> np.ndarray:
  """The whole model's logits, run anew; padded, so that lengths share a program."""
  padded = np.zeros((1, 32), np.int32)
  padded[0, : len(sequence)] = sequence
  logits = _full(params, padded, config, gran.parse(granularity, config))
  return np.asarray(logits[0, : len(sequence)])


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("granularity", ["S", "M*1+L*3"])
def test_logits_equal_the_full_forward(small, change, execution, granularity):
  """Rows of different lengths, extended by one token, then by three at once."""
  config = dataclasses.replace(small, **CHANGES[change])
  params = matlm.init_params(config, jax.random.key(1))
  d = decoder(config, granularity, EXECUTIONS[execution])
  weights = d.lay_out(params)
  rng = np.random.default_rng(0)
  sequences = [p + rng.integers(0, 64, 4).tolist() for p in PROMPTS]
  state = d.prefill(weights, PROMPTS, 8, range(4))
  submodel, start, cache = d.submodel(weights), state.length, state.cache
  have = []
  for count in (1, 3):
    offset = len(have)
    tokens = np.array(
      [s[len(p) + offset : len(p) + offset + count] for s, p in zip(sequences, PROMPTS)]
    )
    hidden, cache = jax.jit(d.extend)(submodel, tokens, cache, start + offset)
    have += list(np.moveaxis(np.asarray(d.logits(submodel, hidden)), 1, 0))
  for row, (prompt, sequence) in enumerate(zip(PROMPTS, sequences)):
    want = full_logits(config, params, granularity, sequence)[len(prompt) :]
    mine = np.stack([step[row] for step in have])
    np.testing.assert_allclose(mine, want, atol=1e-4)
    np.testing.assert_array_equal(mine.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_greedy_equals_rerunning_the_model(small, lively_params, execution):
  for granularity in ("S", "M*2+L*2"):
    for prompt, sequence in zip(
      PROMPTS, run(decoder(small, granularity, EXECUTIONS[execution]), lively_params)
    ):
      choice = full_logits(small, lively_params, granularity, sequence).argmax(-1)
      assert len(sequence) == len(prompt) + 12
      assert sequence[len(prompt) :] == choice[len(prompt) - 1 : -1].tolist()


def mixed_logits(config, params, sequence, sizes) -> np.ndarray:
  """The whole model with a granularity per position: FFN neurons beyond it are zeroed."""
  p, d, h = params["blocks"]["0"], config.d_model, config.head_dim
  x = params["embedding"][np.array(sequence)] * d**0.5
  length = len(sequence)
  width = np.array([config.ffn_widths[i] for i in sizes])
  table = ops.rope_table(length, h, config.rope_base)
  for layer in range(config.num_layers):
    y = ops.rms_norm(x, p["attention_norm"]["scale"][layer], config.norm_eps)
    qkv = jnp.einsum("td,cnhd->cnth", y, p["attention"]["qkv"][layer, :, 0])
    q, k = (ops.apply_rope(z, *table) for z in qkv[:2])
    scores = jnp.where(
      np.tri(length, dtype=bool), jnp.einsum("nth,nsh->nts", q, k) * h**-0.5, -jnp.inf
    )
    out = jnp.einsum("nts,nsh->tnh", jax.nn.softmax(scores), qkv[2])
    x = x + jnp.einsum("tnh,nhd->td", out, p["attention"]["out"][layer, 0])
    y = ops.rms_norm(x, p["ffn_norm"]["scale"][layer], config.norm_eps)
    hidden = ops.ACTIVATION[config.activation](y @ p["ffn"]["in"][layer, 0].T)
    x = (
      x
      + jnp.where(np.arange(hidden.shape[1]) < width[:, None], hidden, 0)
      @ p["ffn"]["out"][layer, 0]
    )
  return np.asarray(
    ops.rms_norm(x, params["final_norm"]["scale"], config.norm_eps) @ params["embedding"].T
  )


def test_the_granularity_can_change_between_any_two_tokens(small, lively_params):
  plan = [("XL", 3), ("S", 4), ("L", 1), ("S", 1), ("M", 3)]
  large = decoder(small)
  weights = large.lay_out(lively_params)
  prompt = [5, 6, 7, 1, 2]
  state = large.prefill(weights, [prompt], 12, [0])
  sizes = [3] * (len(prompt) - 1)  # the last prompt token is run by the first step
  for name, steps in plan:
    state = decoder(small, name).advance(weights, state, steps)
    sizes += [gran.names(small).index(name)] * steps
  sequence = state.sequences()[0]
  want = mixed_logits(small, lively_params, sequence[:-1], sizes).argmax(-1)
  assert sequence[len(prompt) :] == want[len(prompt) - 1 :].tolist()
  assert sequence != run(large, lively_params, [prompt])[0]  # the switch matters here


def test_nested_heads_can_only_step_down(small):
  config = dataclasses.replace(small, nested_heads=True)
  params = matlm.init_params(config, jax.random.key(0))
  large, low = decoder(config), decoder(config, "S")
  weights = large.lay_out(params)
  state = large.prefill(weights, PROMPTS, 9, range(4))
  state = low.advance(weights, large.advance(weights, state, 2), 2)
  assert not np.any(state.done)
  with pytest.raises(UserError, match="step down"):
    large.advance(weights, state, 1)


# ------------------------------------------------------------ ending, batching


def test_stops_at_end_of_text(small, lively_params):
  free = run(decoder(small), lively_params)
  end = free[0][len(PROMPTS[0]) + 3]  # the first sequence makes it as its fourth token
  stopped = run(decoder(small, eos_id=end), lively_params)
  for prompt, a, b in zip(PROMPTS, free, stopped):
    new = a[len(prompt) :]
    assert b == a[: len(prompt)] + (new[: new.index(end) + 1] if end in new else new)
  assert len(stopped[0]) <= len(PROMPTS[0]) + 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sequence_depends_on_nothing_but_its_prompt_and_seed(small, lively_params, temperature):
  d = decoder(small, sampling=Sampling(temperature, top_k=20, top_p=0.95))
  together = run(d, lively_params, seeds=[3, 4, 5, 6])
  assert together == run(d, lively_params, seeds=[3, 4, 5, 6], chunks=(1, 1, 5, 2, 3))
  for i, prompt in enumerate(PROMPTS):
    assert run(d, lively_params, [prompt], seeds=[3 + i]) == together[i : i + 1]
  other = run(d, lively_params, seeds=[7, 8, 9, 10])
  assert (other == together) == (temperature == 0)


def test_one_compile_per_granularity(small, lively_params):
  config = dataclasses.replace(small, vocab_size=63)  # programs no other test made
  params = {**lively_params, "embedding": lively_params["embedding"][:63]}
  before = Decoder._advance._cache_size()
  for _ in range(2):
    for name in ("S", "XL"):
      run(decoder(config, name), params, chunks=(1, 3, 2, 6))
  assert Decoder._advance._cache_size() - before == 2


@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_never_copies_the_cache(small, lively_params, batch):
  """In the compiled loop only scatters make arrays of the cache's size."""
  d = decoder(small)
  weights = d.lay_out(lively_params)
  state = d.prefill(weights, [[1]] * batch, 8, range(batch))
  lowered = Decoder._advance.lower(d, weights, state, jnp.int32(8))
  text = lowered.compile(compiler_options=helpers.AS_USERS_COMPILE).as_text()
  shape = lambda dims: [n for n in dims if n > 1]
  found = {"copy": 0, "fusion": 0, "scatter": 0}
  for line in text.splitlines():
    match = re.search(r" = f32\[([\d,]+)\]\S* (copy|fusion|scatter)\(", line)
    if match and shape(map(int, match[1].split(","))) == shape(state.cache[0]["k"].shape):
      found["scatter" if "scatter" in line.partition("metadata")[0] else match[2]] += 1
  assert found["scatter"] >= 2 * small.num_layers
  assert found["copy"] == found["fusion"] == 0, found


def test_on_a_mesh(small):
  config = dataclasses.replace(small, ffn_groups=2, head_groups=2)
  params = matlm.init_params(config, jax.random.key(0))
  want = run(decoder(config, "M*2+L*2"), params)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  execution = Execution.for_platform("cpu", mesh, dtype="float32")
  sharded = jax.device_put(params, sharding.param_shardings(params, mesh))
  d = decoder(config, "M*2+L*2", execution)
  assert run(d, sharded) == want
  cache = d.prefill(d.lay_out(sharded), PROMPTS, 4, range(4)).cache
  spec = cache[0]["k"].sharding.spec
  assert spec[1] == ("data", "fsdp") and spec[2] == "tensor"
  with pytest.raises(UserError, match="multiple of 4"):
    d.prefill(d.lay_out(sharded), PROMPTS[:3], 4, range(3))


@pytest.mark.parametrize(
  "prompt,max_tokens,seed,words",
  [
    ([], 3, 0, "at least one"),
    ([64], 3, 0, r"0..63"),
    ([-1], 3, 0, r"0..63"),
    ([1], 0, 0, "max_tokens=0"),
    ([1], 2**31, 0, "max_tokens=2147483648"),
    ([1], 3, 2**32, "seed of prompt 0=4294967296 must be .* 4294967295"),
    ([1], 3, -1, "seed of prompt 0=-1"),
    ([1], 3, 0.5, "seed of prompt 0=0.5"),
  ],
)
def test_mistakes(small, lively_params, prompt, max_tokens, seed, words):
  d = decoder(small)
  with pytest.raises(UserError, match=words):
    d.prefill(d.lay_out(lively_params), [prompt], max_tokens, [seed])


# ------------------------------------------------------------------ sampling


def reference_probs(logits, sampling: Sampling) -> np.ndarray:
  p = np.exp(np.float64(logits) / sampling.temperature)
  order = np.argsort(-p, kind="stable")
  keep = np.zeros(len(p), bool)
  total = 0.0
  for rank, token in enumerate(order[: sampling.top_k or len(p)]):
    top = p[order[: sampling.top_k or len(p)]].sum()
    if rank and total / top >= sampling.top_p:
      break
    keep[token] = True
    total += p[token]
  return np.where(keep, p, 0) / p[keep].sum()


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(1.0),
    Sampling(0.5),
    Sampling(1.3, top_k=5),
    Sampling(0.7, top_p=0.6),
    Sampling(1.0, top_k=1),
    Sampling(2.0, top_k=8, top_p=0.5),
    Sampling(1.0, top_k=10**6),
  ],
)
def test_log_probs(sampling):
  logits = np.random.default_rng(0).normal(size=(6, 30)).astype(np.float32) * 2
  have = np.exp(np.asarray(log_probs(jnp.asarray(logits), sampling)))
  np.testing.assert_allclose(have, [reference_probs(row, sampling) for row in logits], atol=1e-5)


def test_draws_follow_the_distribution(lively_params, small):
  """Pearson's chi-square of 4,096 first tokens; a false alarm in a million runs."""
  from scipy.stats import chi2

  sampling = Sampling(0.5)
  d = decoder(small, sampling=sampling)
  draws = [s[-1] for s in run(d, lively_params, [[5, 6]] * 4096, max_tokens=1, seeds=range(4096))]
  expected = 4096 * reference_probs(full_logits(small, lively_params, "XL", [5, 6])[-1], sampling)
  counts = np.bincount(draws, minlength=64)
  statistic = np.sum((counts - expected) ** 2 / expected)
  assert statistic < chi2.ppf(1 - 1e-6, 63)


@pytest.mark.parametrize(
  "bad",
  [
    {"temperature": -1},
    {"temperature": float("nan")},
    {"temperature": 1e-39},  # 0 in float32
    {"top_k": -1},
    {"top_p": 0},
    {"top_p": 1.5},
  ],
)
def test_sampling_errors_name_the_value(bad):
  with pytest.raises(UserError, match="|".join(bad)):
    Sampling(**bad)
