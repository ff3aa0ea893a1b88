"""The server's engine: every request gets what it would get alone, whoever else asks."""

import threading
import time

import helpers
import jax
import numpy as np
import pytest

from matformer_jax import UserError
from matformer_jax import granularity as gran
from matformer_jax.decoding.decode import Sampling
from matformer_jax.loading import LanguageModel, Settings, load
from matformer_jax.serving import policy
from matformer_jax.serving.engine import RETRY, Engine, Overloaded, Request, _Drafter


@pytest.fixture(scope="module")
def model(tiny_run) -> LanguageModel:
  return load(tiny_run, kind=LanguageModel)


@pytest.fixture(scope="module")
def engine(model):
  engine = Engine(model, slots=4, max_length=192)
  yield engine
  engine.close()


class Answer:
  """A listener that keeps what it is told."""

  def __init__(self):
    self.tokens, self.finish, self.done = [], None, threading.Event()
    self.updates = 0

  def __call__(self, update):
    assert self.finish is None, "told after the end"
    self.tokens += update.tokens
    self.updates += 1
    if update.finish:
      self.finish = update.finish
      self.done.set()

  def wait(self):
    assert self.done.wait(helpers.BACKSTOP_S)
    return self


def alone(model, request: Request, granularity) -> list[int]:
  settings = Settings(granularity, request.max_tokens, request.sampling, request.seed)
  *_, ((ids,), _) = model.stream([list(request.prompt)], settings)
  return ids[:-1] if ids[-1] == model.tokenizer.eos_id else ids


def requests(model, count: int) -> list[Request]:
  rng = np.random.default_rng(0)
  sizes = [gran.parse(g, model.config) for g in ("S", "M", "L", "XL", "S*1+L*1")]
  samplings = [Sampling(), Sampling(), Sampling(0.8, 20)]
  return [
    Request(
      tuple(rng.integers(0, model.config.vocab_size, rng.integers(1, 150)).tolist()),
      int(rng.integers(1, 40)),
      sizes[i % 5],
      samplings[i % 3],
      seed=i,
    )
    for i in range(count)
  ]


def test_every_request_gets_what_it_would_get_alone(model, engine):
  asked = requests(model, 24)
  answers = [Answer() for _ in asked]
  for request, answer in zip(asked, answers):
    engine.submit(request, answer)
  for request, answer in zip(asked, answers):
    answer.wait()
    assert answer.tokens == alone(model, request, request.granularity)
    assert answer.finish == ("length" if len(answer.tokens) == request.max_tokens else "stop")
  stats = engine.stats()
  assert (stats.active, stats.waiting, stats.failures) == (0, 0, 0)
  assert set(stats.tokens) == {"S", "M", "L", "XL", "S*1+L*1"}


def test_a_request_alone_is_drafted_and_the_same(model, engine, monkeypatch):
  monkeypatch.setattr(_Drafter, "pays", lambda self: True)
  before = engine.stats().drafted
  request = Request((5, 6, 7), 60, gran.full(model.config))
  answer = Answer()
  engine.submit(request, answer)
  assert answer.wait().tokens == alone(model, request, "XL")
  assert engine.stats().drafted > before


def answers_to(engine, requests) -> list[Answer]:
  """Of requests that are asked together."""
  answers = [Answer() for _ in requests]
  for request, answer in zip(requests, answers):
    engine.submit(request, answer)
  return [answer.wait() for answer in answers]


def test_nothing_compiles_after_the_start(model, monkeypatch):
  monkeypatch.setattr(_Drafter, "pays", lambda self: True)
  engine = Engine(model, slots=3, max_length=192)  # as no other test has
  compiled = []

  def hear(event, _, **kwargs):
    if "backend_compile" in event:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(hear)
  try:
    answers_to(engine, requests(model, 9))
    answers_to(engine, [Request((5, 6), 30, gran.full(model.config))])  # drafted
    assert engine.stats().drafted and not compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)
    engine.close()


def test_a_shrunken_cache_leaves_nothing_of_longer_sequences(model):
  engine = Engine(model, slots=2, max_length=192, draft=False)
  full = gran.full(model.config)
  rng = np.random.default_rng(0)
  ask = lambda length, count: Request(
    tuple(rng.integers(0, model.config.vocab_size, length).tolist()), count, full
  )
  answers_to(engine, [ask(3, 40), ask(150, 3)])
  answers_to(engine, [ask(4, 8)])
  assert engine._slots.tokens.shape[1] == 64
  short = [ask(4, 12), ask(4, 12)]
  for request, answer in zip(short, answers_to(engine, short)):
    assert answer.tokens == alone(model, request, "XL")
  engine.close()


def test_a_long_prompt_is_not_overtaken_for_ever(model):
  engine = Engine(model, slots=2, max_length=192, draft=False)
  order = []

  class Ordered(Answer):
    def __call__(self, update):
      super().__call__(update)
      if update.finish:
        order.append(self)

  answers = [Ordered() for _ in range(40)]
  for i, answer in enumerate(answers):
    engine.submit(Request((7,) * (3 if i else 180), 1), answer)
  for answer in answers:
    answer.wait()
  engine.close()
  assert order.index(answers[0]) < 20


def test_an_engine_that_cannot_go_on_says_so(model, monkeypatch):
  engine = Engine(model, slots=1, max_length=58, draft=False)

  def fails(*args):
    raise RuntimeError("out of memory")

  for name in ("advance", "empty"):
    monkeypatch.setattr(type(engine._decoder), name, fails)
  answers = answers_to(engine, [Request((1, 2), 3)] * 2)
  assert [answer.finish for answer in answers] == ["error", "error"]
  engine.close()
  assert not engine.alive
  with pytest.raises(Overloaded):
    engine.submit(Request((1,), 2), Answer())


def test_a_cancelled_request_frees_its_slot(model, engine):
  blocked = [Answer() for _ in range(4)]
  long = Request((1, 2), 190)
  jobs = [engine.submit(long, answer) for answer in blocked]
  queued, after = Answer(), Answer()
  waiting = engine.submit(long, queued)
  engine.submit(Request((3,), 2), after)
  waiting.cancel()
  for job in jobs:
    job.cancel()
    job.cancel()
  assert {answer.wait().finish for answer in blocked} <= {"cancelled", "stop", "length"}
  assert queued.wait().finish == "cancelled" and not queued.tokens
  assert after.wait().finish in ("length", "stop")


def test_a_listener_that_fails_ends_its_request_alone(model, engine):
  def broken(update):
    raise RuntimeError("gone")

  before = engine.stats().finished.get("cancelled", 0)
  engine.submit(Request((1, 2), 150), broken)
  answer = Answer()
  engine.submit(Request((3,), 5), answer)
  assert answer.wait().finish in ("length", "stop")
  while engine.stats().active:
    time.sleep(0.01)
  assert engine.stats().finished["cancelled"] == before + 1


def test_a_turn_that_fails_ends_its_requests_and_no_others(model, engine, monkeypatch):
  real = type(engine._decoder).advance
  calls = []

  def fails_once(self, *args):
    calls.append(0)
    if len(calls) == 1:
      raise RuntimeError("the device is gone")
    return real(self, *args)

  monkeypatch.setattr(type(engine._decoder), "advance", fails_once)
  request = Request((1, 2), 5, gran.parse("S", model.config))
  first, second = Answer(), Answer()
  engine.submit(request, first)
  assert first.wait().finish == "error"
  engine.submit(request, second)
  assert second.wait().tokens == alone(model, request, "S")


@pytest.mark.parametrize(
  "request_, words",
  [
    (Request((), 5), "at least one"),
    (Request((10**6,), 5), "token ids in 0..511"),
    (Request((1,), 0), "max_tokens=0"),
    (Request((1,) * 100, 93), "100 tokens of prompt and 93 new ones are more than the 192"),
    (Request((1,), 1, seed=2**32), "seed=4294967296"),
  ],
)
def test_what_does_not_fit_is_refused(engine, request_, words):
  with pytest.raises(UserError, match=words):
    engine.submit(request_, lambda update: None)


def test_it_refuses_when_full_and_finishes_when_closed(model):
  engine = Engine(model, slots=1, max_length=64, queue_limit=2, draft=False)
  answers = []
  with pytest.raises(Overloaded, match="2 requests are waiting"):
    for _ in range(20):
      answers.append(Answer())
      engine.submit(Request((1,), 60), answers[-1])
  answers.pop()
  engine.close()
  assert all(answer.finish in ("length", "stop") for answer in answers)
  with pytest.raises(Overloaded, match="shutting down"):
    engine.submit(Request((1,), 2), Answer())


def test_drafting_goes_on_where_it_is_faster():
  drafter = object.__new__(_Drafter)
  drafter._speeds, drafter._calls = {}, 0
  assert drafter.pays()  # neither is known
  drafter.record(True, 10.0)
  assert not drafter.pays()
  drafter.record(False, 20.0)
  chosen = [drafter.pays() for _ in range(RETRY)]
  assert sum(chosen) == 1  # tried again now and then
  for _ in range(30):
    drafter.record(True, 40.0)
  chosen = [drafter.pays() for _ in range(RETRY)]
  assert sum(chosen) == RETRY - 1


def test_the_policy_takes_smaller_sizes_as_the_queue_grows():
  sizes: list = ["S", "M", "L", "XL"]
  assert [policy.choose(sizes, n, 4) for n in (0, 1, 4, 5, 8, 9, 100)] == [
    *"XL L L M M S S".split()
  ]
  assert policy.choose(sizes[3:], 100, 4) == "XL"


def test_one_call_is_answered_by_one_size(model):
  """Twelve choices on two slots, nobody else there: XL; three more callers: smaller ones."""
  engine = Engine(model, slots=2, max_length=64, draft=False)

  def ask(number):
    answers = [Answer() for _ in range(number)]
    jobs = []
    for answer in answers:
      jobs.append(engine.submit(Request((1,), 8), answer, jobs[0] if jobs else None))
    return jobs, answers

  jobs, answers = ask(12)
  for answer in answers:
    answer.wait()
  assert {job.granularity for job in jobs} == {gran.full(model.config)}
  with engine._changed:  # so that nothing starts before all are there
    calls = [ask(3) for _ in range(4)]
  for _, answers in calls:
    for answer in answers:
      answer.wait()
  engine.close()
  sizes = [{job.size for job in jobs} for jobs, _ in calls]
  assert all(len(found) == 1 for found in sizes)
  assert gran.full(model.config) not in sizes[0] and sizes[-1] == {gran.full(model.config)}


@pytest.mark.parametrize("on", [True, False])
def test_load_decides_who_answers(model, on):
  engine = Engine(model, slots=1, max_length=64, policy=on, draft=False)
  jobs, answers = [], []
  for _ in range(8):
    answers.append(Answer())
    jobs.append(engine.submit(Request((1,), 8), answers[-1]))
  for answer in answers:
    answer.wait()
  engine.close()
  got = [gran.to_text(job.granularity, model.config) for job in jobs]
  assert got[-1] == "XL" and ("S" in got) == on
