"""Flax modules. `layers` is shared by every model; `matlm` is the decoder, `matvit` the encoder."""

import jax

from matformer_jax.config import MatViTConfig, ModelConfig
from matformer_jax.models import matlm, matvit


def init_params(config: ModelConfig, rng: jax.Array):
  """The universal parameter tree of any kind of model, float32."""
  kind = matvit if isinstance(config, MatViTConfig) else matlm
  return kind.init_params(config, rng)


def adapt_params(params, fresh, config: ModelConfig, new: ModelConfig, keep_head: bool):
  """Trained parameters of `config` for further training as `new`; see matvit.adapt_params."""
  if isinstance(config, MatViTConfig):
    return matvit.adapt_params(params, fresh, config, new, keep_head)
  return params
