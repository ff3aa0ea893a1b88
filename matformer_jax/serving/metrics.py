"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import prometheus_client  # pyright: ignore[reportMissingImports]
from prometheus_client import core  # pyright: ignore[reportMissingImports]

from matformer_jax.serving.engine import Engine

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MIX = "mix"  # sizes that are not trained ones: there are too many for a label each


class Metrics:
  """A registry of its own: the engine's counts, and those of HTTP.

  Args:
    engine: read at every scrape.
    sizes: trained ones, by name.
  """

  def __init__(self, engine: Engine, sizes: Collection[str]):
    self._registry = prometheus_client.CollectorRegistry()
    self._registry.register(_EngineCollector(engine, sizes))
    self.responses = prometheus_client.Counter(
      "matformer_http_responses", "By path and status.", ["path", "status"], registry=self._registry
    )
    self.seconds = prometheus_client.Histogram(
      "matformer_request_seconds",
      "From a request for text to the end of its answer.",
      buckets=_SECONDS,
      registry=self._registry,
    )
    self.first_token_seconds = prometheus_client.Histogram(
      "matformer_first_token_seconds",
      "From a request for text to its first token.",
      buckets=_SECONDS,
      registry=self._registry,
    )

  def text(self) -> bytes:
    """In Prometheus' text format."""
    return prometheus_client.generate_latest(self._registry)


class _EngineCollector:
  def __init__(self, engine: Engine, sizes: Collection[str]):
    self._engine, self._sizes = engine, sizes

  def collect(self) -> Iterator[Any]:
    stats = self._engine.stats()
    for name, value, what in (
      ("slots", stats.slots, "Requests that run together, at most."),
      ("active", stats.active, "Requests that have a slot."),
      ("waiting", stats.waiting, "Requests that wait for a slot."),
    ):
      yield core.GaugeMetricFamily(f"matformer_{name}", what, value)
    for name, value, what in (
      ("prompt_tokens", stats.prompt_tokens, "Tokens of prompts."),
      ("steps", stats.steps, "Tokens made for all slots at once."),
      ("busy_seconds", stats.busy_seconds, "Spent in the model's programs."),
      ("drafted_tokens", stats.drafted, "Tokens drafted by speculative decoding."),
      ("accepted_tokens", stats.accepted, "Of them, those that the verifier accepted."),
      ("failures", stats.failures, "Turns of the engine that raised."),
    ):
      yield core.CounterMetricFamily(f"matformer_{name}", what, value)
    finished = core.CounterMetricFamily(
      "matformer_requests_finished", "By how they ended.", labels=["finish"]
    )
    for finish, count in stats.finished.items():
      finished.add_metric([finish], count)
    yield finished
    generated = core.CounterMetricFamily(
      "matformer_tokens", "Generated, by the size that did.", labels=["size"]
    )
    for size in self._sizes:
      generated.add_metric([size], stats.tokens.get(size, 0))
    mixes = sum(count for size, count in stats.tokens.items() if size not in self._sizes)
    generated.add_metric([_MIX], mixes)
    yield generated
