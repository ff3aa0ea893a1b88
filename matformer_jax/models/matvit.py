"""MatViT: the Vision Transformer encoder of MatFormer blocks (Section 4.2).

Blocks, nested FFN and attention are MatLM's own (models/layers.py); here is what turns
an image into tokens, and tokens into classes. Shape letters beside those of layers.py:
P patches of an image, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Callable
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution, MatViTConfig
from matformer_jax.errors import UserError
from matformer_jax.models import layers, ops


class Linear(nn.Module):
  """y = x kernel^T + bias, kernel [O, I].

  Attributes:
    kernel_init: of the kernel.
    bias: what the bias starts at.
  """

  execution: Execution
  size: int
  kernel_init: Callable
  bias: float = 0.0

  @nn.compact
  def __call__(self, x):
    """[B, T, I] -> [B, T, O]; or [B, I] -> float32 [B, O]."""
    kernel_OxI = layers.declare(
      self, f"{self.name}/kernel", (self.size, x.shape[-1]), self.kernel_init
    )
    bias_O = layers.declare(
      self, f"{self.name}/bias", (self.size,), nn.initializers.constant(self.bias)
    )
    if x.ndim == 3:
      return ops.project_in(x, kernel_OxI, self.execution) + bias_O
    return jnp.einsum("bi,oi->bo", x, kernel_OxI, preferred_element_type=jnp.float32) + bias_O


class MatViT(nn.Module):
  """Pre-norm encoder with learned positions (Dosovitskiy et al. 2021).

  Parameter tree (float32; axes in sharding.LOGICAL_AXES), beside the blocks:
    patches/kernel, bias             [D, patch pixels], [D]
    cls, positions                   [D] (pooling="cls"), [T, D]
    final_norm/scale, bias           [D]
    representation/kernel, bias      [F, D], [F] (representation_size > 0)
    head/kernel, bias                [C, F], [C]
  """

  config: MatViTConfig
  execution: Execution = Execution()

  @nn.compact
  def __call__(
    self,
    images,
    *,
    granularity: gran.Granularity | None = None,
    return_features: bool = False,
    seeds_B=None,
  ):
    """Runs the submodel `granularity` (default: everything stored).

    Args:
      images: [B, image_size, image_size, channels]; uint8 is scaled to [-1, 1].
      granularity: static; every value compiles its own program.
      return_features: return what the head is given.
      seeds_B: uint32, one per image, for dropout and stochastic depth; None drops nothing.

    Returns:
      float32 logits [B, C], or features [B, F].
    """
    cfg, exe = self.config, self.execution
    granularity = granularity or gran.full(cfg)
    x_BxTxD = self._tokens(images)
    if seeds_B is not None and cfg.dropout:
      x_BxTxD = ops.drop(x_BxTxD, cfg.dropout, ops.fold_seeds(seeds_B, cfg.num_layers))
    x_BxTxD = sharding.constrain(x_BxTxD, ("batch", "length", "d"), exe)
    x_BxTxD = layers.Stack(cfg, exe, name="blocks")(x_BxTxD, granularity, seeds_B)
    x_BxTxD: jax.Array = layers.Norm(cfg, exe, name="final_norm")(x_BxTxD)
    x_BxF = x_BxTxD[:, 0] if cfg.pooling == "cls" else jnp.mean(x_BxTxD, 1)
    if cfg.representation_size:
      x_BxF = jnp.tanh(
        Linear(exe, cfg.representation_size, ops.scaled_normal(cfg.d_model), name="representation")(
          x_BxF
        )
      ).astype(exe.dtype)
    # The head starts at zero: no class is preferred but by the bias.
    logits_BxC = Linear(exe, cfg.num_classes, nn.initializers.zeros, cfg.head_bias, name="head")(
      x_BxF
    )
    return x_BxF.astype(jnp.float32) if return_features else logits_BxC

  def _tokens(self, images) -> jax.Array:
    """[B, T, D]: embedded patches, after [CLS] if there is one, at their positions."""
    cfg, exe = self.config, self.execution
    patches_BxPxK = patchify(scale(images), cfg.patch_size).astype(exe.dtype)
    x_BxTxD = Linear(
      exe, cfg.d_model, ops.glorot_uniform(cfg.patch_pixels, cfg.d_model), name="patches"
    )(patches_BxPxK)
    if cfg.pooling == "cls":
      cls_D = layers.declare(self, "cls", (cfg.d_model,), nn.initializers.zeros)
      cls = jnp.broadcast_to(cls_D, x_BxTxD.shape[:1] + (1,) + cls_D.shape)
      x_BxTxD = jnp.concatenate([cls, x_BxTxD], 1)
    return x_BxTxD + layers.declare(
      self, "positions", (cfg.num_tokens, cfg.d_model), nn.initializers.normal(0.02)
    )


def scale(images) -> jax.Array:
  """uint8 0..255 as float32 -1..1; floats as they are."""
  return images.astype(jnp.float32) / 127.5 - 1 if images.dtype == jnp.uint8 else images


def patchify(images_BxYxXxC, size: int) -> jax.Array:
  """[B, P, size * size * C]: square patches, row by row."""
  batch, height, width, channels = images_BxYxXxC.shape
  grid = images_BxYxXxC.reshape(batch, height // size, size, width // size, size, channels)
  return grid.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: MatViTConfig, rng: jax.Array):
  """The universal parameter tree, float32. Independent of mesh and platform."""
  shape = (1, config.image_size, config.image_size, config.channels)
  return MatViT(config).init(rng, jnp.zeros(shape))["params"]


def adapt_params(params, fresh, config: MatViTConfig, new: MatViTConfig, keep_head: bool):
  """Trained parameters for another resolution and other classes.

  Args:
    params: of a model `config`.
    fresh: initial parameters of the model `new`, whose blocks are equal.
    keep_head: use the trained head; otherwise the fresh one.

  Returns:
    Parameters for `new`: positions are resized bilinearly, a representation layer that
    differs in size starts fresh.

  Raises:
    UserError: for a head that is to be kept and does not fit.
  """
  if keep_head and (config.num_classes, config.features) != (new.num_classes, new.features):
    raise UserError(
      f"init_head=True, but the trained head has {config.num_classes} classes of "
      f"{config.features} features, and this model {new.num_classes} of "
      f"{new.features}; set --config.init_head=False"
    )
  kept = {"patches", "cls", "blocks", "final_norm"}
  if config.representation_size == new.representation_size:
    kept.add("representation")
  if keep_head:
    kept.add("head")
  adapted = {name: params[name] if name in kept else leaf for name, leaf in fresh.items()}
  return adapted | {"positions": resize_positions(params["positions"], config, new)}


def resize_positions(positions_TxD, config: MatViTConfig, new: MatViTConfig) -> jax.Array:
  """Learned positions for another grid of patches; that of [CLS] stays."""
  if config.grid == new.grid:
    return positions_TxD
  extra = config.num_tokens - config.grid**2
  grid = positions_TxD[extra:].reshape(config.grid, config.grid, -1)
  grid = jax.image.resize(grid, (new.grid, new.grid, grid.shape[-1]), "bilinear")
  return jnp.concatenate([positions_TxD[:extra], grid.reshape(new.grid**2, -1)])
