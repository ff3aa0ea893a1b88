"""MatFormer in JAX: train one universal model, slice out every smaller one.

  model = matformer_jax.load("runs/quickstart")
  logits = model.logits(model.tokenizer.encode("def main("), granularity="M*2+L*2")
  model.loss("for i in range(10):\\n", granularity="S")
  model.generate("def main(", granularity="XL", draft="S")
"""

from matformer_jax.config import Execution, ModelConfig
from matformer_jax.errors import UserError
from matformer_jax.granularity import (Granularity, count, mix_n_match, mix_n_match_ladder, parse,
                                       to_text)
from matformer_jax.loading import Model, load

__all__ = ["Execution", "Granularity", "Model", "ModelConfig", "UserError", "count", "load",
           "mix_n_match", "mix_n_match_ladder", "parse", "to_text"]
