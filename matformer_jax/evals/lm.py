"""Validation loss, bits per byte, consistency with the largest granularity (Sections 3.4, F.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.evals import Result, measure, with_stderr
from matformer_jax.models import losses
from matformer_jax.models.matlm import MatLM

METRICS = ("loss", "agreement", "kl")


def evaluate(
  config: MatLMConfig,
  execution: Execution,
  params,
  granularities: Sequence[gran.Granularity],
  batches: Iterable[Mapping[str, np.ndarray]],
  consistency: bool = True,
  should_stop: Callable[[], bool] = lambda: False,
  progress: Callable[[int], None] = lambda n: None,
  against: tuple[MatLMConfig, Any] | None = None,
) -> list[Result] | None:
  """Teacher-forced measurements on the same batches, against the full model.

  Args:
    params: universal parameters.
    granularities: what to measure.
    batches: as `ValidationWindows.read` gives them, all of one shape; read once.
    consistency: also measure agreement and KL (costs a pass of the full model).
    should_stop: polled after every program call.
    progress: called with the number of batches done.
    against: config and parameters of another model, of the same vocabulary, which agreement and
      KL compare with instead.

  Returns:
    One Result per granularity, or None if `should_stop` said so.
  """
  other, theirs = against or (config, params)
  full = gran.full(other)
  rows = measure(
    granularities,
    batches,
    lambda batch: _apply_jit(theirs, batch, other, execution, full) if consistency else None,
    lambda batch, reference, g: _measure(params, batch, reference, config, execution, g),
    should_stop,
    progress,
  )
  if rows is None:
    return None
  results = []
  for g, (_, size, nll, agree, kl) in zip(granularities, np.moveaxis(rows, 2, 1)):
    metrics = of_text(nll, size, config.seq_len)
    if consistency:
      tokens = len(nll) * config.seq_len
      metrics |= {"agreement": float(agree.sum() / tokens), "kl": float(kl.sum() / tokens)}
    results.append(Result(gran.to_text(g, config), len(nll) * config.seq_len, metrics))
  return results


def of_text(nll: np.ndarray, size: np.ndarray, seq_len: int) -> dict[str, float]:
  """Loss with its standard error over windows, perplexity and bits per byte.

  Args:
    nll: [windows], of all `seq_len` tokens of a window together, nats.
    size: [windows], bytes of their text.
  """
  metrics = with_stderr("loss", nll / seq_len)
  return metrics | {
    "perplexity": _exp(metrics["loss"]),
    "bits_per_byte": float(nll.sum() / math.log(2) / max(size.sum(), 1)),
  }


def _exp(x: float) -> float:
  return math.exp(x) if x < 700 else math.inf


def _apply(params, batch, config, execution, granularity):
  """(hidden [B, T, D], embedding [V, D]); attention within documents where they are separated."""
  segments = {"segments_BxT": batch["segments"]} if "segments" in batch else {}
  return MatLM(config, execution).apply(
    {"params": params},
    batch["tokens"][:, :-1],
    granularity=granularity,
    return_hidden=True,
    **segments,
  )


_apply_jit = jax.jit(_apply, static_argnums=(2, 3, 4))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _measure(params, batch, reference, config, execution, granularity):
  """[B, 5]: weight, bytes and sums over tokens of (nll, agreement, kl), in chunks along T."""
  targets = batch["tokens"][:, 1:]
  hidden, embedding = _apply(params, batch, config, execution, granularity)
  rows, length = targets.shape
  chunks = losses.num_chunks(targets.shape, config.vocab_size, execution)

  def split(x):
    x = x.reshape((rows, chunks, length // chunks) + x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def log_probs(x, head):
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits)

  def chunk(sums, xs):
    x, y, ref = xs
    logp = log_probs(x, embedding)
    nll = -jnp.sum(jnp.take_along_axis(logp, y[..., None], -1)[..., 0], -1)
    agree = kl = jnp.zeros(rows)
    if ref is not None:
      logp_ref = log_probs(ref, reference[1])
      agree = jnp.sum(jnp.argmax(logp, -1) == jnp.argmax(logp_ref, -1), -1)
      kl = jnp.sum(jnp.exp(logp_ref) * (logp_ref - logp), (-2, -1))
    return sums + jnp.stack([nll, agree, kl], 1), None

  xs = (split(hidden), split(targets), None if reference is None else split(reference[0]))
  sums = jax.lax.scan(chunk, jnp.zeros((rows, 3)), xs)[0]
  known = jnp.stack([batch["weight"], batch["bytes"].astype(jnp.float32)], 1)
  return sharding.replicate(jnp.concatenate([known, sums], 1), execution)
