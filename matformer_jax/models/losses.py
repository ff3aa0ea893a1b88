"""Losses: over large vocabularies, in chunks; of distillation; over the classes of an image."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from matformer_jax import sharding
from matformer_jax.config import Execution
from matformer_jax.models import loss_kernel


def cross_entropy(
  hidden, embedding, targets, execution: Execution, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """`chunked_cross_entropy`, by the Pallas kernels where they run, in chunks that fit."""
  chunks, tiles = cut(hidden.shape, embedding.shape[0], hidden.dtype, execution)
  loss = lambda x, e, y: chunked_cross_entropy(x, e, y, chunks, z_loss, tiles)
  if tiles:
    loss = sharding.on_whole_vocabulary(loss, execution)
  return loss(hidden, embedding, targets)


def distillation(
  hidden,
  head,
  targets,
  teacher_hidden,
  teacher_head,
  execution: Execution,
  weight: float,
  temperature: float,
  z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`chunked_distillation` in chunks that fit, by XLA alone: the Pallas kernels have no teacher.

  Temporaries with gradients, of 2,048 tokens and two heads 576 wide in float32, 32 MiB of logits
  at a time, compiled for CPU: 177 MiB at a vocabulary of 49,152 and 650 MiB at 256,000, of which
  108 and 562 are the head's gradient. Whole logits: 3,072 and 16,000 MiB.
  """
  chunks, _ = cut(hidden.shape, head.shape[0], hidden.dtype, execution, distilled=True)
  return chunked_distillation(
    hidden, head, targets, teacher_hidden, teacher_head, weight, temperature, chunks, z_loss
  )


def cut(
  shape: tuple[int, int, int],
  vocab_size: int,
  dtype,
  execution: Execution,
  distilled: bool = False,
):
  """(chunks, tiles of the kernels or None) of the loss of hidden states [B, T, D].

  A distilled loss holds a teacher's logits too, and has no kernels.
  """
  batch, length, width = shape
  if distilled:
    return num_chunks((batch, length), vocab_size, execution, bytes_per_logit=8), None
  mesh, tpu = execution.mesh, execution.kernels
  # Each device must have rows of its own and the whole vocabulary.
  alone = mesh is None or (execution.per_device and mesh.shape[sharding.TENSOR] == 1)
  if tpu and alone and dtype == jnp.bfloat16:
    kept = 4 if loss_kernel.keep_logits(width, tpu) else 2  # bytes
    fewest = num_chunks((batch, length), vocab_size, execution, kept)
    for chunks in (n for n in range(fewest, length + 1) if length % n == 0):
      tiles = loss_kernel.choose_tiles(batch * length // chunks, vocab_size, width, tpu)
      if tiles:
        return chunks, tiles
  return num_chunks((batch, length), vocab_size, execution), None


def num_chunks(
  shape: tuple[int, int],
  vocab_size: int,
  execution: Execution = Execution(),
  bytes_per_logit: int = 4,
) -> int:
  """Smallest divisor of T whose chunks' logits fit `execution.logits_bytes` per device.

  Args:
    shape: (B, T) of the tokens that the program sees.
    bytes_per_logit: that are held at a time.
  """
  batch, length = shape
  mesh = execution.mesh
  rows = batch if execution.per_device else max(batch // sharding.batch_shards(mesh), 1)
  vocab = vocab_size // (mesh.shape[sharding.TENSOR] if mesh else 1)
  row_bytes = rows * vocab * bytes_per_logit
  for n in range(1, length + 1):
    if length % n == 0 and length // n * row_bytes <= execution.logits_bytes:
      return n
  return length


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def chunked_cross_entropy(
  hidden,
  embedding,
  targets,
  chunks: int = 1,
  z_loss: float = 0.0,
  tiles: loss_kernel.Tiles | None = None,
):
  """Mean next-token cross-entropy of logits = hidden @ embedding.T, never held whole.

  Gradients are computed in the forward scan, so each chunk's logits are made once.

  Args:
    hidden: [B, T, D], any float dtype.
    embedding: [V, D], same dtype.
    targets: [B, T] int32.
    chunks: T is cut into this many pieces; must divide T.
    z_loss: weight of mean(logsumexp^2), which keeps logits small (PaLM, 5).
    tiles: of the Pallas kernels; None leaves it to XLA.

  Returns:
    (objective, cross_entropy): float32 scalars in nats per token; the objective
    adds the z-loss.
  """
  return _forward(hidden, embedding, targets, chunks, z_loss, tiles, with_grad=False)[0]


class _Teacher(NamedTuple):
  """Hidden states [B, T, E] and output head [V, E] of a teacher, and how it is learned from."""

  hidden: jax.Array
  head: jax.Array
  weight: float
  temperature: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def chunked_distillation(
  hidden,
  head,
  targets,
  teacher_hidden,
  teacher_head,
  weight: float,
  temperature: float,
  chunks: int = 1,
  z_loss: float = 0.0,
):
  """Cross-entropy mixed with the divergence from a teacher (Hinton et al. 2015, Section 2).

    (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student)

  where KL compares softmax(logits / temperature) of both over the whole vocabulary, and
  temperature^2 keeps its gradient's size. As in `chunked_cross_entropy`, gradients are computed
  in the forward scan, and neither model's logits are held whole. The teacher gets no gradient.

  Args:
    hidden: [B, T, D], any float dtype.
    head: [V, D], same dtype.
    targets: [B, T] int32.
    teacher_hidden: [B, T, E], any float dtype.
    teacher_head: [V, E], same dtype.
    weight: in [0, 1].
    temperature: positive.
    chunks, z_loss: as in `chunked_cross_entropy`; the z-loss is not scaled by the weight.

  Returns:
    (objective, cross_entropy, KL): float32 scalars in nats per token. The objective adds the
    z-loss; cross-entropy and KL are unscaled.
  """
  teacher = _Teacher(teacher_hidden, teacher_head, weight, temperature)
  return _forward(hidden, head, targets, chunks, z_loss, None, False, teacher)[0]


def _forward(
  hidden, embedding, targets, chunks, z_loss, tiles, with_grad, teacher: _Teacher | None = None
):
  batch, length, width = hidden.shape
  vocab = embedding.shape[0]
  scale = 1.0 / (batch * length)
  x = jnp.moveaxis(hidden.reshape(batch, chunks, length // chunks, width), 1, 0)
  y = jnp.moveaxis(targets.reshape(batch, chunks, length // chunks), 1, 0)
  xs = (x, y)
  part = functools.partial(_part_by_kernels, tiles) if tiles else _part
  if teacher is not None:
    theirs = teacher.hidden.reshape(batch, chunks, length // chunks, -1)
    xs += (jnp.moveaxis(theirs, 1, 0),)
    part = functools.partial(_part_with_teacher, teacher)

  # On CPU [D, V]: it is cheaper to transpose the narrow operand.
  by_token = tiles is not None
  product = "btd,btv->vd" if by_token else "btd,btv->dv"

  def chunk(sums, xs):
    lse, target, *divergence, gradients = part(xs[0], embedding, *xs[1:])
    loss, z, *kl, d_embedding = sums
    loss += jnp.sum(lse - target)
    z += jnp.sum(jnp.square(lse))
    kl = [total + jnp.sum(d) for total, d in zip(kl, divergence)]
    if not with_grad:
      return (loss, z, *kl, d_embedding), None
    d_logits, d_x = gradients(scale, z_loss)
    d_embedding += jnp.einsum(product, xs[0], d_logits, preferred_element_type=jnp.float32)
    return (loss, z, *kl, d_embedding), d_x

  zero = jnp.zeros((), jnp.float32)
  shape = (vocab, width) if by_token else (width, vocab)
  accumulator = jnp.zeros(shape if with_grad else (), jnp.float32)
  zeros = (zero, zero) if teacher is None else (zero, zero, zero)
  (loss, z, *kl, d_embedding), d_x = _scan(chunk, (*zeros, accumulator), xs)
  if teacher is None:
    value = (loss * scale + z_loss * z * scale, loss * scale)
  else:
    loss, z, divergence = loss * scale, z * scale, kl[0] * scale
    objective = (1.0 - teacher.weight) * loss + z_loss * z
    objective += teacher.weight * teacher.temperature**2 * divergence
    value = (objective, loss, divergence)
  if not with_grad:
    return value, None
  d_embedding = jax.lax.optimization_barrier(d_embedding)
  assert d_x is not None
  d_hidden = jnp.moveaxis(d_x, 0, 1).reshape(hidden.shape)
  d_embedding = d_embedding if by_token else d_embedding.T
  return value, (d_hidden, d_embedding.astype(embedding.dtype))


def _softmax(x, embedding, y):
  """Of some tokens, float32: logits and exp(logits - top) [B, t, V]; top, the sum of that exp and
  the log-sum-exp [B, t, 1]; targets' logits [B, t]."""
  logits = jnp.einsum("btd,vd->btv", x, embedding, preferred_element_type=jnp.float32)
  top = jnp.max(logits, -1, keepdims=True)
  exp = jnp.exp(logits - top)
  total = jnp.sum(exp, -1, keepdims=True)
  lse = top + jnp.log(total)
  target = jnp.einsum(
    "btd,btd->bt", x, jnp.take(embedding, y, axis=0), preferred_element_type=jnp.float32
  )
  return logits, exp, top, total, lse, target


def _part(x, embedding, y):
  """(log-sum-exp [B, t], targets' logits [B, t], gradients) of some tokens, float32.

  `gradients(scale, z_loss)` are those of scale * sum(lse - target + z_loss * lse^2) to the
  logits [B, t, V] and to x.
  """
  logits, exp, _, total, lse, target = _softmax(x, embedding, y)

  def gradients(scale, z_loss):
    slope = (1.0 + 2.0 * z_loss * lse) / total
    hit = jax.lax.broadcasted_iota(y.dtype, logits.shape, 2) == y[..., None]
    d_logits = ((exp * slope - hit) * scale).astype(embedding.dtype)
    d_logits = jax.lax.optimization_barrier(d_logits)  # made once, used by both products
    return d_logits, jnp.einsum("btv,vd->btd", d_logits, embedding)

  return lse[..., 0], target, gradients


def _part_with_teacher(teacher: _Teacher, x, embedding, y, teacher_x):
  """The same of the distilled loss, with KL(teacher || student) [B, t] before the gradients.

  `gradients` are those of scale * sum((1 - weight) * (lse - target) + z_loss * lse^2
  + weight * temperature^2 * KL).
  """
  weight, temperature = teacher.weight, teacher.temperature
  logits, exp, top, total, lse, target = _softmax(x, embedding, y)
  theirs = jnp.einsum("bte,ve->btv", teacher_x, teacher.head, preferred_element_type=jnp.float32)
  # Of logits / temperature, as exp and total are of logits.
  soft = (logits - top) / temperature
  soft_exp = exp if temperature == 1 else jnp.exp(soft)
  soft_total = total if temperature == 1 else jnp.sum(soft_exp, -1, keepdims=True)
  their_soft = (theirs - jnp.max(theirs, -1, keepdims=True)) / temperature
  their_exp = jnp.exp(their_soft)
  their_total = jnp.sum(their_exp, -1, keepdims=True)
  divergence = jnp.sum(their_exp * (their_soft - soft), -1, keepdims=True) / their_total
  divergence += jnp.log(soft_total) - jnp.log(their_total)

  def gradients(scale, z_loss):
    slope = (1.0 - weight + 2.0 * z_loss * lse) / total
    hit = jax.lax.broadcasted_iota(y.dtype, logits.shape, 2) == y[..., None]
    d_logits = exp * slope - (1.0 - weight) * hit
    # temperature^2 times the softmax's own 1 / temperature
    d_logits += weight * temperature * (soft_exp / soft_total - their_exp / their_total)
    d_logits = jax.lax.optimization_barrier((d_logits * scale).astype(embedding.dtype))
    return d_logits, jnp.einsum("btv,vd->btd", d_logits, embedding)

  return lse[..., 0], target, divergence[..., 0], gradients


def _part_by_kernels(tiles, x, embedding, y):
  """As `_part`."""
  x_RxD, y_R = x.reshape(-1, x.shape[-1]), y.reshape(-1)
  lse, target, logits = loss_kernel.logits_sums(x_RxD, embedding, y_R, tiles)

  def gradients(scale, z_loss):
    d_logits, d_x = loss_kernel.gradients(x_RxD, embedding, y_R, lse, logits, scale, z_loss, tiles)
    return d_logits.reshape(*y.shape, -1), d_x.reshape(x.shape)

  return lse.reshape(y.shape), target.reshape(y.shape), gradients


def _scan(body, init, xs):
  """`lax.scan`, inlined when there is a single step."""
  if xs[0].shape[0] > 1:
    return jax.lax.scan(body, init, xs)
  carry, y = body(init, jax.tree.map(lambda a: a[0], xs))
  return carry, None if y is None else y[None]


def _cross_entropy_fwd(hidden, embedding, targets, chunks, z_loss, tiles):
  return _forward(hidden, embedding, targets, chunks, z_loss, tiles, with_grad=True)


def _cross_entropy_bwd(chunks, z_loss, tiles, grads, cotangent):
  return (*_scaled(grads, cotangent), None)


def _distillation_fwd(
  hidden, head, targets, teacher_hidden, teacher_head, weight, temperature, chunks, z_loss
):
  teacher = _Teacher(teacher_hidden, teacher_head, weight, temperature)
  return _forward(hidden, head, targets, chunks, z_loss, None, True, teacher)


def _distillation_bwd(weight, temperature, chunks, z_loss, grads, cotangent):
  return (*_scaled(grads, cotangent), None, None, None)


def _scaled(grads, cotangent):
  """The gradients made in the forward pass, times the objective's cotangent."""
  d_hidden, d_embedding = grads
  objective_bar = cotangent[0]  # what is only reported carries no gradient
  return (
    (d_hidden * objective_bar).astype(d_hidden.dtype),
    (d_embedding * objective_bar).astype(d_embedding.dtype),
  )


chunked_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
chunked_distillation.defvjp(_distillation_fwd, _distillation_bwd)


# Losses of an image from float32 logits [B, C] and targets [B, C] that need not be one-hot:
# float32 [B], nats. The sigmoid's is a sum over classes (Beyer et al. 2020, Section 3).
CLASSIFICATION = {
  "softmax": optax.softmax_cross_entropy,
  "sigmoid": lambda logits, targets: jnp.sum(
    optax.sigmoid_binary_cross_entropy(logits, targets), -1
  ),
}
