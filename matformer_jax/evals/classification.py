"""Top-1 accuracy, and consistency with the largest granularity (Sections 3.4, 4.2.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution, MatViTConfig
from matformer_jax.evals import Result, measure, with_stderr
from matformer_jax.models import losses
from matformer_jax.models.matvit import MatViT

METRICS = ("loss", "accuracy", "agreement", "kl")


def evaluate(
  config: MatViTConfig,
  execution: Execution,
  params,
  granularities: Sequence[gran.Granularity],
  batches: Iterable[dict[str, jax.Array]],
  loss: str = "softmax",
  consistency: bool = True,
  should_stop: Callable[[], bool] = lambda: False,
  progress: Callable[[int], None] = lambda n: None,
) -> list[Result] | None:
  """Measures granularities on the same images.

  Args:
    params: universal parameters.
    granularities: what to measure.
    batches: {"image": [B, S, S, channels], "labels": int32 [B, R]}: up to R classes that are
      right for an image (ImageNet ReaL, Beyer et al. 2020, has several), -1 where there are
      fewer. Images without any are not measured.
    loss: `softmax` or `sigmoid`, as in training.
    consistency: also compare with the full model: its answer, and KL between softmax outputs.
    should_stop: polled after every program call.
    progress: called with the number of batches done.

  Returns:
    One Result per granularity, or None if `should_stop` said so.
  """
  full = gran.full(config)
  rows = measure(
    granularities,
    batches,
    lambda b: logits(params, b["image"], config, execution, full) if consistency else None,
    lambda batch, reference, g: _measure(params, batch, reference, config, execution, g, loss),
    should_stop,
    progress,
  )
  if rows is None:
    return None
  results = []
  for g, (_, nll, right, agree, kl) in zip(granularities, np.moveaxis(rows, 2, 1)):
    metrics = with_stderr("loss", nll) | with_stderr("accuracy", right)
    if consistency:
      images = max(len(nll), 1)
      metrics |= {"agreement": float(agree.sum() / images), "kl": float(kl.sum() / images)}
    results.append(Result(gran.to_text(g, config), len(nll), metrics))
  return results


@functools.partial(jax.jit, static_argnums=(2, 3, 4), static_argnames=("features",))
def logits(params, images, config, execution, granularity, features: bool = False) -> jax.Array:
  """float32 [B, C], or the representation [B, F] that the head is given."""
  model: Any = MatViT(config, execution)
  return model.apply({"params": params}, images, granularity=granularity, return_features=features)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _measure(params, batch, reference, config, execution, granularity, loss):
  """[B, 5]: whether the image has a label, loss, whether right, agreement, KL."""
  logits_BxC = logits(params, batch["image"], config, execution, granularity)
  labels_BxR = batch["labels"]
  valid_B = jnp.any(labels_BxR >= 0, 1)
  targets_BxC = jnp.max(jax.nn.one_hot(labels_BxR, config.num_classes), 1)  # -1 is no class
  if loss == "softmax":
    targets_BxC /= jnp.maximum(jnp.sum(targets_BxC, 1, keepdims=True), 1)
  answer_B = jnp.argmax(logits_BxC, 1)
  right_B = jnp.any(labels_BxR == answer_B[:, None], 1)
  agree_B = kl_B = jnp.zeros(valid_B.shape)
  if reference is not None:
    agree_B = answer_B == jnp.argmax(reference, 1)
    want, have = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits_BxC)
    kl_B = jnp.sum(jnp.exp(want) * (want - have), 1)
  loss_B = losses.CLASSIFICATION[loss](logits_BxC, targets_BxC)
  rows = jnp.stack([valid_B, loss_B, right_B, agree_B, kl_B], 1).astype(jnp.float32)
  return sharding.replicate(rows, execution)
