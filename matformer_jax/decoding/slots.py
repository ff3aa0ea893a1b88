"""Continuous batching: sequences of different sizes that join and leave between steps.

There is a fixed number of slots, each with room for a sequence in one shared cache. A sequence
joins with its prompt, taken in pieces so that the others do not wait for long; it has a size and
a way of choosing tokens of its own. Programs depend on none of this: what is compiled is a step
of all slots, for a few lengths of the cache, and a piece of a prompt.

  decoder = SlotDecoder(config, execution, eos_id=eos)
  weights = decoder.lay_out(params)
  slots = decoder.empty(weights, count=8, length=1024)
  for tokens, start in decoder.pieces(prompt):
    slots = decoder.read(weights, slots, 0, tokens, start, granularity)
  slots = decoder.join(slots, 0, prompt, max_tokens, granularity, sampling, seed)
  slots = decoder.advance(weights, slots, steps)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax.decoding import decode
from matformer_jax.decoding.decode import Decoder, Sampling, State
from matformer_jax.errors import check_seed
from matformer_jax.models import cache as kv
from matformer_jax.models import rows

PIECE = 32  # tokens of a prompt that one call reads


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=(
    *(field.name for field in dataclasses.fields(State) if field.name != "heads"),
    *("ffn", "head_sizes", "temperature", "top_k", "top_p"),
  ),
  meta_fields=("heads",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots(State):
  """A state whose rows are slots; one that is done is free.

  Attributes:
    ffn, head_sizes: [L, B] int32, the granularity index of each layer.
    temperature, top_p: [B] float32, and top_k: [B] int32, as in Sampling.
  """

  ffn: jax.Array
  head_sizes: jax.Array
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array


@dataclasses.dataclass(frozen=True)
class SlotDecoder(Decoder):
  """Decodes every slot at its own size, in one program; see models/rows.py.

  Works in `SpeculativeDecoder`, where all slots are greedy and share the cache.

  Attributes:
    granularity: where a slot's size is above it, it is cut to it.
    sampling: not used: every slot has its own.
  """

  # ----------------------------------------------------------------- slots

  def empty(self, weights, count: int, length: int) -> Slots:
    """`count` free slots, and a cache of `length` positions for each."""
    # Placed like later states, so that the first call of a program is not a special case.
    return jax.device_put(self._empty(count, length), weights["embedding"].sharding)

  @functools.partial(jax.jit, static_argnums=(0, 1, 2))
  def _empty(self, count: int, length: int) -> Slots:
    layers = self.config.num_layers
    full = lambda value, dtype: jnp.full(count, value, dtype)
    return Slots(
      tokens=jnp.zeros((count, length), jnp.int32),
      length=full(1, jnp.int32),
      limit=full(1, jnp.int32),
      done=full(True, bool),
      keys=jax.vmap(jax.random.key)(jnp.zeros(count, jnp.uint32)),
      cache=kv.init_cache(self.config, self.execution, count, length),
      draft_cache=None,
      heads=self.heads,
      ffn=jnp.full((layers, count), -1, jnp.int32),
      head_sizes=jnp.full((layers, count), -1, jnp.int32),
      temperature=full(0, jnp.float32),
      top_k=full(0, jnp.int32),
      top_p=full(1, jnp.float32),
    )

  @functools.partial(jax.jit, static_argnums=(0, 2))
  def resize(self, slots: Slots, length: int) -> Slots:
    """The slots with room for `length` positions each, of which none may be in use beyond."""

    def fit(leaf, axis: int):
      have = leaf.shape[axis]
      if length <= have:
        return jax.lax.slice_in_dim(leaf, 0, length, axis=axis)
      return jnp.pad(leaf, [(0, length - have if i == axis else 0) for i in range(leaf.ndim)])

    cache = jax.tree.map(lambda leaf: fit(leaf, leaf.ndim - 2), slots.cache)
    # What was in a free slot may have been longer, and its last token is still looked up.
    used = jnp.where(slots.done, 1, slots.length)
    return dataclasses.replace(slots, tokens=fit(slots.tokens, 1), cache=cache, length=used)

  def pieces(self, prompt: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
    """What of a prompt must be in the cache: ([1, T] int32 tokens, their first position).

    Padding is written to positions that are written again before they are read.
    """
    rest = np.asarray(prompt[:-1], np.int32)
    for start in range(0, len(rest), PIECE):
      piece = rest[start : start + PIECE]
      yield np.pad(piece, (0, PIECE - len(piece)))[None], start

  def read(
    self, weights, slots: Slots, slot: int, tokens, start: int, granularity: gran.Granularity
  ) -> Slots:
    """Puts a piece of a prompt, from `pieces`, into a free slot's cache. `slots` is consumed."""
    ffn, heads = _sizes(granularity)
    return self._read(
      weights, slots, np.int32(slot), tokens, np.full(1, start, np.int32), ffn, heads
    )

  def join(
    self,
    slots: Slots,
    slot: int,
    prompt: Sequence[int],
    max_tokens: int,
    granularity: gran.Granularity,
    sampling: Sampling,
    seed: int,
  ) -> Slots:
    """Starts a sequence in a free slot that has read all pieces. `slots` is consumed."""
    length = len(prompt)
    row = np.zeros(slots.tokens.shape[1], np.int32)
    row[:length] = prompt
    ffn, heads = _sizes(granularity)
    values = dict(
      tokens=row,
      length=np.int32(length),
      limit=np.int32(length + max_tokens),
      done=np.bool_(False),
      temperature=np.float32(sampling.temperature),
      top_k=np.int32(sampling.top_k),
      top_p=np.float32(sampling.top_p),
    )
    seed = check_seed(seed, "seed")
    return _put(slots, np.int32(slot), values, np.uint32(seed), ffn[:, 0], heads[:, 0])

  @staticmethod
  def leave(slots: Slots, leaving: np.ndarray) -> Slots:
    """Frees the slots where `leaving` [B] is True."""
    return dataclasses.replace(slots, done=slots.done | leaving)

  # What follows is traced inside programs.

  def lay_out_blocks(self, blocks):
    """The layers' share of `lay_out`."""
    return rows.lay_out(blocks, self.config, self.execution)

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def _read(self, weights, slots: Slots, slot, tokens, start, ffn, heads) -> Slots:
    rows_axis = lambda leaf: leaf.ndim - 5  # of [..., B, A, N, S, H]
    take = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, slot, 1, rows_axis(leaf))
    put = lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, slot, rows_axis(leaf))
    mine = jax.tree.map(take, slots.cache)
    weights = {**weights, "sizes": (ffn, heads)}
    mine = self.extend(weights, tokens, mine, start)[1]
    return dataclasses.replace(slots, cache=jax.tree.map(put, slots.cache, mine))

  def submodel(self, weights, state: State | None = None):
    """All weights, and which of them each slot uses."""
    assert isinstance(state, Slots)
    own = (state.ffn, state.head_sizes)
    sizes = (
      jnp.where(state.done, -1, jnp.minimum(mine, most))
      for mine, most in zip(own, _sizes(self.granularity))
    )
    return {**weights, "sizes": tuple(sizes)}

  def run_layers(self, weights, x, cache, start, origin):
    """The layers' share of `extend`."""
    ffn, heads = weights["sizes"]
    # A free slot writes where no sequence reads, since its next prompt may be there already.
    unused = jax.tree.leaves(cache)[0].shape[-2] - x.shape[1]
    start = jnp.where(ffn[0] < 0, unused, start)
    return rows.extend(weights["blocks"], self.config, self.execution, x, cache, start, ffn, heads)

  def choose(self, logits, state: State) -> jax.Array:
    """[B] next tokens from logits [B, V], each slot in its own way."""
    assert isinstance(state, Slots)
    greedy = jnp.argmax(logits, -1).astype(jnp.int32)

    def sampled():
      keys = decode.token_keys(state.keys, state.length, 0)
      drawn = decode.draw(keys, log_probs(logits, state))
      return jnp.where(state.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(~state.done & (state.temperature > 0)), sampled, lambda: greedy)


def log_probs(logits, slots: Slots) -> jax.Array:
  """As decode.log_probs of [B, V], each row with the sampling of its slot."""
  temperature, top_k, top_p = (x[:, None] for x in (slots.temperature, slots.top_k, slots.top_p))
  logits = logits / jnp.where(temperature > 0, temperature, 1)

  def restricted():
    descending = -jnp.sort(-logits, axis=-1)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1]) - 1
    least = jnp.take_along_axis(descending, last, axis=-1)
    probs = jax.nn.softmax(jnp.where(descending < least, -jnp.inf, descending))
    before = jnp.cumsum(probs, -1) - probs
    within = jnp.min(jnp.where(before < top_p, descending, jnp.inf), -1, keepdims=True)
    least = jnp.maximum(least, jnp.where(top_p < 1, within, -jnp.inf))
    return jnp.where(logits < least, -jnp.inf, logits)

  any_restricted = jnp.any(~slots.done & ((slots.top_k > 0) | (slots.top_p < 1)))
  return jax.nn.log_softmax(jax.lax.cond(any_restricted, restricted, lambda: logits))


@functools.partial(jax.jit, donate_argnums=0)
def _put(slots: Slots, slot, values, seed, ffn, heads) -> Slots:
  rows = {name: getattr(slots, name).at[slot].set(value) for name, value in values.items()}
  return dataclasses.replace(
    slots,
    keys=slots.keys.at[slot].set(jax.random.key(seed)),
    ffn=slots.ffn.at[:, slot].set(ffn),
    head_sizes=slots.head_sizes.at[:, slot].set(heads),
    **rows,
  )


def _sizes(granularity: gran.Granularity) -> tuple[np.ndarray, np.ndarray]:
  """[L, 1] int32 of FFNs and of heads."""
  column = lambda sizes: np.array(sizes, np.int32)[:, None]
  return column(granularity.ffn), column(granularity.heads)
