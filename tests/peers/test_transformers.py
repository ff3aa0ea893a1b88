"""Imported models against `transformers`: logits of every size and of mixes, and greedy text."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from matformer_jax import granularity as gran
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.decoding.decode import Decoder
from matformer_jax.formats import families, sources
from matformer_jax.models import matlm

SHAPE = dict(
  vocab_size=96,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  bos_token_id=0,
  eos_token_id=1,
)
LLAMA_3 = dict(
  rope_type="llama3",
  rope_theta=10_000.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
MODELS = {
  "Llama": ("Llama", dict(head_dim=6)),
  "Llama, tied": ("Llama", dict(tie_word_embeddings=True)),
  "Llama 3": ("Llama", dict(rope_parameters=LLAMA_3)),
  "Mistral": ("Mistral", dict(sliding_window=None)),
  "Qwen 2": ("Qwen2", {}),
  "Qwen 3": ("Qwen3", dict(head_dim=10)),
  "Gemma": ("Gemma", dict(head_dim=16, num_key_value_heads=1)),
  "Arcee": ("Arcee", {}),
  "Arcee, gelu": ("Arcee", dict(hidden_act="gelu_pytorch_tanh")),
}
WIDTHS = (12, 24, 36, 48)
TOKENS = np.random.default_rng(0).integers(2, 96, (2, 40))


@dataclasses.dataclass
class Pair:
  """A model of theirs, and what it was imported as."""

  theirs: transformers.PreTrainedModel
  config: MatLMConfig
  params: dict


def make(name: str, directory, **changes) -> Pair:
  kind, extra = MODELS[name]
  torch.manual_seed(0)
  config = getattr(transformers, f"{kind}Config")(**SHAPE | extra)
  model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
  with torch.no_grad():  # scales and biases are all the same at first
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(directory)
  source = sources.open_source(directory)
  ours = families.model_config(source, WIDTHS, **changes)
  return Pair(model, ours, families.read_params(source, ours))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  return {name: make(name, tmp_path_factory.mktemp("model")) for name in MODELS}


def narrow(model, widths):
  """Their own model with fewer neurons in each layer: rows and columns of their matrices."""
  for layer, width in zip(model.model.layers, widths):
    for name in ("gate_proj", "up_proj", "down_proj"):
      linear = getattr(layer.mlp, name, None)
      if linear is not None:
        cut = linear.weight[:, :width] if name == "down_proj" else linear.weight[:width]
        linear.weight = torch.nn.Parameter(cut.clone())
  return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("granularity", ["S", "M", "L", "XL", "S*1+XL*2+M*1"])
def test_logits(pairs, name, granularity):
  pair = pairs[name]
  g = gran.parse(granularity, pair.config)
  widths = [WIDTHS[i] for i in g.ffn]
  with torch.no_grad():
    want = narrow(copy.deepcopy(pair.theirs), widths)(torch.tensor(TOKENS)).logits.numpy()
  for execution in (Execution(), Execution(flat_weights=False, scan_layers=True)):
    model = matlm.MatLM(pair.config, execution)
    have = model.apply({"params": pair.params}, TOKENS, granularity=g)
    np.testing.assert_allclose(have, want, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("name", ["Llama", "Qwen 3", "Arcee"])
def test_logits_in_groups(tmp_path, name):
  """Neurons and heads laid out for tensor parallelism; a slice is still their first ones."""
  pair = make(name, tmp_path, ffn_groups=2, head_groups=2)
  g = gran.parse("M", pair.config)
  with torch.no_grad():
    want = narrow(pair.theirs, [24] * 4)(torch.tensor(TOKENS)).logits.numpy()
  have = matlm.MatLM(pair.config, Execution()).apply({"params": pair.params}, TOKENS, granularity=g)
  np.testing.assert_allclose(have, want, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text(pairs, name):
  """Five prompts of several lengths, 40 tokens each."""
  pair = pairs[name]
  prompts = [TOKENS[i % 2, :n].tolist() for i, n in enumerate((1, 3, 8, 13, 21))]
  decoder = Decoder(pair.config, Execution(), gran.full(pair.config))
  weights = decoder.lay_out(jax.tree.map(jax.numpy.asarray, pair.params))
  state = decoder.prefill(weights, prompts, 40, range(5))
  have = decoder.advance(weights, state, 40).sequences()
  for prompt, sequence in zip(prompts, have):
    want = pair.theirs.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
      max_new_tokens=40,
      do_sample=False,
      eos_token_id=-1,
      pad_token_id=0,
    )
    assert sequence == want[0].tolist()
