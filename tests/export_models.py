"""Random models of every kind that is exported, with a small tokenizer."""

import functools
import pathlib

from helpers import byte_level_library
import jax
import numpy as np

from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.data.tokenizer import HuggingFaceTokenizer, Tokenizer, train_tokenizer
from matformer_jax.loading import LanguageModel
from matformer_jax.models import matlm

TEXT = pathlib.Path(functools.__file__).read_text()
SHAPE = dict(
  vocab_size=512,
  num_layers=4,
  d_model=64,
  num_heads=8,
  num_kv_heads=4,
  seq_len=64,
  ffn_widths=(32, 64, 96, 128),
)
SILU = dict(gated=True, activation="silu")
# SmolLM2's shape, grouped queries and a tied head, is "llama, tied".
KINDS = {
  "llama": SILU,
  "llama, tied": SILU | dict(embedding_scale=1.0, head_dim=16),
  "llama 3, in groups": SILU
  | dict(tied_head=False, rope_scaling=(8.0, 1.0, 4.0, 32.0), ffn_groups=2, head_groups=2),
  "llama, nested heads": SILU | dict(nested_heads=True),
  "gemma": dict(gated=True, activation="gelu", num_kv_heads=1),
  "arcee": dict(activation="relu2"),
  "arcee, gelu": dict(activation="gelu"),
  "qwen2": SILU | dict(qkv_bias=True, embedding_scale=1.0),
  "qwen3": SILU | dict(qk_norm=True),
}
MIX = "M*2+L*2"


@functools.cache
def sentencepiece() -> Tokenizer:
  return train_tokenizer([TEXT], SHAPE["vocab_size"] - 12, "bpe", 100_000)


@functools.cache
def byte_level() -> Tokenizer:
  definition = byte_level_library([TEXT], SHAPE["vocab_size"] - 12).to_str().encode()
  return HuggingFaceTokenizer(definition, {"eos_token": "<|endoftext|>"})


def make(kind: str, tokenizer: Tokenizer | None = None, **changes) -> LanguageModel:
  """Larger weights than at initialisation, and scales that are not all 1."""
  config = MatLMConfig(**SHAPE | KINDS[kind] | changes)
  rng = np.random.default_rng(0)
  add_noise = lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32)
  params = jax.tree.map(add_noise, matlm.init_params(config, jax.random.key(0)))
  path = pathlib.Path("runs/random")
  return LanguageModel(params, config, 0, {}, path, Execution(), tokenizer or sentencepiece())


def tokens(count: int = 40) -> np.ndarray:
  return np.random.default_rng(1).integers(2, SHAPE["vocab_size"], (2, count), np.int32)


def logits(model: LanguageModel, ids: np.ndarray, granularity: str) -> np.ndarray:
  return np.asarray(model.logits(ids, granularity))


def is_greedy(model: LanguageModel, ids: list[int], start: int, granularity: str) -> bool:
  """Whether every token from `start` on is the most likely one after those before it."""
  best = logits(model, np.array([ids, ids], np.int32), granularity)[0].argmax(-1)
  return best[start - 1 : -1].tolist() == ids[start:]
