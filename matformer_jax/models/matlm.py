"""MatLM: the decoder-only MatFormer language model (Section 4.1)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.models import layers, ops


class MatLM(nn.Module):
  """Pre-norm decoder with rotary positions.

  Parameter tree (float32; axes in sharding.LOGICAL_AXES):
    embedding, (head)                [V, D]; the head is the embedding unless it has its own
    blocks/<run>/attention/qkv, out  [L, R + 2, A, N, H, D], [L, A, N, R * H, D]
    blocks/<run>/attention/(qkv_bias, q_norm, k_norm)   [L, R + 2, A, N, H], [L, H], [L, H]
    blocks/<run>/ffn/in, (gate), out [L, G, K, D]
    blocks/<run>/attention_norm, ffn_norm, final_norm   scale [L, D], [D]
  """

  config: MatLMConfig
  execution: Execution = Execution()

  @nn.compact
  def __call__(
    self,
    tokens_BxT,
    *,
    granularity: gran.Granularity | None = None,
    return_hidden: bool = False,
    segments_BxT=None,
  ):
    """Runs the submodel `granularity` (default: everything stored).

    Args:
      tokens_BxT: int32 token ids in [0, V).
      granularity: static; every value compiles its own program.
      return_hidden: return what the chunked loss needs instead of logits.
      segments_BxT: int32, the number of the document that each token belongs to; a document
        is a run of one number. Attention stays within a document, and positions restart at
        its first token: it is run as if it were alone. None: a row is one document.

    Returns:
      float32 logits [B, T, V], or (hidden [B, T, D], output head [V, D]) in the
      compute dtype.
    """
    cfg, exe = self.config, self.execution
    granularity = granularity or gran.full(cfg)
    origin_BxT = None if segments_BxT is None else ops.document_origins(segments_BxT)
    embedding_VxD = layers.declare(
      self, "embedding", (cfg.vocab_size, cfg.d_model), ops.scaled_normal(cfg.d_model)
    )
    head_VxD = embedding_VxD
    if not cfg.tied_head:
      head_VxD = layers.declare(self, "head", head_VxD.shape, ops.scaled_normal(cfg.d_model))
    x_BxTxD = embed(embedding_VxD, tokens_BxT, cfg)
    x_BxTxD = sharding.constrain(x_BxTxD, ("batch", "length", "d"), exe)
    x_BxTxD = layers.Stack(cfg, exe, name="blocks")(x_BxTxD, granularity, origin_BxT=origin_BxT)
    x_BxTxD = layers.Norm(cfg, exe, name="final_norm")(x_BxTxD)
    if return_hidden:
      return x_BxTxD, head_VxD
    return jnp.einsum("btd,vd->btv", x_BxTxD, head_VxD, preferred_element_type=jnp.float32)


def embed(embedding_VxD, tokens, config: MatLMConfig) -> jax.Array:
  """Input vectors [..., D] of token ids [...]: rows of the embedding, scaled."""
  scale = jnp.asarray(config.embedding_scale or config.d_model**0.5, embedding_VxD.dtype)
  return jnp.take(embedding_VxD, tokens, axis=0) * scale


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: MatLMConfig, rng: jax.Array):
  """The universal parameter tree, float32. Independent of mesh and platform."""
  model = MatLM(config)
  return model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"]


def adapt_params(params, fresh, config: MatLMConfig, new: MatLMConfig, keep_head: bool):
  """See models.adapt_params; a new vocabulary has a new embedding and head."""
  return params if keep_head else params | ends(fresh)


def ends(params):
  """What the vocabulary gives its length: the embedding, and a head of its own."""
  return {name: params[name] for name in ("embedding", "head") if name in params}


def output_head(params) -> jax.Array:
  """[V, D], by which the last hidden state is multiplied."""
  return params["head"] if "head" in params else params["embedding"]
