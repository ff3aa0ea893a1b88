"""An engine without a model: tokens that depend on the prompt alone, a few milliseconds each."""

import collections
import contextlib
import dataclasses
import threading
import time

from matformer_jax import granularity as gran
from matformer_jax.serving import api, server
from matformer_jax.serving.engine import Overloaded, Update
from matformer_jax.serving.service import Settings


@dataclasses.dataclass
class Stats:
  slots: int
  active: int = 0
  waiting: int = 0
  finished: dict = dataclasses.field(default_factory=dict)
  tokens: dict = dataclasses.field(default_factory=dict)
  prompt_tokens: int = 0
  steps: int = 0
  busy_seconds: float = 0.0
  drafted: int = 0
  accepted: int = 0
  failures: int = 0


class FakeJob:
  def __init__(self, request, listener):
    self.request, self.listener = request, listener
    self.granularity = request.granularity
    self.made = 0
    self.cancelled = False

  def cancel(self):
    self.cancelled = True


class FakeEngine:
  """Continues with `token(prompt, i)`, a step of all slots each `step_s` seconds."""

  def __init__(self, model, slots=4, max_length=64, queue_limit=8, step_s=0.002):
    self.model, self.slots, self.max_length = model, slots, max_length
    self.queue_limit, self.step_s = queue_limit, step_s
    self.fail = self.closing = False
    self._waiting, self._active = collections.deque(), []
    self._finished, self._tokens = collections.Counter(), collections.Counter()
    self._steps = 0
    self._wake = threading.Condition()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def token(self, prompt, i) -> int:
    first = len(self.model.tokenizer.encode("a"))  # past special ones
    return (sum(prompt) * 31 + i * 17) % (self.model.config.vocab_size - 8) + 7 + first

  @property
  def alive(self) -> bool:
    return self._thread.is_alive()

  @property
  def room(self) -> int:
    return self.slots + self.queue_limit

  def submit(self, request, listener, lead=None):
    with self._wake:
      if self.closing or len(self._waiting) >= self.queue_limit:
        raise Overloaded
      job = FakeJob(request, listener)
      self._waiting.append(job)
      self._wake.notify()
      return job

  def stats(self):
    with self._wake:
      return Stats(
        self.slots,
        len(self._active),
        len(self._waiting),
        dict(self._finished),
        dict(self._tokens),
        steps=self._steps,
      )

  def close(self, timeout=None):
    with self._wake:
      self.closing = True
      self._wake.notify()
    self._thread.join(timeout)
    with self._wake:
      for job in [*self._active, *self._waiting]:
        job.cancel()
    self._thread.join(10)

  def _run(self):
    while True:
      with self._wake:
        while not (self._waiting or self._active or self.closing):
          self._wake.wait()
        if self.closing and not (self._waiting or self._active):
          return
        while self._waiting and len(self._active) < self.slots:
          self._active.append(self._waiting.popleft())
      time.sleep(self.step_s)
      config = self.model.config
      for job in list(self._active):
        job.granularity = job.granularity or gran.full(config)
        r = job.request
        finish = "cancelled" if job.cancelled else "error" if self.fail else None
        new = ()
        if not finish:
          new = (self.token(r.prompt, job.made),)
          job.made += 1
          finish = "length" if job.made == r.max_tokens else None
        with self._wake:
          self._steps += 1
          self._tokens[gran.to_text(job.granularity, config)] += len(new)
          if finish:
            self._active.remove(job)
            self._finished[finish] += 1
        job.listener(Update(new, finish))


@contextlib.contextmanager
def serving(app):
  """The base URL of an application that is served from a thread."""
  ready = threading.Event()
  listening = server.listen("127.0.0.1", 0)
  url = server.url(listening)
  running = server.Server(app, 0.0, ready.set, 1000)
  thread = threading.Thread(target=running.run, args=([listening],))
  thread.start()
  assert ready.wait(60)
  try:
    yield url
  finally:
    running.should_exit = True
    thread.join()


@contextlib.contextmanager
def served(model, settings=None, engine=None, **fake):
  """A server of its own, by default with a fake engine: (its engine, its app, its URL)."""
  engine = engine or FakeEngine(model, **fake)
  app = api.make_app(engine, model, settings or Settings("tiny"))
  try:
    with serving(app) as url:
      yield engine, app, url
  finally:
    engine.close(0.0)
