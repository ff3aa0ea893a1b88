"""Chunked cross-entropy against the plain one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matformer_jax import evals, sharding
from matformer_jax.config import Execution
from matformer_jax.models import loss_kernel, losses
from matformer_jax.tpu import chips


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


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("chunks", [1, 2])
def test_the_tpu_kernels_compute_the_same_loss(keep_logits, chunks):
  """Interpreted on CPU, several tiles each way, two lanes' columns in each; exact in float32."""
  x, e, y = inputs(batch=2, length=256, width=32, vocab=768)
  x, e = x.astype(jnp.bfloat16), (e / 4).astype(jnp.bfloat16)
  tiles = loss_kernel.Tiles(128, 256, keep_logits, vmem_bytes=0, interpret=True)
  ours = lambda x, e: losses.chunked_cross_entropy(x, e, y, chunks, 1e-2, tiles)
  exact = lambda x, e: plain(x.astype(jnp.float32), e.astype(jnp.float32), y, 1e-2)
  np.testing.assert_allclose(ours(x, e), exact(x, e), rtol=1e-5)
  scaled = lambda f: jax.grad(lambda x, e: 3.0 * f(x, e)[0], (0, 1))(x, e)
  for have, want in zip(scaled(ours), scaled(exact)):
    have, want = np.asarray(have, np.float32), np.asarray(want, np.float32)
    assert np.linalg.norm(have - want) < 0.01 * np.linalg.norm(want)


def test_the_kernels_keep_accuracy_with_large_logits():
  """A row whose largest logits come last, and one whose come first, far from zero."""
  x = jnp.array([[1.0] * 8, [-1.0] * 8] * 64, jnp.bfloat16)[None]
  e = (jnp.linspace(-60, 60, 512)[:, None] * jnp.ones(8) / 4).astype(jnp.bfloat16)
  y = jnp.tile(jnp.array([0, 511]), 64)[None]
  tiles = loss_kernel.Tiles(128, 256, True, vmem_bytes=0, interpret=True)
  ours = losses.chunked_cross_entropy(x, e, y, 1, 0.0, tiles)
  np.testing.assert_allclose(ours, plain(x.astype(jnp.float32), e, y, 0.0), rtol=1e-5)


def test_tiles_fit_the_chip():
  v4, v5e, v5p = (chips.TPUS[name] for name in ("v4", "v5e", "v5p"))
  tiles = loss_kernel.choose_tiles(16384, 256_000, 1536, v5p)
  assert tiles is not None and tiles.keep_logits
  assert 16384 % tiles.rows == 0 and 256_000 % tiles.vocab == 0
  small = loss_kernel.choose_tiles(16384, 256_000, 1536, v4)
  assert small is not None and small.rows * small.vocab < tiles.rows * tiles.vocab
  # Where D is small it is the memory that limits, and logits are computed twice.
  assert not loss_kernel.keep_logits(256, v5e) and loss_kernel.keep_logits(3072, v5e)
  assert loss_kernel.choose_tiles(16384, 50_257, 1536, v5p) is None
  assert loss_kernel.choose_tiles(100, 256_000, 1536, v5p) is None
  # Its products outrun its memory the most: more rows for each read of the embedding.
  v6e = loss_kernel.choose_tiles(16384, 256_000, 4096, chips.TPUS["v6e"])
  assert v6e is not None and v6e.rows == 512


def test_where_the_loss_runs_in_kernels():
  """In bfloat16, where each device has rows of its own and the whole vocabulary."""
  shape, vocab = (16, 1024, 1536), 256_000
  alone = Execution.for_platform("tpu", device_kind="TPU v5")

  def cut(vocab=vocab, dtype=jnp.bfloat16, **changes):
    return losses.cut(shape, vocab, dtype, dataclasses.replace(alone, **changes))

  chunks, tiles = cut(logits_bytes=2**33)
  rows = 16 * 1024 // chunks
  assert chunks == 2 and tiles == loss_kernel.choose_tiles(rows, vocab, 1536, chips.TPUS["v5p"])
  chunks, tiles = cut()
  assert chunks == 1 and tiles is not None
  fsdp, tensor = (sharding.make_mesh(sizes) for sizes in (dict(fsdp=8), dict(fsdp=4, tensor=2)))
  assert cut(mesh=fsdp, per_device=True) == (chunks, tiles)
  for other in (
    cut(dtype=jnp.float32),
    cut(kernels=None),
    cut(vocab=50_257),
    cut(mesh=fsdp),
    cut(mesh=tensor, per_device=True),
  ):
    assert other[1] is None
  # Rows that no tile divides into are cut further until one does, or left to XLA.
  assert losses.cut((3, 128, 1536), vocab, jnp.bfloat16, alone)[1].rows == 128
  assert losses.cut((1, 100, 1536), vocab, jnp.bfloat16, alone)[1] is None


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
