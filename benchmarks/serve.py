"""What the load policy is worth: latency under a burst, with it and without.

  python benchmarks/serve.py                            a random model that it makes, 12M parameters
  python benchmarks/serve.py --workdir=runs/quickstart

Starts `matformer serve` for each of three runs. The first measures how many requests a second
each end of the sizes can answer. Then requests arrive at random moments, for --seconds, at a rate
between the two: more than the largest size can answer, less than the smallest. In the second half
of the burst, latency should be no worse than in the first with the policy, and grow without it.
Clients stream; nobody is refused (the queue has room for all). The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
import jax
import numpy as np

import matformer_jax
from matformer_jax import granularity as gran
from matformer_jax import tables
from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint, model_dir
from matformer_jax.config import MatLMConfig, model_config
from matformer_jax.data.tokenizer import train_tokenizer
from matformer_jax.models import matlm

_WORKDIR = flags.DEFINE_string("workdir", None, "A trained model; default makes a random one.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Requests that run together.")
_SECONDS = flags.DEFINE_float("seconds", 30.0, "Of each burst.")
_TOKENS = flags.DEFINE_integer("tokens", 48, "Generated per request.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 32, "Per request.")
_RATE = flags.DEFINE_float(
  "rate", None, "Requests a second; default between what the largest and the smallest size can do."
)
_NAME = "m"


@dataclasses.dataclass(frozen=True)
class Answer:
  """One request as its client saw it; seconds since it was sent.

  Attributes:
    sent: since the burst began.
    size: who answered.
  """

  sent: float
  first: float
  whole: float
  tokens: int
  size: str


def make_model(out: pathlib.Path) -> None:
  """A model directory with random weights: time does not depend on them."""
  text = "\n".join(
    p.read_text() for p in sorted(pathlib.Path(matformer_jax.__path__[0]).glob("*.py"))
  )
  tokenizer = train_tokenizer(text.split("\n\n"), 2048, "bpe", 10**6)
  config = MatLMConfig(vocab_size=2048, num_layers=6, d_model=384, num_heads=6, seq_len=256)
  training = matformer_jax.get_config("matlm:quickstart")
  card = {
    "format": checkpoint.FORMAT,
    "task": "matlm",
    "model": config.to_dict(),
    "identity": {"tokenizer": tokenizer.sha256},
    "config": json.loads(training.to_json_best_effort()),
    **cards.versions(),
  }
  params = matlm.init_params(config, jax.random.key(0))
  model_dir.write(out, card, params, 0, tokenizer.save)


@contextlib.contextmanager
def serving(workdir: pathlib.Path, policy: bool):
  """(host, port) of the program, in a process of its own."""
  command = [
    *(sys.executable, "-m", "matformer_jax.serve", f"--workdir={workdir}", "--port=0"),
    *(f"--slots={_SLOTS.value}", "--queue_limit=100000", f"--name={_NAME}", "--timeout=3600"),
    "--policy" if policy else "--nopolicy",
  ]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
  try:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
      sys.exit("the server did not start")
    host, _, port = line.split()[-1].removeprefix("http://").partition(":")
    yield host, int(port)
  finally:
    process.send_signal(signal.SIGTERM)
    process.wait()


async def ask(address, model: str, prompt: list[int], began: float) -> Answer:
  """One streamed completion. Plain sockets: a client library would take the server's CPU."""
  body = json.dumps(
    {
      "model": model,
      "prompt": prompt,
      "max_tokens": _TOKENS.value,
      "temperature": 0,
      "stream": True,
      "stream_options": {"include_usage": True},
    }
  ).encode()
  sent = time.perf_counter()
  reader, writer = await asyncio.open_connection(*address)
  head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
  writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
  assert (await reader.readline()).startswith(b"HTTP/1.1 200")
  first, last = 0.0, b""
  async for line in reader:
    if line.startswith(b"data: {"):
      first, last = first or time.perf_counter(), line
  writer.close()
  now, usage = time.perf_counter(), json.loads(last.removeprefix(b"data: "))
  tokens, size = usage["usage"]["completion_tokens"], usage["matformer"]["granularity"]
  return Answer(sent - began, first - sent, now - sent, tokens, size)


def prompts(vocab: int):
  rng = random.Random(0)
  while True:
    yield [rng.randrange(8, vocab) for _ in range(_PROMPT.value)]


async def capacity(address, size: str, vocab: int, requests: int) -> float:
  """Requests a second, when there are always some waiting."""
  source, began = prompts(vocab), time.perf_counter()
  await asyncio.gather(
    *(ask(address, f"{_NAME}:{size}", next(source), began) for _ in range(requests))
  )
  return requests / (time.perf_counter() - began)


async def burst(address, rate: float, vocab: int) -> tuple[list[Answer], float]:
  """Requests at random moments, and the seconds until the last is answered."""
  source, rng, began = prompts(vocab), random.Random(1), time.perf_counter()
  asked, at = [], 0.0
  while at < _SECONDS.value:
    await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
    asked.append(asyncio.create_task(ask(address, _NAME, next(source), began)))
    at += rng.expovariate(rate)
  answers = await asyncio.gather(*asked)
  return answers, time.perf_counter() - began


def summary(answers: list[Answer], seconds: float) -> dict:
  """Percentiles in seconds, of all answers and of those asked for in each half."""
  half = lambda late: [a for a in answers if (a.sent >= _SECONDS.value / 2) == late]
  p = lambda values, q: float(np.percentile(list(values), q))
  sizes = collections.Counter(a.size for a in answers)
  return {
    "requests": len(answers),
    "first_p50": p((a.first for a in answers), 50),
    "first_p95": p((a.first for a in answers), 95),
    "whole_p50": p((a.whole for a in answers), 50),
    "whole_p95": p((a.whole for a in answers), 95),
    "whole_p95_first_half": p((a.whole for a in half(False)), 95),
    "whole_p95_second_half": p((a.whole for a in half(True)), 95),
    "tokens_per_s": sum(a.tokens for a in answers) / seconds,
    "sizes": {size: count / len(answers) for size, count in sizes.items()},
  }


def main(argv) -> None:
  logging.set_verbosity(logging.ERROR)
  with tempfile.TemporaryDirectory() as directory:
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path(directory, "model"))
    if not _WORKDIR.value:
      make_model(workdir)
    config = model_config(cards.read(workdir))
    names = [gran.to_text(g, config) for g in gran.trained(config)]
    vocab = config.vocab_size
    with serving(workdir, policy=False) as address:
      for size in names:  # not measured: the first calls are slower
        asyncio.run(capacity(address, size, vocab, _SLOTS.value))
      able = {size: asyncio.run(capacity(address, size, vocab, 6 * _SLOTS.value)) for size in names}
    rate = _RATE.value or (able[names[0]] * able[names[-1]]) ** 0.5
    rows = [(size, f"{n:.1f}", f"{n * _TOKENS.value:,.0f}") for size, n in able.items()]
    print(f"{_SLOTS.value} slots, {_PROMPT.value} tokens of prompt and {_TOKENS.value} new\n")
    print(tables.table(("size", "requests/s", "tokens/s"), rows))
    print(f"\n{rate:.1f} requests/s for {_SECONDS.value:g} s, seconds\n", flush=True)
    results = {}
    for policy in (True, False):
      with serving(workdir, policy) as address:
        asyncio.run(capacity(address, names[-1], vocab, _SLOTS.value))
        results["on" if policy else "off"] = summary(*asyncio.run(burst(address, rate, vocab)))
  header = (
    *("policy", "first token p50", "p95", "whole p50", "p95", "p95 1st half", "p95 2nd half"),
    *("tokens/s", "answered by"),
  )
  rows = [
    (
      policy,
      *(f"{value:.2f}" for value in list(r.values())[1:7]),
      f"{r['tokens_per_s']:,.0f}",
      ", ".join(f"{size} {r['sizes'][size]:.0%}" for size in names if size in r["sizes"]),
    )
    for policy, r in results.items()
  ]
  print(tables.table(header, rows))
  print(json.dumps({"capacity": able, "rate": rate, **results}))


if __name__ == "__main__":
  app.run(main)
