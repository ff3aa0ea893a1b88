"""Log-likelihoods of continuations, many at a time (the evaluations of Section 4.1).

A `Request` is a sequence of tokens of which the last few are scored. Requests are sorted by length
and run in batches whose shapes come from a fixed ladder, so that programs are few and the same for
every task. Those that begin alike, such as the choices of one question, are a group: what they
share is run once, and the rest of each against its attention cache. The vocabulary is only gone
through at scored positions, in chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.decoding.decode import Decoder
from matformer_jax.models import cache as kv
from matformer_jax.models import matlm, ops, slicing

CPU_TOKENS = 2048  # of a batch, per batch shard
ACCELERATOR_TOKENS = 16384
LEAST_WIDTH = 32  # of a batch of whole sequences
LEAST_TAIL = 8  # of a batch of what follows shared beginnings
LEAST_SHARED = 16  # tokens, to be worth a cache
CHUNK = 256  # most scored positions whose logits are computed together
AHEAD = 2  # program calls dispatched before results are read; on a mesh of CPUs, two can deadlock


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be scored.

  Attributes:
    tokens: ids of the context and its continuation; at least one of context.
    scored: how many of the last tokens are the continuation.
  """

  tokens: Sequence[int]
  scored: int


@dataclasses.dataclass(frozen=True)
class Score:
  """Of a continuation.

  Attributes:
    log_likelihood: the sum over its tokens, nats.
    greedy: whether no token was likelier than any of them.
  """

  log_likelihood: float
  greedy: bool


@dataclasses.dataclass
class _Row:
  """A row of a batch: tokens, and what is scored after them.

  Attributes:
    tokens: int32 [T].
    start: how many tokens come before them, in a row of the cache.
    owner: which row of the batch of shared beginnings that is.
    places, targets, requests: of each scored token the index in `tokens` after which it comes, its
      id, and the request it belongs to.
    tails: rows that continue this one.
  """

  tokens: np.ndarray
  start: int = 0
  owner: int = 0
  places: list[int] = dataclasses.field(default_factory=list)
  targets: list[int] = dataclasses.field(default_factory=list)
  requests: list[int] = dataclasses.field(default_factory=list)
  tails: list[_Row] = dataclasses.field(default_factory=list)


class Scorer:
  """Scores requests with one submodel.

  Args:
    params: the universal parameters, placed as `execution` has them.
    batch_tokens: tokens in a batch, per batch shard of the mesh; 0 takes what suits the platform.
    share: run what requests have in common once.

  Attributes:
    programs: the shapes compiled so far: (kind, rows, width, ...).
    tokens_run: tokens that programs were given, with and without those that fill batches.
  """

  def __init__(
    self,
    params: Any,
    config: MatLMConfig,
    execution: Execution,
    granularity: gran.Granularity,
    batch_tokens: int = 0,
    share: bool = True,
  ):
    small: Any = gran.submodel_config(config, granularity)
    self.decoder = Decoder(small, execution, gran.full(small))
    self.weights = self.decoder.lay_out(slicing.slice_params(params, config, granularity))
    self.share = share
    default = CPU_TOKENS if execution.flat_weights else ACCELERATOR_TOKENS
    self.batch_tokens = batch_tokens or default
    self.programs: dict[tuple, int] = {}
    self.tokens_run = np.zeros(2, np.int64)
    self._shards = sharding.batch_shards(execution.mesh)
    on_cpus = execution.mesh is not None and execution.mesh.devices.flat[0].platform == "cpu"
    self._ahead = 0 if on_cpus else AHEAD

  def score(
    self, requests: Sequence[Request], progress: Callable[[int], object] = lambda n: None
  ) -> list[Score]:
    """Scores of the requests, in their order.

    Args:
      progress: called with the number of tokens, of all requests together, done since.

    Raises:
      ValueError: for a request without context.
    """
    for request in requests:
      if request.scored >= len(request.tokens):
        raise ValueError(f"{request} has no context, by which its first token could be scored")
    self._total = np.zeros(len(requests))
    self._greedy = np.ones(len(requests), bool)
    self._pending: deque = deque()
    rows = _share(requests) if self.share else [_whole(i, r) for i, r in enumerate(requests)]
    for shared in (True, False):
      chosen = [row for row in rows if bool(row.tails) == shared]
      for batch, width in self._batches(chosen, LEAST_WIDTH, self.batch_tokens):
        self._run(batch, width, keep=shared)
        done = sum(len(r.tokens) + sum(len(t.tokens) for t in r.tails) for b in batch for r in b)
        progress(done)
    self._collect(0)
    return [Score(float(x), bool(g)) for x, g in zip(self._total, self._greedy)]

  def _batches(
    self, rows: list[_Row], least: int, tokens: int
  ) -> Iterator[tuple[list[list[_Row]], int]]:
    """Rows in batches, the longest first: ([rows of each batch shard], width)."""
    rows = sorted(rows, key=lambda row: -len(row.tokens))
    while rows:
      width = _rung(len(rows[0].tokens), least)
      count = self._shards * max(1, tokens // width)
      batch, rows = rows[:count], rows[count:]
      yield [batch[i :: self._shards] for i in range(self._shards)], width

  def _run(self, batch: list[list[_Row]], width: int, keep: bool) -> None:
    """Scores a batch of rows and of what continues them."""
    height = max(1, self.batch_tokens // width)
    inputs, requests = self._inputs(batch, height, width)
    self._count(("shared" if keep else "whole", self._shards * height, width))
    scores, cache = _read(self.decoder, self.weights, inputs, keep)
    self._expect(scores, requests)
    for i, shard in enumerate(batch):
      for owner, row in enumerate(shard):
        for tail in row.tails:
          tail.owner = owner
    tails = [[t for row in shard for t in row.tails] for shard in batch]
    for rows, tail_width in self._tail_batches(tails):
      height = _power(max(map(len, rows)))
      inputs, requests = self._inputs(rows, height, tail_width)
      self._count(("tails", self._shards * height, tail_width, *cache[0]["k"].shape[-2:-1]))
      self._expect(_continue(self.decoder, self.weights, inputs, cache), requests)

  def _tail_batches(self, tails: list[list[_Row]]) -> Iterator[tuple[list[list[_Row]], int]]:
    """Tails, each on its owner's batch shard, the longest first: ([rows per shard], width)."""
    tails = [sorted(shard, key=lambda row: -len(row.tokens)) for shard in tails]
    while any(tails):
      width = _rung(max(len(shard[0].tokens) for shard in tails if shard), LEAST_TAIL)
      count = _power(max(1, self.batch_tokens // 2 // width), down=True)
      yield [shard[:count] for shard in tails], width
      tails = [shard[count:] for shard in tails]

  def _inputs(self, batch: list[list[_Row]], height: int, width: int):
    """Arrays that a program takes, and the request of each place in its scores, or -1."""
    shards, chunk = self._shards, self._chunk
    scored = max(sum(len(row.places) for row in shard) for shard in batch)
    room = -(-max(height * width, scored) // chunk) * chunk
    tokens = np.zeros((shards, height, width), np.int32)
    start, owner = np.zeros((2, shards, height), np.int32)
    places, targets = np.zeros((2, shards, room), np.int32)
    requests = np.full((shards, room), -1)
    for i, shard in enumerate(batch):
      at = 0
      for j, row in enumerate(shard):
        tokens[i, j, : len(row.tokens)] = row.tokens
        start[i, j], owner[i, j] = row.start, row.owner
        here = slice(at, at + len(row.places))
        places[i, here] = np.array(row.places, np.int32) + j * width
        targets[i, here] = row.targets
        requests[i, here] = row.requests
        at += len(row.places)
    self.tokens_run += tokens.size, sum(len(row.tokens) for shard in batch for row in shard)
    arrays = {
      "tokens": tokens.reshape(-1, width),
      "start": start.reshape(-1),
      "owner": owner,
      "places": places,
      "targets": targets,
    }
    mesh = self.decoder.execution.mesh
    placement = (
      self.weights["embedding"].sharding if mesh is None else sharding.batch_sharding(mesh)
    )
    arrays = jax.device_put(arrays, placement)
    return {**arrays, "chunks": jnp.int32(-(-scored // chunk))}, requests

  @property
  def _chunk(self) -> int:
    return _chunk(self.decoder.config, self.decoder.execution)

  def _count(self, shape: tuple) -> None:
    self.programs[shape] = self.programs.get(shape, 0) + 1

  def _expect(self, scores: jax.Array, requests: np.ndarray) -> None:
    self._pending.append((scores, requests))
    self._collect(self._ahead)

  def _collect(self, left: int) -> None:
    """Adds up what programs returned, all but the last `left` of them."""
    while len(self._pending) > left:
      scores, requests = self._pending.popleft()
      log_p, likeliest = np.asarray(scores)
      real = requests >= 0
      np.add.at(self._total, requests[real], log_p[real].astype(np.float64))
      np.logical_and.at(self._greedy, requests[real], likeliest[real] > 0)


# ------------------------------------------------------------------- requests to rows


def _whole(index: int, request: Request) -> _Row:
  """A request as a row of its own."""
  return _Row(np.array(request.tokens[:-1], np.int32), **_scored(index, request, 0, None))


def _scored(index: int, request: Request, first: int, last: int | None) -> dict[str, Any]:
  """The scored tokens that come after inputs `first` to `last`, as a row's fields."""
  inputs = len(request.tokens) - 1
  places = range(max(inputs - request.scored, first), inputs if last is None else last)
  return {
    "places": [i - first for i in places],
    "targets": [request.tokens[i + 1] for i in places],
    "requests": [index] * len(places),
  }


def _share(requests: Sequence[Request]) -> list[_Row]:
  """Requests as rows, those that begin alike as one with tails.

  A request joins those before it, in the order of their tokens, if that leaves fewer tokens to
  run, and if at least half of it and LEAST_SHARED tokens are shared.
  """
  inputs = [np.array(r.tokens[:-1], np.int32) for r in requests]
  order = sorted(range(len(requests)), key=lambda i: inputs[i].astype(">i4").tobytes())
  rows, group, shared = [], [], 0
  for i in order:
    common = _common(inputs[group[0]][:shared], inputs[i]) if group else 0
    saves = len(group) * common > (len(group) - 1) * shared
    longest = max([len(inputs[i]), *(len(inputs[j]) for j in group)])
    if group and saves and common >= max(LEAST_SHARED, longest / 2):
      group.append(i)
      shared = common
    else:
      rows += _group(requests, group, shared)
      group, shared = [i], len(inputs[i])
  return rows + _group(requests, group, shared)


def _common(a: np.ndarray, b: np.ndarray) -> int:
  """How many tokens two sequences have in common at their beginnings."""
  length = min(len(a), len(b))
  differ = np.flatnonzero(a[:length] != b[:length])
  return int(differ[0]) if len(differ) else length


def _group(requests: Sequence[Request], group: list[int], shared: int) -> list[_Row]:
  if len(group) < 2:
    return [_whole(i, requests[i]) for i in group]
  row = _Row(np.array(requests[group[0]].tokens[:shared], np.int32))
  for i in group:
    for name, values in _scored(i, requests[i], 0, shared).items():
      getattr(row, name).extend(values)
    rest = requests[i].tokens[shared:-1]
    if len(rest):
      tail = _Row(np.array(rest, np.int32), shared, **_scored(i, requests[i], shared, None))
      row.tails.append(tail)
  return [row]


def _rung(length: int, least: int) -> int:
  """The least width of the ladder, of four rungs to an octave, that holds `length` tokens."""
  width = least
  while width < length:
    step = max(least, 1 << (width.bit_length() - 1)) // 4
    width += step
  return width


def _power(n: int, down: bool = False) -> int:
  """The next power of two."""
  return 1 << (n.bit_length() - 1 if down else (n - 1).bit_length())


# --------------------------------------------------------------------------- programs


def _chunk(config: MatLMConfig, execution: Execution) -> int:
  """Scored positions whose logits are computed together, per batch shard."""
  return max(8, min(CHUNK, _power(execution.logits_bytes // (4 * config.vocab_size), down=True)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _read(decoder: Decoder, weights, inputs, keep: bool):
  """Scores [2, shards, N] of a batch, and its cache where it is to be kept."""
  config, execution = decoder.config, decoder.execution
  weights, tokens = decoder.submodel(weights), inputs["tokens"]
  cache: kv.Cache = [None] * (len(config.spans) if execution.scan_layers else config.num_layers)
  if keep:
    cache = kv.init_cache(config, execution, *tokens.shape)
  hidden, cache = decoder.extend(weights, tokens, cache, None)
  return _log_probs(decoder, weights, hidden, inputs), cache if keep else None


@functools.partial(jax.jit, static_argnums=0)
def _continue(decoder: Decoder, weights, inputs, cache: kv.Cache):
  """Scores [2, shards, N] of rows that continue those of a cache."""
  config = decoder.config
  weights = decoder.submodel(weights)
  x = matlm.embed(weights["embedding"], inputs["tokens"], config)
  x = kv.branch(
    weights["blocks"], config, decoder.execution, x, cache, inputs["start"], inputs["owner"]
  )
  hidden = ops.rms_norm(x, weights["final_norm"]["scale"], config.norm_eps)
  return _log_probs(decoder, weights, hidden, inputs)


def _log_probs(decoder: Decoder, weights, hidden, inputs) -> jax.Array:
  """float32 [2, shards, N]: the log-probability of each target, and whether none is likelier."""
  places, targets = inputs["places"], inputs["targets"]
  execution, (shards, room) = decoder.execution, places.shape
  chunk = _chunk(decoder.config, execution)
  hidden = hidden.reshape(shards, -1, hidden.shape[-1])

  def score(i, scores):
    here = lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)
    x = jnp.take_along_axis(hidden, here(places)[..., None], axis=1)
    logits = decoder.logits(weights, x)
    target = jnp.take_along_axis(logits, here(targets)[..., None], axis=-1)[..., 0]
    log_p = target - jax.nn.logsumexp(logits, axis=-1)
    likeliest = target >= jnp.max(logits, axis=-1)
    both = jnp.stack([log_p, likeliest.astype(jnp.float32)])
    return jax.lax.dynamic_update_slice_in_dim(scores, both, i * chunk, axis=2)

  scores = jax.lax.fori_loop(0, inputs["chunks"], score, jnp.zeros((2, shards, room)))
  return sharding.replicate(scores, execution)
