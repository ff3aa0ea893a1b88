"""Attention, nested FFN, block and stack: what every MatFormer is made of.

Shape letters: B batch, T tokens, S attended tokens, D d_model, A head groups,
N heads of keys and values per group, R query heads of each, H head width,
G FFN groups, K neurons per group, L layers, V vocabulary.

A granularity is applied once, by slicing the stored stacks (slicing.py); the modules here
then see weights of exactly the submodel's widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution, ModelConfig, Span
from matformer_jax.models import ops, slicing
from matformer_jax.models.attention import cached_attention, self_attention, write_cache

Params = Any

_POLICIES = jax.checkpoint_policies
REMAT: dict[str, Callable | None] = {
  "full": _POLICIES.nothing_saveable,
  "dots_no_batch": _POLICIES.dots_with_no_batch_dims_saveable,
  "attn_out": _POLICIES.save_only_these_names("attn_out"),
  "attn_out_ffn_pre": _POLICIES.save_only_these_names("attn_out", "ffn_pre"),
  "products": _POLICIES.save_only_these_names("qkv", "attention", "attn_out", "ffn_pre"),
}


class Norm(nn.Module):
  """RMSNorm or LayerNorm, by kind of model: over D, in float32."""

  config: ModelConfig
  execution: Execution

  @nn.compact
  def __call__(self, x):
    eps, fuse = self.config.norm_eps, not self.execution.flat_weights
    scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:])
    if not self.config.layer_norm:
      return ops.rms_norm(x, scale_D, eps, fuse)
    bias_D = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return ops.layer_norm(x, scale_D, bias_D, eps, fuse)


class NestedFFN(nn.Module):
  """T_i(x) = act(x W_in[:m_i]^T) W_out[:m_i] (Eq. 1), optionally gated, with biases.

  Weights are neuron-major, [G, K, D], with K = m_i / G. `width` is m_i, static.
  """

  config: ModelConfig
  execution: Execution
  width: int

  @nn.compact
  def __call__(self, x_BxTxD, seeds_B=None):
    cfg, exe = self.config, self.execution
    shape = (cfg.ffn_groups, self.width // cfg.ffn_groups, cfg.d_model)
    init_in = ops.projection_init(cfg, cfg.d_model, cfg.ffn_widths[-1])
    init_out = ops.projection_init(cfg, cfg.ffn_widths[-1], cfg.d_model, residual=True)
    w_in = _weight(self, "ffn", "in", init_in, shape)
    w_out = _weight(self, "ffn", "out", init_out, shape)
    act = ops.ACTIVATION[cfg.activation]
    pre_BxTxGxK = _add_bias(self, "ffn", "in", ops.project_in(x_BxTxD, w_in, exe))
    pre_BxTxGxK = _named("ffn_pre", pre_BxTxGxK, exe)
    if not exe.flat_weights:  # else XLA's TPU backend computes it again inside the next product
      pre_BxTxGxK = jax.lax.optimization_barrier(pre_BxTxGxK)
    if cfg.gated:
      w_gate = _weight(self, "ffn", "gate", init_in, shape)
      gate_BxTxGxK = _add_bias(self, "ffn", "gate", ops.project_in(x_BxTxD, w_gate, exe))
      hidden_BxTxGxK = act(gate_BxTxGxK) * pre_BxTxGxK
    else:
      hidden_BxTxGxK = act(pre_BxTxGxK)
    if seeds_B is not None and cfg.dropout:
      hidden_BxTxGxK = ops.drop(hidden_BxTxGxK, cfg.dropout, seeds_B)
    return _add_bias(self, "ffn", "out", ops.project_out(hidden_BxTxGxK, w_out, exe))


class Attention(nn.Module):
  """Attention over the first `heads` heads; causal and rotary by kind of model.

  Weights are head-major: qkv [R + 2, A, N, H, D] and out [A, N, R * H, D]. N counts heads of keys
  and values; each has R query heads, the first R of `qkv`, beside it. So a slice of the heads
  takes whole groups of queries. R is 1 in multi-head attention.
  """

  config: ModelConfig
  execution: Execution
  heads: int

  @nn.compact
  def __call__(self, x_BxTxD, cache=None, start=None, layer=None, origin_BxT=None, heads_B=None):
    """Runs T tokens, alone or after those in a cache.

    Args:
      cache: {"k", "v"} to extend, see models/cache.py; None when training.
      start: [B] first position of the tokens, up to which the cache is filled; None:
        they are positions 0 to T-1.
      layer: which layer of a stacked cache this is.
      origin_BxT: int32 [B, T] or, with `start`, [B, 1]: the position at which the document
        of each token begins. Attention stays within a document, and rotary positions count
        from there. None: at 0.
      heads_B: int32, how many of the heads each row uses; None: all.

    Returns:
      ([B, T, D], cache).
    """
    cfg, exe = self.config, self.execution
    ratio = cfg.queries_per_kv
    heads = (cfg.head_groups, self.heads // ratio // cfg.head_groups)
    width = cfg.num_heads * cfg.head_dim
    init_in = ops.projection_init(cfg, cfg.d_model, width)
    init_out = ops.projection_init(cfg, width, cfg.d_model, residual=True)
    shape = (ratio + 2, *heads, cfg.head_dim, cfg.d_model)
    w_qkv = _weight(self, "attention", "qkv", init_in, shape)
    w_out = _weight(self, "attention", "out", init_out, (*heads, ratio * cfg.head_dim, cfg.d_model))
    b_qkv = _bias(self, "attention", "qkv", shape[:-1])
    if exe.flat_weights:
      q, k, v = self._split_one_product(x_BxTxD, w_qkv, b_qkv)
    else:
      q, k, v = self._project_each(x_BxTxD, w_qkv, b_qkv, one_group=cache is None)
    if cfg.qk_norm:
      q, k = self._normalise("q_norm", q), self._normalise("k_norm", k)
    if cfg.rope_base:
      rope = ops.apply_rope if exe.flat_weights else ops.apply_rope_by_product
      sin_cos = _rope_at(cfg, q.shape[3], start, cache, origin_BxT)
      q, k = rope(q, *sin_cos), rope(k, *sin_cos)
    q = q * jnp.asarray(cfg.head_dim**-0.5, q.dtype)
    q, k, v = (_named("qkv", x, exe) for x in (q, k, v))
    if cache is not None:
      # The barrier keeps XLA from copying the cache to attend to it.
      cache = jax.lax.optimization_barrier(
        {name: write_cache(cache[name], new, start, layer) for name, new in (("k", k), ("v", v))}
      )
    if start is None:
      out_BxAxNxTxH = self_attention(q, k, v, cfg.causal, exe, origin_BxT)
    else:
      mine = cache if layer is None else jax.tree.map(lambda leaf: leaf[layer], cache)
      k, v = (mine[name][:, :, : heads[1]] for name in ("k", "v"))
      out_BxAxNxTxH = cached_attention(q, k, v, start, origin_BxT)
    if heads_B is not None:
      mine = jnp.arange(out_BxAxNxTxH.shape[2]) < heads_B[:, None] // cfg.head_groups
      out_BxAxNxTxH = jnp.where(mine[:, None, :, None, None], out_BxAxNxTxH, 0)
    w_out = w_out.reshape(out_BxAxNxTxH.shape[1:3] + (cfg.head_dim, cfg.d_model))
    out = ops.project_out(out_BxAxNxTxH.transpose(0, 3, 1, 2, 4), w_out, exe)
    return _add_bias(self, "attention", "out", out), cache

  def _split_one_product(self, x_BxTxD, w_qkv, b_qkv):
    """q [B, A, N * R, T, H], k, v [B, A, N, T, H]: on CPU one product is faster than three."""
    qkv_BxTxPxAxNxH = ops.project_in(x_BxTxD, w_qkv, self.execution)
    if b_qkv is not None:
      qkv_BxTxPxAxNxH += b_qkv
    # Split, not indexed: the transpose concatenates instead of padding three times. The
    # barriers keep XLA's CPU backend from fusing the transposition with its neighbours.
    sizes = (self.config.queries_per_kv, 1, 1)
    qkv = jax.lax.optimization_barrier(jax.lax.split(qkv_BxTxPxAxNxH, sizes, axis=2))
    return jax.lax.optimization_barrier(tuple(map(_heads_first, qkv)))

  def _project_each(self, x_BxTxD, w_qkv, b_qkv, one_group: bool):
    """The same, each written as attention reads it, so that nothing is transposed.

    With `one_group` of all heads, [B, 1, A * N, T, H]: two axes of heads cost XLA copies. A cache
    has them apart.
    """
    ratio = self.config.queries_per_kv

    def split(stored):
      """Of q, k and v, each [A, heads, ...]."""
      q = jnp.moveaxis(stored[:ratio], 0, 2)
      q = q.reshape(stored.shape[1:2] + (-1,) + stored.shape[3:])
      merged = lambda w: w.reshape((1, -1) + w.shape[2:]) if one_group else w
      return [merged(w) for w in (q, stored[ratio], stored[ratio + 1])]

    heads = [ops.project_heads(x_BxTxD, w) for w in split(w_qkv)]
    if b_qkv is None:
      return heads
    return [x + bias[:, :, None] for x, bias in zip(heads, split(b_qkv))]

  def _normalise(self, name: str, x) -> jax.Array:
    """Each head of x [..., H] for itself."""
    cfg = self.config
    scale_H = self.param(name, nn.initializers.ones, (cfg.head_dim,))
    return ops.rms_norm(x, scale_H, cfg.norm_eps, not self.execution.flat_weights)


def _heads_first(x_BxTxPxAxNxH):
  """[B, A, N * P, T, H]."""
  if x_BxTxPxAxNxH.shape[2] == 1:
    return jnp.squeeze(x_BxTxPxAxNxH, 2).transpose(0, 2, 3, 1, 4)
  x = x_BxTxPxAxNxH.transpose(0, 3, 4, 2, 1, 5)
  return x.reshape(x.shape[:2] + (-1,) + x.shape[4:])


class Block(nn.Module):
  """Pre-norm Transformer block of the widths of `span`."""

  config: ModelConfig
  execution: Execution
  span: Span

  @nn.compact
  def __call__(self, x_BxTxD, cache=None, start=None, layer=None, seeds_B=None, origin_BxT=None):
    """Runs one layer.

    Args:
      cache, start, origin_BxT: as in Attention.
      layer: index of this layer, in a stacked cache or for stochastic depth.
      seeds_B: uint32, one per row and of this layer only, when something is to be dropped.

    Returns:
      ([B, T, D], cache).
    """
    x_BxTxD, cache = self.attend(x_BxTxD, cache, start, layer, seeds_B, origin_BxT)
    x_BxTxD = self.feed_forward(x_BxTxD, layer, seeds_B)
    return sharding.constrain(x_BxTxD, ("batch", "length", "d"), self.execution), cache

  # The halves, apart for programs that need one without the other.

  def attend(self, x_BxTxD, cache, start, layer, seeds_B, origin_BxT, heads_B=None):
    """x plus attention of its norm: ([B, T, D], cache)."""
    cfg = self.config
    attention = Attention(cfg, self.execution, cfg.head_counts[self.span.heads], name="attention")
    y_BxTxD = Norm(cfg, self.execution, name="attention_norm")(x_BxTxD)
    y, cache = attention(y_BxTxD, cache, start, layer, origin_BxT, heads_B)
    return x_BxTxD + self._dropped(_named("attn_out", y, self.execution), layer, seeds_B, 0), cache

  def feed_forward(self, x_BxTxD, layer, seeds_B):
    """x plus the FFN of its norm: [B, T, D]."""
    cfg = self.config
    ffn = NestedFFN(cfg, self.execution, cfg.ffn_widths[self.span.ffn], name="ffn")
    hidden_seeds = None if seeds_B is None else ops.fold_seeds(seeds_B, 2)
    y = ffn(Norm(cfg, self.execution, name="ffn_norm")(x_BxTxD), hidden_seeds)
    return x_BxTxD + self._dropped(y, layer, seeds_B, 1)

  def _dropped(self, y, layer, seeds_B, sublayer: int):
    """Dropout and stochastic depth of what a sub-layer adds."""
    cfg = self.config
    if seeds_B is None:
      return y
    element_seeds, row_seeds = (ops.fold_seeds(seeds_B, 3 + 2 * sublayer + i) for i in range(2))
    if cfg.dropout:
      y = ops.drop(y, cfg.dropout, element_seeds)
    if cfg.stochastic_depth:
      rate = cfg.stochastic_depth * layer / max(cfg.num_layers - 1, 1)
      y = ops.drop(y, rate, row_seeds, whole_rows=True)
    return y


class Stack(nn.Module):
  """L blocks, stored as one `[l, ...]` stack per span of the config."""

  config: ModelConfig
  execution: Execution

  @nn.compact
  def __call__(self, x_BxTxD, granularity: gran.Granularity, seeds_B=None, origin_BxT=None):
    cfg, exe = self.config, self.execution
    stored = {str(i): self.param(str(i), self._init_span, span) for i, span in enumerate(cfg.spans)}
    if self.is_initializing():  # tracing every layer would add nothing
      return x_BxTxD
    first = 0
    for part, params in slicing.slice_blocks(stored, cfg, granularity):
      block = Block(cfg, exe, part.span, parent=None)
      x_BxTxD = run_layers(block, params, x_BxTxD, first, seeds_B, origin_BxT)
      first += part.span.num_layers
    return x_BxTxD

  def _init_span(self, rng, span: Span) -> Params:
    # Created outside any mesh: the values must not depend on how they are sharded.
    block = Block(self.config, Execution(), span, parent=None)
    example = jnp.zeros((1, 1, self.config.d_model))
    init = lambda key: block.init(key, example)["params"]
    params = jax.vmap(init)(jax.random.split(rng, span.num_layers))

    def stored(path, leaf):
      axes = sharding.logical_axes(sharding.path_names(path))
      shape = sharding.stored_shape(leaf.shape, axes, self.execution)
      return leaf[tuple(map(slice, shape))]

    return jax.tree_util.tree_map_with_path(stored, params)


def run_layers(
  block: Block, params: Params, x: jax.Array, first: int = 0, seeds_B=None, origin_BxT=None
) -> jax.Array:
  """Applies a stack of equal blocks: scanned, or unrolled over per-layer arrays.

  Args:
    first: index of the first of them in the model.
    seeds_B: uint32, one per row of x, when something is to be dropped.
    origin_BxT: as in Attention.
  """
  exe = block.execution

  def layer(x, layer_params, index):
    if seeds_B is None:
      return block.apply({"params": layer_params}, x, origin_BxT=origin_BxT)[0]
    seeds = ops.fold_seeds(seeds_B, index)
    return block.apply(
      {"params": layer_params}, x, layer=index, seeds_B=seeds, origin_BxT=origin_BxT
    )[0]

  if exe.remat != "none":
    layer = jax.checkpoint(layer, policy=REMAT[exe.remat], prevent_cse=not exe.scan_layers)
  indices = jnp.arange(first, first + block.span.num_layers)
  if exe.scan_layers:
    return jax.lax.scan(lambda x, xs: (layer(x, *xs), None), x, (params, indices))[0]
  for layer_params, index in zip(unstack(params), indices):
    x = layer(x, layer_params, index)
  return x


def unstack(params: Params) -> list[Params]:
  """A stacked tree as L per-layer trees; the transpose is one concatenation per leaf."""
  leaves, treedef = jax.tree.flatten(params)
  length = leaves[0].shape[0]
  split = [jax.lax.split(leaf, (1,) * length) for leaf in leaves]
  return [treedef.unflatten([jnp.squeeze(s[i], 0) for s in split]) for i in range(length)]


def _rope_at(config: ModelConfig, length: int, start, cache, origin_BxT):
  """sin, cos of the positions of `length` tokens, alone or after those in a cache."""
  assert config.rope_base is not None
  longest = length if start is None else cache["k"].shape[-2]
  known = isinstance(longest, int)
  rows = longest if known else config.num_tokens  # a symbolic length is at most that
  table = ops.rope_table(rows, config.head_dim, config.rope_base, config.rope_scaling)
  if start is None and origin_BxT is None:
    return table if known else [jnp.asarray(t)[:longest] for t in table]
  positions = (0 if start is None else start[:, None]) + jnp.arange(length)
  if origin_BxT is not None:
    positions = positions - origin_BxT
  return [jnp.take(jnp.asarray(t), positions, axis=0)[:, None, None] for t in table]


def _weight(module, parent: str, name: str, init, shape) -> jax.Array:
  """Declares a layer's weight and gathers it for compute."""
  return _declare(module, name, shape, init, sharding.LOGICAL_AXES[f"{parent}/{name}"][1:])


def declare(module: nn.Module, name: str, shape: tuple[int, ...], init) -> jax.Array:
  """Declares a parameter, `name` as in sharding.LOGICAL_AXES, and gathers it for compute."""
  return _declare(module, name.split("/")[-1], shape, init, sharding.LOGICAL_AXES[name])


def _declare(module, name: str, shape, init, axes: tuple[str, ...]) -> jax.Array:
  stored = module.param(name, init, sharding.stored_shape(shape, axes, module.execution))
  return sharding.gather(stored, axes, module.execution)


def _named(name: str, x, execution: Execution) -> jax.Array:
  """x, by a name that remat policies know; only under remat, since on CPU a name costs time."""
  return x if execution.remat == "none" else checkpoint_name(x, name)


def _bias(module, parent: str, name: str, shape) -> jax.Array | None:
  """A layer's bias, where this model has one."""
  if not (module.config.qkv_bias if name == "qkv" else module.config.biases):
    return None
  axes = sharding.LOGICAL_AXES[f"{parent}/{name}_bias"][1:]
  bias = module.param(f"{name}_bias", nn.initializers.zeros, shape)
  return sharding.gather(bias, axes, module.execution)


def _add_bias(module, parent: str, name: str, x) -> jax.Array:
  """x plus a bias of its last axes, where this kind of model has biases."""
  axes = sharding.LOGICAL_AXES[f"{parent}/{name}_bias"][1:]
  bias = _bias(module, parent, name, x.shape[x.ndim - len(axes) :])
  return x if bias is None else x + bias
