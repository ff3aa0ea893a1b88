"""Which neurons and heads of a dense model matter: in what order a universal model nests them.

A granularity takes the first neurons of every layer, and of a model that was trained without
nesting any order of them is the same model. So they are sorted: the first m neurons become the
best m (as in Flextron and Minitron, Muralidharan et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.models import layers, matlm, ops

Params = Any


class _Attend(layers.Block):
  """A block's attention half."""

  @nn.compact
  def __call__(self, x_BxTxD):
    return self.attend(x_BxTxD, None, None, None, None, None)[0]


def measure(
  params: Params, config: MatLMConfig, execution: Execution, batches: Iterable
) -> dict[str, np.ndarray]:
  """Importance on calibration text: the mean square of what each part adds to the residual.

  Args:
    params: of a model of one width, `config.spans` being one.
    batches: int32 tokens [B, T].

  Returns:
    {"neurons": [L, G, K], "heads": [L, A, N], of groups of queries with their key and value}.
  """
  total: Any = None
  count = 0
  for tokens in batches:
    sums = jax.device_get(_sums(params, tokens, config, execution))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    count += tokens.size
  return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sums(params, tokens, config: MatLMConfig, execution: Execution):
  (span,) = config.spans
  attend = _Attend(config, execution, span, parent=None)

  def heads(x, layer):
    """Sum of squares of what each group of heads adds; attention is a sum over them."""
    out = layer["attention"]["out"]

    def alone(place):
      one = jnp.zeros(out.shape[:2], out.dtype).at[place].set(1)[..., None, None]
      added = attend.apply({"params": _with(layer, "attention", out=out * one)}, x) - x
      return jnp.sum(jnp.square(added))

    places = jnp.stack(jnp.unravel_index(jnp.arange(out.shape[0] * out.shape[1]), out.shape[:2]))
    return jax.lax.map(lambda place: alone(tuple(place)), places.T).reshape(out.shape[:2])

  def step(x, layer):
    # Only where they are nested: it takes an attention for each of them.
    head_sums = heads(x, layer) if config.nested_heads else jnp.zeros(())
    attended: Any = attend.apply({"params": layer}, x)
    y = ops.rms_norm(attended, layer["ffn_norm"]["scale"], config.norm_eps)
    ffn = layer["ffn"]
    act = ops.ACTIVATION[config.activation]
    project = lambda weight: jnp.einsum("btd,gkd->btgk", y, weight)
    hidden = project(ffn["in"])
    hidden = act(project(ffn["gate"])) * hidden if config.gated else act(hidden)
    squares = jnp.sum(jnp.square(hidden), (0, 1)) * jnp.sum(jnp.square(ffn["out"]), -1)
    return attended + jnp.einsum("btgk,gkd->btd", hidden, ffn["out"]), (squares, head_sums)

  x = matlm.embed(params["embedding"], tokens, config)
  _, (neurons, head_sums) = jax.lax.scan(step, x, params["blocks"]["0"])
  return {"neurons": neurons} | ({"heads": head_sums} if config.nested_heads else {})


def _with(layer: Params, module: str, **leaves) -> Params:
  return {**layer, module: {**layer[module], **leaves}}


def sort(params: Params, scores: dict[str, np.ndarray]) -> Params:
  """The same model with the most important neurons, and heads where measured, first.

  Args:
    params: NumPy arrays; blocks are changed in place.
    scores: as from `measure`.
  """
  blocks = params["blocks"]["0"]
  for leaf in blocks["ffn"].values():
    _permute(leaf, 1, scores["neurons"])
  if "heads" in scores:
    for name, leaf in blocks["attention"].items():
      if name in ("qkv", "qkv_bias", "out"):
        _permute(leaf, 2 if name != "out" else 1, scores["heads"])
  return params


def _permute(leaf: np.ndarray, axis: int, scores: np.ndarray) -> None:
  """Sorts the axes (group, place) that begin at `axis` of [L, ...], best first over all groups."""
  for stack, score in zip(leaf, scores):
    in_order = lambda x, a=axis - 1: np.moveaxis(x, (a, a + 1), (1, 0))  # [place, group, ...]
    best = np.argsort(-score.T.reshape(-1), kind="stable")
    view = in_order(stack)
    view[...] = view.reshape(-1, *view.shape[2:])[best].reshape(view.shape)
