"""One universal model in memory that answers many requests at once, each at its own size.

A thread owns the device. In turns it lets requests into free slots, reads a piece of a prompt,
and makes a few tokens for every slot; see decoding/slots.py. What it has compiled when it starts
is all it ever runs: sizes, sampling and the number of requests are data.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterator
import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
import time
from typing import Literal

from absl import logging
import jax
import numpy as np
import tqdm

from matformer_jax import granularity as gran
from matformer_jax.decoding import slots as slotted
from matformer_jax.decoding.decode import BUCKET, Sampling, bucket
from matformer_jax.decoding.slots import SlotDecoder
from matformer_jax.decoding.speculative import SpeculativeDecoder
from matformer_jax.errors import UserError, check_seed
from matformer_jax.loading import LanguageModel
from matformer_jax.serving import policy as policies

Finish = Literal["stop", "length", "cancelled", "error"]

CALL_SECONDS = 0.03  # a program call makes about as many tokens as take this long
MOST_STEPS = 16
DRAFT_LENGTH = 4
CAPACITIES = 2  # cache lengths that programs are compiled for, each a quarter of the next
RETRY = 64  # calls after which what did not pay is tried again


class Overloaded(Exception):
  """The queue is full, or the engine is shutting down."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be continued, and how.

  Attributes:
    prompt: token ids, at least one.
    max_tokens: most tokens to add.
    granularity: who answers; None: chosen by load once the request has a slot.
    sampling: how tokens are chosen.
    seed: of the draws, 32 bits.
  """

  prompt: tuple[int, ...]
  max_tokens: int
  granularity: gran.Granularity | None = None
  sampling: Sampling = Sampling()
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Update:
  """News of a request.

  Attributes:
    tokens: new token ids, without end-of-text.
    finish: why it has ended: `stop` (end of text), `length`, `cancelled`, `error`; None: it goes
      on.
  """

  tokens: tuple[int, ...]
  finish: Finish | None = None


Listener = Callable[[Update], None]


@dataclasses.dataclass(eq=False)
class Job:
  """A request on its way.

  Attributes:
    granularity: who answers; set before the listener hears anything.
    lead: the first of the same client's call, whose size is taken where the request names none.
  """

  request: Request
  listener: Listener
  granularity: gran.Granularity | None
  lead: Job | None = None
  number: int = 0  # in order of arrival
  cancelled: bool = False
  sent: int = 0  # of its sequence, prompt included
  pieces: Iterator | None = None  # of the prompt, while it is read

  @property
  def size(self) -> gran.Granularity:
    """Who answers, once that is known."""
    assert self.granularity is not None
    return self.granularity

  def cancel(self) -> None:
    """Ends it at the engine's next turn. May be called from any thread, and again."""
    self.cancelled = True


@dataclasses.dataclass(frozen=True)
class Stats:
  """Counts since the engine started, and what it does now.

  Attributes:
    slots, active, waiting: how many there are, are taken, and requests without one.
    finished: requests by how they ended.
    tokens: generated, by the size that made them.
    prompt_tokens: read.
    steps: tokens made for all slots at once, drafted ones not counted.
    busy_seconds: spent in the device's programs.
    drafted, accepted: tokens of speculative decoding.
    failures: turns that raised; the requests of that turn ended with `error`.
  """

  slots: int
  active: int
  waiting: int
  finished: dict[str, int]
  tokens: dict[str, int]
  prompt_tokens: int
  steps: int
  busy_seconds: float
  drafted: int
  accepted: int
  failures: int


class Engine:
  """Answers requests until it is closed.

  Attributes:
    max_length: most tokens of a sequence, prompt included.
  """

  def __init__(
    self,
    model: LanguageModel,
    slots: int = 8,
    max_length: int | None = None,
    queue_limit: int = 256,
    policy: bool = True,
    draft: bool = True,
  ):
    """Compiles all programs and starts.

    Args:
      slots: requests that are answered at a time.
      max_length: by default, the model's sequence length.
      queue_limit: requests that may wait for a slot.
      policy: requests that leave the size open get smaller ones as the queue grows, else the
        largest.
      draft: few greedy requests, with nobody waiting, are drafted by the smallest size.

    Raises:
      UserError: for numbers below 1.
    """
    self.max_length = model.config.seq_len if max_length is None else max_length
    given = {"slots": slots, "queue_limit": queue_limit, "max_length": self.max_length}
    for name, value in given.items():
      if value < 1:
        raise UserError(f"{name}={value} must be 1 or more")
    self._config = model.config
    self._sizes = gran.trained(model.config)
    self._policy = policy
    self._eos_id = model.tokenizer.eos_id
    self._decoder = SlotDecoder(
      model.config, model.execution, gran.full(model.config), eos_id=self._eos_id
    )
    self._weights = self._decoder.lay_out(model.params)
    self._drafter = _Drafter(self._decoder, self._sizes[0]) if draft else None
    longest = bucket(self.max_length + _SPARE)
    self._capacities = sorted({max(bucket(longest // 4**i), BUCKET) for i in range(CAPACITIES)})
    self._count, self._queue_limit = slots, queue_limit
    self._jobs: list[Job | None] = [None] * slots
    self._lengths = np.ones(slots, np.int32)
    self._steps = 1
    self._arrivals = itertools.count()
    self._oldest_next = False
    self._queue: collections.deque[Job] = collections.deque()
    self._changed = threading.Condition()
    self._closing = False
    self._finished: collections.Counter[str] = collections.Counter()
    self._tokens: collections.Counter[str] = collections.Counter()
    self._totals: collections.Counter[str] = collections.Counter()
    self._busy = 0.0
    self._slots = self._warm_up()
    self._thread = threading.Thread(target=self._run, name="matformer-engine", daemon=True)
    self._thread.start()

  # ------------------------------------------------------- from other threads

  def submit(self, request: Request, listener: Listener, lead: Job | None = None) -> Job:
    """Puts a request in the queue.

    Args:
      listener: called on the engine's thread, and so must not wait for anything.
      lead: the first of several that one client asks for together.

    Raises:
      Overloaded: if the queue is full or the engine is closing.
      UserError: for a request that does not fit the model.
    """
    self._check(request)
    job = Job(request, listener, request.granularity, lead, next(self._arrivals))
    with self._changed:
      if self._closing:
        raise Overloaded("the server is shutting down")
      if len(self._queue) >= self._queue_limit:
        raise Overloaded(f"{len(self._queue)} requests are waiting already")
      self._queue.append(job)
      self._changed.notify()
    return job

  @property
  def alive(self) -> bool:
    """Whether requests are answered; not after a failure that it could not get over."""
    return self._thread.is_alive()

  @property
  def room(self) -> int:
    """Requests that it can hold, in slots and in the queue."""
    return self._count + self._queue_limit

  def stats(self) -> Stats:
    """A snapshot."""
    with self._changed:
      return Stats(
        slots=self._count,
        active=sum(job is not None for job in self._jobs),
        waiting=len(self._queue),
        finished=dict(self._finished),
        tokens=dict(self._tokens),
        busy_seconds=self._busy,
        **{
          name: self._totals[name]
          for name in ("prompt_tokens", "steps", "drafted", "accepted", "failures")
        },
      )

  def close(self, timeout: float | None = None) -> None:
    """Takes no more requests, finishes those it has, and stops.

    Args:
      timeout: seconds, after which those that are left are cancelled.
    """
    with self._changed:
      self._closing = True
      self._changed.notify()
    self._thread.join(timeout)
    if self._thread.is_alive():
      with self._changed:
        for job in [*self._queue, *self._jobs]:
          if job is not None:
            job.cancel()
      self._thread.join()

  def _check(self, request: Request) -> None:
    prompt, vocab = request.prompt, self._config.vocab_size
    if not prompt or min(prompt) < 0 or max(prompt) >= vocab:
      raise UserError(f"a prompt must be token ids in 0..{vocab - 1}, at least one")
    if request.max_tokens < 1:
      raise UserError(f"max_tokens={request.max_tokens} must be 1 or more")
    if len(prompt) + request.max_tokens > self.max_length:
      raise UserError(
        f"{len(prompt)} tokens of prompt and {request.max_tokens} new ones are more than the "
        f"{self.max_length} that a sequence may have"
      )
    check_seed(request.seed, "seed")

  # ---------------------------------------------------- on the engine's thread

  def _run(self) -> None:
    while True:
      with self._changed:
        while not (self._queue or any(self._jobs) or self._closing):
          self._changed.wait()
        if self._closing and not self._queue and not any(self._jobs):
          return
      try:
        self._turn()
      except Exception:
        logging.exception("a turn of the engine failed; its requests end")
        self._totals["failures"] += 1
        for slot in range(self._count):
          self._end(slot, "error")
        if not self._restart():
          return

  def _restart(self) -> bool:
    """Empty slots after a failure; where there can be none, everything ends."""
    del self._slots  # the old ones may fill the memory that new ones need
    try:
      self._slots = self._decoder.empty(self._weights, self._count, self._capacities[0])
      return True
    except Exception:
      logging.exception("the engine cannot go on")
    with self._changed:
      self._closing = True
      left = list(self._queue)
      self._queue.clear()
    for job in left:
      self._tell(job, (), "error")
    return False

  def _turn(self) -> None:
    self._drop_cancelled()
    self._admit()
    taken = {slot: job for slot, job in enumerate(self._jobs) if job is not None}
    reading = {slot: job for slot, job in taken.items() if job.pieces is not None}
    if reading:  # short prompts first, but no long one waits for ever
      age = lambda item: item[1].number
      length = lambda item: len(item[1].request.prompt)
      self._read_piece(*min(reading.items(), key=age if self._oldest_next else length))
      self._oldest_next = not self._oldest_next
    running = {slot: job for slot, job in taken.items() if job.pieces is None}
    if running:
      self._advance(running, alone=not reading)

  def _drop_cancelled(self) -> None:
    leaving = np.array([job is not None and job.cancelled for job in self._jobs])
    if leaving.any():
      self._slots = self._decoder.leave(self._slots, leaving)
      for slot in np.flatnonzero(leaving).tolist():
        self._end(slot, "cancelled")
    with self._changed:
      dropped = [job for job in self._queue if job.cancelled]
      for job in dropped:
        self._queue.remove(job)
    for job in dropped:
      self._tell(job, (), "cancelled")

  def _admit(self) -> None:
    for slot, taken in enumerate(self._jobs):
      with self._changed:
        if taken is not None or not self._queue:
          continue
        job = self._queue.popleft()
        self._jobs[slot] = job
        waiting = self._waiting_behind(job) if self._policy else 0
      if job.granularity is None and job.lead is not None:
        job.granularity = job.lead.granularity  # None if that was cancelled while it waited
      if job.granularity is None:
        job.granularity = policies.choose(self._sizes, waiting, self._count)
      job.sent = len(job.request.prompt)
      job.pieces = self._decoder.pieces(job.request.prompt)
      self._lengths[slot] = 1

  def _waiting_behind(self, job: Job) -> int:
    """Requests of others that will find no slot."""
    others = sum(queued.lead is not job for queued in self._queue)
    return max(others - self._jobs.count(None), 0)

  def _read_piece(self, slot: int, job: Job) -> None:
    """The next piece of a prompt; after the last one the sequence starts."""
    assert job.pieces is not None
    request, length, read = job.request, len(job.request.prompt), 0
    for tokens, start in itertools.islice(job.pieces, 1):
      read = start + tokens.shape[1]
      self._make_room(read)
      with self._timed():
        self._slots = self._decoder.read(self._weights, self._slots, slot, tokens, start, job.size)
      self._lengths[slot] = read
    if read >= length - 1:
      self._make_room(length + 1)
      sequence = (request.prompt, request.max_tokens, job.size, request.sampling, request.seed)
      self._slots = self._decoder.join(self._slots, slot, *sequence)
      self._lengths[slot] = length
      self._totals["prompt_tokens"] += length
      job.pieces = None

  def _advance(self, running: dict[int, Job], alone: bool) -> None:
    """Tokens for all running slots, and news of them.

    Args:
      alone: nobody waits for this to end.
    """
    steps = self._steps if alone else 1
    self._make_room(steps + max(self._lengths[slot] for slot in running))
    drafter = None
    if alone and not self._queue and self._may_draft(running.values()):
      drafter = self._drafter
    drafting = drafter is not None and drafter.pays()
    started = time.perf_counter()
    with self._timed():
      if drafting:
        self._slots, drafted, accepted = drafter.advance(self._weights, self._slots, steps)
        self._totals["drafted"] += drafted
        self._totals["accepted"] += accepted
      else:
        self._slots = self._decoder.advance(self._weights, self._slots, steps)
      tokens, lengths, done = jax.device_get(
        (self._slots.tokens, self._slots.length, self._slots.done)
      )
    elapsed = time.perf_counter() - started
    made = int(max(lengths[slot] - self._lengths[slot] for slot in running))
    self._totals["steps"] += made
    if drafter is not None:
      drafter.record(drafting, made / elapsed)
    if alone:
      self._steps = max(1, min(MOST_STEPS, 2 * steps, int(steps * CALL_SECONDS / elapsed)))
    self._lengths = lengths.copy()
    for slot, job in running.items():
      new = tokens[slot, job.sent : lengths[slot]].tolist()
      job.sent = int(lengths[slot])
      stopped = bool(new) and new[-1] == self._eos_id
      self._tokens[gran.to_text(job.size, self._config)] += len(new)
      if done[slot]:
        self._end(slot, "stop" if stopped else "length", new[:-1] if stopped else new)
      elif new:
        self._tell(job, new)

  def _may_draft(self, jobs: Collection[Job]) -> bool:
    few = len(jobs) <= max(1, self._count // 4)
    return few and all(
      job.request.sampling.temperature == 0 and job.size != self._sizes[0] for job in jobs
    )

  def _make_room(self, need: int) -> None:
    """Grows the cache to hold `need` tokens of a sequence, or shrinks it where much is unused."""
    live = [self._lengths[slot] for slot, job in enumerate(self._jobs) if job]
    need = max([need, *live]) + _SPARE
    have = self._slots.tokens.shape[1]
    fitting = next(c for c in self._capacities if c >= min(need, self._capacities[-1]))
    if fitting > have or (fitting < have and 2 * need <= fitting):
      self._slots = self._decoder.resize(self._slots, fitting)

  def _end(self, slot: int, finish: Finish, tokens=()) -> None:
    """Frees a slot, and says so."""
    job = self._jobs[slot]
    if job is None:
      return
    with self._changed:
      self._jobs[slot] = None
    self._lengths[slot] = 1
    self._tell(job, tokens, finish)

  def _tell(self, job: Job, tokens, finish: Finish | None = None) -> None:
    if finish is not None:
      self._finished[finish] += 1
    try:
      job.listener(Update(tuple(tokens), finish))
    except Exception:  # whoever listened is gone
      logging.exception("a listener failed; its request is cancelled")
      job.cancel()

  @contextlib.contextmanager
  def _timed(self) -> Iterator[None]:
    """Adds the seconds of a block to the busy ones."""
    started = time.perf_counter()
    try:
      yield
    finally:
      self._busy += time.perf_counter() - started

  def _warm_up(self) -> slotted.Slots:
    """Compiles every program, several at a time; empty slots of the smallest capacity."""
    with (
      concurrent.futures.ThreadPoolExecutor() as pool,
      tqdm.tqdm(total=2 * len(self._capacities), desc="compiling", unit="program") as bar,
    ):
      runs = []
      for length in self._capacities:
        for run in (self._warm_up_plain, self._warm_up_draft):
          runs.append(pool.submit(run, length))
          runs[-1].add_done_callback(lambda _: bar.update())
      for run in runs:
        run.result()
    return self._decoder.empty(self._weights, self._count, self._capacities[0])

  def _warm_up_plain(self, length: int) -> None:
    full = gran.full(self._config)
    slots = self._decoder.empty(self._weights, self._count, length)
    for piece in self._decoder.pieces([0, 0]):
      slots = self._decoder.read(self._weights, slots, 0, *piece, full)
    slots = self._decoder.join(slots, 0, [0, 0], 2, full, Sampling(), 0)
    slots = self._decoder.advance(self._weights, slots, 1)
    slots = self._decoder.leave(slots, np.ones(self._count, bool))
    for other in self._capacities:
      self._decoder.resize(slots, other)

  def _warm_up_draft(self, length: int) -> None:
    if self._drafter:
      slots = self._decoder.empty(self._weights, self._count, length)
      slots = self._decoder.join(slots, 0, [0], 2, gran.full(self._config), Sampling(), 0)
      self._drafter.advance(self._weights, slots, 1)


class _Drafter:
  """Speculative decoding of all slots, drafted by one size, where it is faster than without."""

  def __init__(self, decoder: SlotDecoder, size: gran.Granularity):
    draft = dataclasses.replace(decoder, granularity=size)
    self._decoder = SpeculativeDecoder(decoder, draft, (DRAFT_LENGTH,))
    self._speeds: dict[bool, float] = {}  # tokens per second with and without, lately
    self._calls = 0

  def advance(self, weights, slots: slotted.Slots, steps: int):
    """(slots, tokens drafted, tokens accepted), the slots having at least `steps` more."""
    slots, stats = self._decoder.advance(weights, weights, slots, steps)
    drafted, accepted = jax.device_get((stats.drafted, stats.accepted))
    return slots, int(drafted.sum()), int(accepted.sum())

  def pays(self) -> bool:
    """Whether to draft in the next call; what seems slower is tried again now and then."""
    self._calls += 1
    if len(self._speeds) < 2:
      return True not in self._speeds
    faster = self._speeds[True] > self._speeds[False]
    return not faster if self._calls % RETRY == 0 else faster

  def record(self, drafting: bool, speed: float) -> None:
    """Tells how fast a call was, in tokens per second."""
    self._speeds[drafting] = 0.8 * self._speeds.get(drafting, speed) + 0.2 * speed


_SPARE = DRAFT_LENGTH + 2  # positions beyond a sequence that a call may write
