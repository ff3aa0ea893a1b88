"""Chunked cross-entropy against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matformer_jax import evals, sharding
from matformer_jax.config import Execution
from matformer_jax.models import losses


def plain(hidden, embedding, targets, z_loss):
  logits = jnp.einsum("btd,vd->btv", hidden, embedding)
  lse = jax.nn.logsumexp(logits, -1)
  nll = jnp.mean(lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0])
  return nll + z_loss * jnp.mean(lse**2), nll


def inputs(batch=4, length=12, width=8, vocab=52):
  a, b, c = jax.random.split(jax.random.key(0), 3)
  return (
    jax.random.normal(a, (batch, length, width)),
    jax.random.normal(b, (vocab, width)),
    jax.random.randint(c, (batch, length), 0, vocab),
  )


@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_value_and_gradient(chunks, z_loss):
  x, e, y = inputs()
  ours = lambda x, e: losses.chunked_cross_entropy(x, e, y, chunks, z_loss)
  np.testing.assert_allclose(ours(x, e), plain(x, e, y, z_loss), rtol=1e-5)
  scaled = lambda f: jax.grad(lambda x, e: 3.0 * f(x, e)[0], (0, 1))(x, e)
  for a, b in zip(scaled(ours), scaled(lambda x, e: plain(x, e, y, z_loss))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_num_chunks_divides_and_fits():
  execution = Execution(mesh=sharding.make_mesh(dict(fsdp=2, tensor=4)), logits_bytes=10**5)
  n = losses.num_chunks((8, 96), 1000, execution)
  assert 96 % n == 0 and 4 * 96 // n * 250 * 4 <= 10**5
  assert 4 * 96 // (n - 1) * 250 * 4 > 10**5
  assert losses.num_chunks((1, 10), 10**9) == 10  # never less than one token of each row


def test_rows_that_fill_a_batch_do_not_count():
  """Of two batches of two rows the last row fills: it has weight 0, and a large loss."""
  batches = [np.array([[1, 2.0], [1, 4.0]]), np.array([[1, 6.0], [0, 1000.0]])]
  rows = evals.measure(
    ["S", "XL"],
    batches,
    reference=lambda batch: None,
    program=lambda batch, reference, g: batch * (1 if g == "S" else [1, 10]),
    should_stop=lambda: False,
    progress=lambda done: None,
  )
  assert rows[..., 1].tolist() == [[2, 4, 6], [20, 40, 60]]


def test_memory_is_far_below_the_plain_loss():
  x, e, y = inputs(batch=2, length=256, width=16, vocab=32_000)

  def temp(f):
    grad = jax.jit(jax.grad(lambda x, e: f(x, e)[0], (0, 1)))
    return grad.lower(x, e).compile().memory_analysis().temp_size_in_bytes

  chunked = functools.partial(losses.chunked_cross_entropy, targets=y, chunks=16)
  assert temp(lambda x, e: chunked(x, e)) < 0.25 * temp(lambda x, e: plain(x, e, y, 0.0))
