"""Flax modules, and what a kind of model does with its parameters.

slicing.py has the one idea; ops, attention and layers are shared by every kind of model;
matlm.py is the decoder, matvit.py the encoder.
"""

import jax

from matformer_jax.config import ModelConfig, kind_of


def init_params(config: ModelConfig, rng: jax.Array):
  """The universal parameter tree of any kind of model, float32."""
  return kind_of(config).resolve("module").init_params(config, rng)


def adapt_params(params, fresh, config: ModelConfig, new: ModelConfig, keep_head: bool):
  """Trained parameters of `config` for further training as `new`.

  Args:
    params: of a model `config`.
    fresh: initial parameters of the model `new`.
    keep_head: use the trained output head; otherwise the fresh one.

  Raises:
    UserError: for parameters that are to be kept and do not fit.
  """
  return kind_of(config).resolve("module").adapt_params(params, fresh, config, new, keep_head)
