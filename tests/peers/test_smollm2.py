"""A real public model, SmolLM2-135M-Instruct as its GGUF file has it, against other runtimes."""

import copy
import pydoc_data.topics

from helpers import AWKWARD
import jax
import llama_cpp
import numpy as np
import pytest
import torch
import transformers

from matformer_jax.config import Execution
from matformer_jax.formats import families, sources
from matformer_jax.models import matlm

TEXT = "\n\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="module")
def theirs(smollm2_file):
  return transformers.AutoModelForCausalLM.from_pretrained(
    smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
  ).eval()


@pytest.fixture(scope="module")
def ids(smollm2_file) -> np.ndarray:
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    smollm2_file.parent, gguf_file=smollm2_file.name
  )
  return np.array(tokenizer(TEXT[:20_000]).input_ids, np.int32)


@pytest.fixture(scope="module")
def ours(smollm2_file):
  source = sources.open_source(smollm2_file)
  config = families.model_config(source)
  return config, families.read_params(source, config)


def test_logits_equal_transformers(theirs, ours, ids):
  """Of both in float64; in float32 each is about 1e-4 away from that, as logits reach 41."""
  config, params = ours
  tokens = ids[: 2 * 128].reshape(2, 128)
  with torch.no_grad():
    in_float32 = theirs(torch.tensor(tokens)).logits.numpy()
    want = copy.deepcopy(theirs).double()(torch.tensor(tokens)).logits.numpy()

  def logits(dtype):
    model = matlm.MatLM(config, Execution(scan_layers=True, dtype=dtype))
    cast = jax.tree.map(lambda x: np.asarray(x, dtype), params)
    return np.asarray(model.apply({"params": cast}, tokens))

  with jax.enable_x64(True):
    exact = logits("float64")
  errors = [np.abs(x - want) for x in (exact, logits("float32"), in_float32)]
  for name, error in zip(("ours", "ours in float32", "transformers in float32"), errors):
    print(f"{name}: {error.max():.2e} at most, {error.mean():.2e} on average")
  assert errors[0].max() < 1e-4 and np.abs(exact - in_float32).max() < 1e-4
  assert errors[1].max() < 2e-4 and errors[1].mean() < 2e-5 and np.abs(want).max() > 40


def test_the_likeliest_token_is_llama_cpps(smollm2_file, ours, ids):
  """Over 2,000 tokens; llama.cpp multiplies the quantised weights by quantised activations."""
  config, params = ours
  window = 500
  runtime = llama_cpp.Llama(
    str(smollm2_file), n_ctx=window, n_batch=window, n_threads=2, logits_all=True, verbose=False
  )
  model, agree = matlm.MatLM(config, Execution(scan_layers=True)), []
  logits = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
  for tokens in ids[: 4 * window].reshape(4, window):
    runtime.reset()
    runtime.eval(tokens.tolist())
    have = np.asarray(logits(params, tokens[None]))[0]
    agree.append(have.argmax(-1) == runtime.scores[:window].argmax(-1))
  print(f"top-1 agreement {np.mean(agree):.2%}")
  assert np.mean(agree) >= 0.95


def test_its_tokenizer_is_llama_cpps(smollm2_file):
  """Special tokens stay plain text. (transformers rebuilds another pre-tokenizer from GGUF.)"""
  ours = sources.open_source(smollm2_file).tokenizer()
  theirs = llama_cpp.Llama(str(smollm2_file), vocab_only=True, verbose=False)
  for text in (TEXT, *AWKWARD):
    ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
    assert ours.encode(text) == ids, text[:80]
    assert ours.decode(ids) == text
