"""Clients of a server, well-behaved and not, all at once."""

import asyncio
import collections
import random

import httpx
import openai

SIZES = ("S", "M", "XL", None)  # None: the load policy chooses


class Storm:
  """Many clients for some seconds.

  Args:
    url: of the server.
    name: of the model.
    expected: (prompt, granularity's text, tokens) -> the greedy text.
    prompts, lengths: to choose from.

  Attributes:
    counts: of what happened, by name.
    chosen: sizes that the load policy chose.
    wrong: what should not have happened.
  """

  def __init__(self, url, name, expected, prompts, lengths):
    self.url, self.name, self.expected = url, name, expected
    self.prompts, self.lengths = prompts, lengths
    self.counts = collections.Counter()
    self.wrong = []
    self.chosen = set()

  def run(self, clients: int, seconds: float, seed: int = 0) -> None:
    asyncio.run(self._run(clients, seconds, seed))

  async def _run(self, clients, seconds, seed):
    deadline = asyncio.get_running_loop().time() + seconds
    limits = httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(timeout=120, limits=limits)
    self.openai = openai.AsyncOpenAI(
      base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http
    )
    self.http = http

    async def client(i):
      abuse = self.leaves, self.malformed, self.wrong_value, self.oversized, self.garbage
      rng = random.Random(f"{seed}/{i}")
      while asyncio.get_running_loop().time() < deadline:
        # Most requests are good ones.
        act = rng.choice([*3 * [self.whole, self.stream], *abuse])
        try:
          await act(rng)
        except openai.RateLimitError as e:
          self.counts["refused, queue full"] += 1
          if "retry-after" not in e.response.headers:
            self.wrong.append("429 without Retry-After")
          await asyncio.sleep(rng.uniform(0, 0.2))
        except Exception as e:
          self.wrong.append(f"{act.__name__}: {type(e).__name__}: {e}"[:300])

    await asyncio.gather(*map(client, range(clients)))
    await http.aclose()

  def _request(self, rng):
    size = rng.choice(SIZES)
    return dict(
      model=self.name if size is None else f"{self.name}:{size}",
      prompt=rng.choice(self.prompts),
      max_tokens=rng.choice(self.lengths),
      temperature=0,
    )

  def _check(self, request, size, text, what):
    asked = request["model"].partition(":")[2]
    if not asked:
      self.chosen.add(size)
    elif size != asked:
      self.wrong.append(f"asked for {asked}, {size} answered")
    if text != self.expected(request["prompt"], size, request["max_tokens"]):
      self.wrong.append(f"another text for {request}: {text!r}")
    self.counts[what] += 1

  async def whole(self, rng):
    request = self._request(rng)
    answer = await self.openai.completions.create(**request)
    size = answer.matformer["granularity"]
    self._check(request, size, answer.choices[0].text, "whole")

  async def stream(self, rng):
    request = self._request(rng)
    text, size = "", None
    async for chunk in await self.openai.completions.create(**request, stream=True):
      text += chunk.choices[0].text
      size = chunk.matformer["granularity"]
    self._check(request, size, text, "streamed")

  async def leaves(self, rng):
    """Goes away in the middle of a stream, or before its answer."""
    request = self._request(rng) | {"max_tokens": max(self.lengths), "stream": rng.random() < 0.5}
    try:
      timeout = httpx.Timeout(60, read=rng.uniform(0.001, 0.1))
      async with self.http.stream(
        "POST", f"{self.url}/v1/completions", json=request, timeout=timeout
      ) as r:
        async for _ in r.aiter_bytes():
          if rng.random() < 0.5:
            break
    except httpx.ReadTimeout:
      pass
    self.counts["left"] += 1

  async def malformed(self, rng):
    bodies = (b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 10_000, b'{"model": 1}', b"")
    r = await self.http.post(
      f"{self.url}/v1/completions",
      content=rng.choice(bodies),
      headers={"content-type": "application/json"},
    )
    self._refused(r, (400,), "malformed")

  async def wrong_value(self, rng):
    change = rng.choice(
      [
        {"model": "gpt-4"},
        {"model": f"{self.name}:HUGE"},
        {"temperature": -1},
        {"max_tokens": 10**6},
        {"logprobs": 5},
        {"prompt": []},
        {"prompt": [10**9]},
        {"prompt": "word " * 20_000},
        {"n": 1000},
        {"nonsense": True},
      ]
    )
    r = await self.http.post(f"{self.url}/v1/completions", json=self._request(rng) | change)
    self._refused(r, (400, 404), "wrong values")

  async def oversized(self, rng):
    # On a connection of its own: one that is kept alive may be closed while the body is written.
    async with httpx.AsyncClient(timeout=120) as http:
      r = await http.post(f"{self.url}/v1/completions", content=b"x" * 3_000_000)
    self._refused(r, (413,), "oversized")

  async def garbage(self, rng):
    """Bytes that are no HTTP, or a request that never ends."""
    host, _, port = self.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
    writer.write(rng.choice([rng.randbytes(200) + b"\r\n\r\n", start, b"GET / HTTP/9.9\r\n\r\n"]))
    await writer.drain()
    await asyncio.sleep(rng.uniform(0, 0.05))
    writer.close()
    self.counts["garbage"] += 1

  def _refused(self, response, statuses, what):
    body = response.json() if response.status_code in statuses else {}
    error = body.get("error", {})
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
      self.wrong.append(f"{what}: {response.status_code} {response.text[:200]}")
    self.counts[f"refused, {what}"] += 1
