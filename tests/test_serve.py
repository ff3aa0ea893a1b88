"""The server over HTTP, with OpenAI's own client."""

import contextlib
import threading
import time

import fake_engine
import openai
import pytest
import uvicorn

import matformer_jax
from matformer_jax.serving import api


@pytest.fixture(scope="module")
def model(tiny_run):
  return matformer_jax.load(tiny_run)


@contextlib.contextmanager
def serving(app):
  """The base URL of an application that uvicorn serves from a thread."""
  config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    time.sleep(0.01)
  try:
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
  finally:
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def engine(model):
  engine = fake_engine.FakeEngine(model)
  yield engine
  engine.close()


@pytest.fixture(scope="module")
def url(model, engine):
  with serving(api.make_app(engine, model, api.Settings("tiny"))) as url:
    yield url


@pytest.fixture(scope="module")
def client(url):
  return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def expected(engine, text, tokens):
  prompt = engine.model.tokenizer.prompt(text)
  new = [engine.token(prompt, i) for i in range(tokens)]
  return engine.model.tokenizer.continuation(prompt, new)


def test_a_completion(client, engine):
  answer = client.completions.create(model="tiny:M", prompt="def f(", max_tokens=12)
  (choice,) = answer.choices
  assert choice.text == expected(engine, "def f(", 12) and choice.finish_reason == "length"
  assert answer.model == "tiny:M" and answer.matformer["granularity"] == "M"
  assert answer.usage.completion_tokens == 12


def test_a_stream_joins_to_the_same_text(client, engine):
  chunks = list(
    client.completions.create(
      model="tiny",
      prompt="def f(",
      max_tokens=12,
      stream=True,
      stream_options={"include_usage": True},
    )
  )
  assert "".join(c.choices[0].text for c in chunks[:-1]) == expected(engine, "def f(", 12)
  assert chunks[-1].usage.completion_tokens == 12 and chunks[-1].choices == []
  assert {c.model for c in chunks} == {"tiny:XL"}
