"""Text generation with an attention cache: static shapes, one program per granularity.

A `Decoder` is a submodel and a way of choosing tokens; a `State` is a batch of
sequences with their cache. Any decoder of a model can continue any state of it, so
the granularity may change between two tokens:

  small, large = (Decoder(config, execution, g, sampling, eos_id) for g in (s, xl))
  weights = large.lay_out(params)
  state = large.prefill(weights, prompts, max_tokens=64, seeds=[0])
  state = small.advance(weights, state, 10)
  state = large.advance(weights, state, 54)

Invariant of a state: every token but a sequence's last is in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.errors import UserError, check_seed
from matformer_jax.models import cache as kv
from matformer_jax.models import layers, matlm, ops, slicing

LEAST_TEMPERATURE = 1e-6  # float32 logits divided by less could overflow
MOST_TOKENS = 2**30  # lengths are int32
BUCKET = 64  # prompt widths and cache lengths are multiples of this, so programs are reused


# ------------------------------------------------------------------ sampling


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is chosen; hashable, since each way is a program of its own.

  Attributes:
    temperature: 0 takes the most likely token.
    top_k: keep only the k most likely tokens; 0 keeps all.
    top_p: keep the fewest most likely tokens whose probabilities reach top_p.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
      raise UserError(
        f"temperature={self.temperature} must be 0 (greedy) or at least {LEAST_TEMPERATURE}"
      )
    if self.top_k < 0:
      raise UserError(f"top_k={self.top_k} must be 0 (keep all) or more")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")


def log_probs(logits, sampling: Sampling) -> jax.Array:
  """The distribution that `sampling` draws from: float32 log-probabilities [..., V].

  Not for temperature 0, which draws nothing.
  """
  logits = logits / sampling.temperature
  if 0 < sampling.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending)
    before = jnp.cumsum(probs, -1) - probs  # of more likely tokens; 0 for the first
    least = jnp.min(jnp.where(before < sampling.top_p, descending, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.nn.log_softmax(logits)


def token_keys(keys, positions, use: int) -> jax.Array:
  """[B] keys for the token at `positions` of each sequence; `use` separates purposes.

  A sequence's draws depend on its seed and the position alone: not on its batch, and
  not on how many tokens a program call makes.
  """
  fold = lambda key, position: jax.random.fold_in(jax.random.fold_in(key, position), use)
  return jax.vmap(fold)(keys, positions)


def draw(keys, log_p) -> jax.Array:
  """[B] tokens from log-probabilities [B, V], one key a row."""
  return jax.vmap(jax.random.categorical)(keys, log_p).astype(jnp.int32)


# --------------------------------------------------------------------- state


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("tokens", "length", "limit", "done", "keys", "cache", "draft_cache", "origin"),
  meta_fields=("heads",),
)
@dataclasses.dataclass(frozen=True)
class State:
  """Sequences being continued.

  Attributes:
    tokens: [B, S] int32; sequence b is tokens[b, :length[b]], the rest is undefined.
    length: [B] int32, tokens so far, prompt included.
    limit: [B] int32, length at which a sequence is done.
    done: [B] bool.
    keys: [B] random keys.
    cache: of S positions, see models/cache.py.
    draft_cache: a second one, where a speculative draft does not share it; else None.
    heads: attention heads that the cache holds, per layer.
    origin: [B, 1] int32, the position at which the document being continued begins; None:
      at 0, each sequence is one document.
  """

  tokens: jax.Array
  length: jax.Array
  limit: jax.Array
  done: jax.Array
  keys: jax.Array
  cache: kv.Cache
  draft_cache: kv.Cache | None
  heads: tuple[int, ...]
  origin: jax.Array | None = None

  def last(self, count: int = 1) -> jax.Array:
    """[B, count] the last tokens of each sequence."""
    index = self.length[:, None] - count + jnp.arange(count)
    return jnp.take_along_axis(self.tokens, index, axis=1)

  def append(self, new, count, eos_id: int, **caches) -> Self:
    """Adds new[b, :count[b]], up to end-of-text and the limit, to sequences not done."""
    put = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,))
    tokens = jax.vmap(put)(self.tokens, new, self.length)
    is_eos = (new == eos_id) & (jnp.arange(new.shape[1]) < count[:, None])
    ended = jnp.any(is_eos, axis=1)
    count = jnp.where(ended, jnp.argmax(is_eos, axis=1) + 1, count)
    room = self.limit - self.length
    ended = (ended & (count <= room)) | (count >= room)
    length = self.length + jnp.where(self.done, 0, jnp.minimum(count, room))
    return dataclasses.replace(
      self, tokens=tokens, length=length.astype(jnp.int32), done=self.done | ended, **caches
    )

  def sequences(self) -> list[list[int]]:
    """Every sequence as token ids, prompt included. Waits for the device."""
    tokens, length = jax.device_get((self.tokens, self.length))
    return [row[:n].tolist() for row, n in zip(tokens, length)]


S = TypeVar("S", bound=State)


# ------------------------------------------------------------------- decoder


@dataclasses.dataclass(frozen=True)
class Decoder:
  """Continues sequences with one submodel. Hashable: its programs are cached by value.

  Attributes:
    config: of the stored model, which fixes the layout of weights and cache.
    execution: how it runs.
    granularity: the submodel that decodes.
    sampling: how tokens are chosen.
    eos_id: the token that ends a sequence; -1 for none.
  """

  config: MatLMConfig
  execution: Execution
  granularity: gran.Granularity
  sampling: Sampling = Sampling()
  eos_id: int = -1
  block_class: ClassVar = layers.Block  # what a layer is; latency.py has others

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads per layer."""
    return tuple(self.config.head_counts[i] for i in self.granularity.heads)

  @functools.partial(jax.jit, static_argnums=0)
  def lay_out(self, params):
    """The stored model's parameters as the decoders of this config take them."""
    return {
      **params,
      **jax.tree.map(lambda x: x.astype(self.execution.dtype), matlm.ends(params)),
      "blocks": self.lay_out_blocks(params["blocks"]),
    }

  def prefill(
    self,
    weights,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    seeds: Sequence[int],
    spare: int = 1,
    segments: Sequence[Sequence[int]] | None = None,
  ) -> State:
    """A state of these prompts, their cache filled in one pass.

    Args:
      weights: from `lay_out`.
      prompts: B sequences of at least one token id; lengths may differ.
      max_tokens: how many tokens to add to each.
      seeds: one per prompt, of 32 bits.
      spare: most tokens that one model call writes.
      segments: for each prompt the number of the document that each token belongs to, never
        falling. Documents do not see each other, and the last one is continued. None: each
        prompt is one document.

    Raises:
      UserError: for an empty prompt, ids outside the vocabulary, a seed out of range, segments
        that do not fit their prompt, or a batch that does not divide over the mesh.
    """
    for prompt in prompts:
      if not len(prompt) or min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
        raise UserError(
          f"a prompt must be token ids in 0..{self.config.vocab_size - 1}, at least "
          f"one; got {list(prompt)[:8]}"
        )
    if not 1 <= max_tokens <= MOST_TOKENS:
      raise UserError(f"max_tokens={max_tokens} must be from 1 to {MOST_TOKENS}")
    length = np.array([len(p) for p in prompts], np.int32)
    width = bucket(max(length))
    tokens = np.zeros(
      (len(prompts), bucket(max(max(length) + max_tokens + spare, width))), np.int32
    )
    for row, prompt in zip(tokens, prompts):
      row[: len(prompt)] = prompt
    seeds = [check_seed(seed, f"seed of prompt {i}") for i, seed in enumerate(seeds)]
    keys = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    done = np.zeros(len(prompts), bool)
    origins = prompt_origins(prompts, segments)
    origin = None if origins is None else origins[:, -1:]
    # Placed like later states, so that the first call of a program is not a special case.
    tokens, length, limit, done, keys, origins, origin = jax.device_put(
      (tokens, length, length + np.int32(max_tokens), done, keys, origins, origin),
      self._placement(weights, prompts),
    )
    cache = self.fill(weights, tokens, width, origins)
    return State(tokens, length, limit, done, keys, cache, None, self.heads, origin)

  def _placement(self, weights, prompts):
    mesh = self.execution.mesh
    if mesh is None:
      return weights["embedding"].sharding
    shards = sharding.batch_shards(mesh)
    if len(prompts) % shards:
      raise UserError(
        f"a batch of {len(prompts)} prompts does not divide over {shards} batch "
        f"shards (mesh data x fsdp); use a multiple of {shards}"
      )
    return jax.sharding.NamedSharding(mesh, sharding.spec(("batch",)))

  @functools.partial(jax.jit, static_argnums=(0, 3))
  def fill(self, weights, tokens, width: int, origin=None) -> kv.Cache:
    """A cache for tokens [B, S], filled from the first `width` of each row.

    Args:
      origin: [B, width] from `prompt_origins`.
    """
    cache = kv.init_cache(self.config, self.execution, *tokens.shape)
    return self.extend(self.submodel(weights), tokens[:, :width], cache, None, origin)[1]

  def advance(self, weights, state: S, steps: int) -> S:
    """Adds up to `steps` tokens to every sequence that is not done.

    `state` is consumed: its buffers are reused.

    Raises:
      UserError: if the cache lacks heads this granularity reads (nested_heads only).
    """
    self.check_heads(state)
    return dataclasses.replace(self._advance(weights, state, jnp.int32(steps)), heads=self.heads)

  def check_heads(self, state: State) -> None:
    """Raises UserError where this granularity has more heads than the cache holds."""
    for layer, (mine, cached) in enumerate(zip(self.heads, state.heads)):
      if mine > cached:
        raise UserError(
          f"granularity {gran.to_text(self.granularity, self.config)} reads {mine} attention "
          f"heads of layer {layer}, but the last tokens were cached with {cached}: a model with "
          "nested heads can only step down between tokens; prefill again to step up"
        )

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def _advance(self, weights, state: State, steps):
    weights = self.submodel(weights, state)  # outside the loop: a slice can be a copy

    def step(carry):
      i, state = carry
      hidden, cache = self.extend(
        weights, state.last(), state.cache, state.length - 1, state.origin
      )
      token = self.choose(self.logits(weights, hidden)[:, 0], state)
      return i + 1, state.append(token[:, None], jnp.ones_like(token), self.eos_id, cache=cache)

    more = lambda carry: (carry[0] < steps) & ~jnp.all(carry[1].done)
    return jax.lax.while_loop(more, step, (0, state))[1]

  # What follows is traced inside programs.

  def lay_out_blocks(self, blocks):
    """The layers' share of `lay_out`."""
    return kv.lay_out(blocks, self.execution)

  def submodel(self, weights, state: State | None = None):
    """The weights this granularity uses, from `lay_out`'s, whichever sequences it continues."""
    blocks = slicing.slice_blocks(weights["blocks"], self.config, self.granularity)
    return {**weights, "blocks": blocks}

  def extend(self, weights, tokens, cache, start, origin=None):
    """Runs T tokens [B, T] from positions `start`: (hidden [B, T, D], cache).

    Args:
      origin: [B, T] or [B, 1], where documents begin, as in models/cache.py.
    """
    x = matlm.embed(weights["embedding"], tokens, self.config)
    x, cache = self.run_layers(weights, x, cache, start, origin)
    return ops.rms_norm(x, weights["final_norm"]["scale"], self.config.norm_eps), cache

  def run_layers(self, weights, x, cache, start, origin):
    """The layers' share of `extend`."""
    return kv.extend(
      weights["blocks"], self.config, self.execution, x, cache, start, self.block_class, origin
    )

  def logits(self, weights, hidden) -> jax.Array:
    """float32 logits [B, T, V] of hidden [B, T, D]."""
    head = matlm.output_head(weights)
    if self.execution.flat_weights and hidden.dtype == jnp.float32:  # faster with few rows
      return ops.project_in(hidden, head, self.execution)
    return jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)

  def choose(self, logits, state: State) -> jax.Array:
    """[B] next tokens from logits [B, V]."""
    if self.sampling.temperature == 0:
      return jnp.argmax(logits, -1).astype(jnp.int32)
    return draw(token_keys(state.keys, state.length, 0), log_probs(logits, self.sampling))


def prompt_origins(prompts, segments) -> np.ndarray | None:
  """[B, width] int32: where the document of each token of `prompts` begins; see `prefill`.

  Padding continues the last document. None where `segments` is None.

  Raises:
    UserError: for segments that do not fit their prompt.
  """
  if segments is None:
    return None
  if len(segments) != len(prompts):
    raise UserError(
      f"segments has {len(segments)} lists for {len(prompts)} prompts; give one for each"
    )
  origins = np.zeros((len(prompts), bucket(max(map(len, prompts)))), np.int32)
  for i, (row, prompt, numbers) in enumerate(zip(origins, prompts, segments)):
    numbers = np.asarray(numbers)
    if numbers.shape != (len(prompt),):
      raise UserError(
        f"segments[{i}] has {numbers.size} numbers for a prompt of {len(prompt)} tokens; "
        "give one for each token"
      )
    if np.any(numbers[1:] < numbers[:-1]):
      raise UserError(
        f"segments[{i}] = {numbers.tolist()[:8]} falls; number a prompt's documents in order"
      )
    for place in np.flatnonzero(numbers[1:] != numbers[:-1]) + 1:
      row[place:] = place
  return origins


def bucket(n: int) -> int:
  """n rounded up to a multiple of BUCKET."""
  return -(-n // BUCKET) * BUCKET
