"""A Llama whose layers have heads and FFN widths of their own: a MatFormer mix at its true size.

AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
"""

import copy

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.arcee.modeling_arcee import ArceeMLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention


class MatFormerConfig(LlamaConfig):
  """LlamaConfig, and what each layer has.

  Its own `intermediate_size`, `num_attention_heads` and `num_key_value_heads` are the largest.

  Args:
    intermediate_sizes: FFN neurons of each layer.
    attention_heads: query heads of each layer.
    key_value_heads: heads of keys and values of each layer.
    gated: the FFN has a gate, as Llama's; else it is Arcee's.
    qk_norm: queries and keys are normalised, as Qwen 3's.
  """

  model_type = "matformer"
  intermediate_sizes: list | None = None
  attention_heads: list | None = None
  key_value_heads: list | None = None
  gated: bool = True
  qk_norm: bool = False

  def validate_architecture(self):
    """Any number of heads will do, since `head_dim` is given."""

  def of_layer(self, i: int) -> "MatFormerConfig":
    """The config that the modules of layer i are made of."""
    own = copy.copy(self)
    own.intermediate_size = self.intermediate_sizes[i]
    own.num_attention_heads = self.attention_heads[i]
    own.num_key_value_heads = self.key_value_heads[i]
    return own


class MatFormerForCausalLM(LlamaForCausalLM):
  config_class = MatFormerConfig

  def __init__(self, config: MatFormerConfig):
    super().__init__(config)
    attention = Qwen3Attention if config.qk_norm else LlamaAttention
    mlp = LlamaMLP if config.gated else ArceeMLP
    for i, layer in enumerate(self.model.layers):
      own = config.of_layer(i)
      layer.self_attn, layer.mlp = attention(own, i), mlp(own)
    self.post_init()
