"""MatFormer in JAX: train one universal model, slice out every smaller one.

config = matformer_jax.get_config("matlm:tiny")
model = matformer_jax.load("runs/quickstart")
logits = model.logits(model.tokenizer.encode("def main("), granularity="M*2+L*2")
model.loss("for i in range(10):\\n", granularity="S")
model.generate("def main(", granularity="XL", draft="S")
"""

from matformer_jax.config import Execution, MatLMConfig, MatViTConfig, ModelConfig, model_config
from matformer_jax.config_files import get_config
from matformer_jax.errors import UserError
from matformer_jax.granularity import (
  Granularity,
  count,
  mix_n_match,
  mix_n_match_ladder,
  parse,
  to_text,
)
from matformer_jax.loading import LanguageModel, Model, VisionModel, load

__version__ = "0.1.0"

__all__ = [
  "Execution",
  "Granularity",
  "LanguageModel",
  "MatLMConfig",
  "MatViTConfig",
  "Model",
  "ModelConfig",
  "UserError",
  "VisionModel",
  "__version__",
  "count",
  "get_config",
  "load",
  "mix_n_match",
  "mix_n_match_ladder",
  "model_config",
  "parse",
  "to_text",
]
