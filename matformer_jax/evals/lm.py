"""Validation loss, and consistency with the largest granularity (Sections 3.4, F.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.evals import Result
from matformer_jax.models import losses
from matformer_jax.models.matlm import MatLM

METRICS = ("loss", "agreement", "kl")


def evaluate(
  config: MatLMConfig,
  execution: Execution,
  params,
  granularities: Sequence[gran.Granularity],
  batches: Iterable[np.ndarray],
  consistency: bool = True,
  should_stop: Callable[[], bool] = lambda: False,
  progress: Callable[[int], None] = lambda n: None,
) -> list[Result] | None:
  """Teacher-forced measurements on the same batches, against the full model.

  Args:
    params: universal parameters.
    granularities: what to measure.
    batches: [B, T+1] int32 token windows, all of one shape; read once.
    consistency: also measure agreement and KL (costs a pass of the full model).
    should_stop: polled after every program call.
    progress: called with the number of batches done.

  Returns:
    One Result per granularity, or None if `should_stop` said so.
  """
  full = gran.full(config)
  sums = np.zeros((len(granularities), 3))
  tokens = 0
  for done, batch in enumerate(batches, 1):
    reference = _hidden(params, batch, config, execution, full) if consistency else None
    totals = []
    for g in granularities:
      totals.append(_measure(params, batch, reference, config, execution, g))
      if should_stop():
        return None
    sums += np.stack([np.asarray(t, np.float64) for t in totals])
    tokens += batch.shape[0] * (batch.shape[1] - 1)
    progress(done)
  loss, agree, kl = (sums / max(tokens, 1)).T
  results = []
  for i, g in enumerate(granularities):
    metrics = {"loss": float(loss[i]), "perplexity": _exp(loss[i])}
    metrics |= {"agreement": float(agree[i]), "kl": float(kl[i])} if consistency else {}
    results.append(Result(gran.to_text(g, config), tokens, metrics))
  return results


def _exp(x: float) -> float:
  return math.exp(x) if x < 700 else math.inf


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _hidden(params, batch, config, execution, granularity):
  model = MatLM(config, execution)
  return model.apply(
    {"params": params}, batch[:, :-1], granularity=granularity, return_hidden=True
  )[0]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _measure(params, batch, reference, config, execution, granularity):
  """Sums over tokens of (nll, agreement, kl) of one batch, in chunks along T."""
  inputs, targets = batch[:, :-1], batch[:, 1:]
  hidden, embedding = MatLM(config, execution).apply(
    {"params": params}, inputs, granularity=granularity, return_hidden=True
  )
  rows, length = inputs.shape
  chunks = losses.num_chunks(inputs.shape, config.vocab_size, execution)

  def split(x):
    x = x.reshape((rows, chunks, length // chunks) + x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def log_probs(x):
    logits = jnp.einsum("btd,vd->btv", x, embedding, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits)

  def chunk(sums, xs):
    x, y, ref = xs
    logp = log_probs(x)
    nll = -jnp.sum(jnp.take_along_axis(logp, y[..., None], -1))
    agree = kl = jnp.zeros(())
    if ref is not None:
      logp_ref = log_probs(ref)
      agree = jnp.sum(jnp.argmax(logp, -1) == jnp.argmax(logp_ref, -1))
      kl = jnp.sum(jnp.exp(logp_ref) * (logp_ref - logp))
    return sums + jnp.stack([nll, agree, kl]), None

  xs = (split(hidden), split(targets), None if reference is None else split(reference))
  return jax.lax.scan(chunk, jnp.zeros(3), xs)[0]
