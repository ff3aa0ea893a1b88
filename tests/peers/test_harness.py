"""Our models in lm-eval beside its own model `hf`, on the same weights."""

import json
import pathlib
import pydoc_data.topics
import random

import helpers
import lm_eval.api.instance
import lm_eval.models.huggingface
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from matformer_jax.harness.model import MatFormerLM
from matformer_jax.loading import load

TOPICS = [pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)]
QUESTIONS, CHOICES = 60, 4
ONE_DEVICE = dict(data=1, quiet=True)


def requests(kind: str, arguments) -> list:
  make = lm_eval.api.instance.Instance
  return [
    make(request_type=kind, doc={}, arguments=args, idx=0, metadata=("", i, 1))
    for i, args in enumerate(arguments)
  ]


def choices(seed: int, context: int, continuation: int) -> list:
  """Questions made of the manual: a passage, what follows it, and what follows others.

  Args:
    context, continuation: the most characters of each.
  """
  rng = random.Random(seed)
  sentences = [t.split(". ") for t in TOPICS if t.count(". ") > 6]
  found = []
  for _ in range(QUESTIONS):
    topic = rng.choice(sentences)
    at = rng.randrange(1, len(topic))
    passage = (". ".join(topic[:at]) + ".")[-rng.randrange(20, context) :]
    others = [rng.choice(rng.choice(sentences)) for _ in range(CHOICES - 2)]
    ends = [topic[at], *others, rng.choice(("yes", "no"))]
    found += [(passage, " " + end.strip()[: rng.randrange(4, continuation)]) for end in ends]
  return requests("loglikelihood", found)


def compare(theirs, ours, scored, texts, at_most: float) -> None:
  want = theirs.loglikelihood(scored, disable_tqdm=True)
  have = ours.loglikelihood(scored)
  errors = np.abs(np.array([w[0] for w in want]) - [h[0] for h in have])
  print(f"{len(scored)} choices: {errors.max():.1e} at most, {errors.mean():.1e} on average")
  assert errors.max() < at_most
  assert [w[1] for w in want] == [h[1] for h in have]
  rolling = requests("loglikelihood_rolling", [(text,) for text in texts])
  have, single = (np.array(m.loglikelihood_rolling(rolling, True)) for m in (ours, theirs))
  theirs.model.double()  # torch's float32 log-softmax is 2e-5 too high at every token of SmolLM2
  want = np.array(theirs.loglikelihood_rolling(rolling, True))
  torch.nn.Module.float(theirs.model)  # a model read from GGUF refuses its own `float`
  errors, theirs_errors = np.abs(want - have), np.abs(want - single)
  print(
    f"{len(texts)} texts of {-want.mean():.0f} nats, against float64: {errors.max():.1e} at most; "
    f"hf in float32: {theirs_errors.max():.1e}"
  )
  assert errors.max() < at_most and min(-want) > 100
  asked = requests(
    "generate_until",
    [(r.args[0], {"until": ["\n", "."], "max_gen_toks": 8}) for r in scored[:: 20 * CHOICES]],
  )
  new = ours.generate_until(asked)
  assert theirs.generate_until(asked, disable_tqdm=True) == new
  # What was generated consists of the likeliest tokens, and both must say so.
  own = requests("loglikelihood", [(r.args[0], text) for r, text in zip(asked, new) if text])
  greedy = [answer[1] for answer in ours.loglikelihood(own)]
  assert any(greedy)
  assert [answer[1] for answer in theirs.loglikelihood(own, disable_tqdm=True)] == greedy


@pytest.fixture(scope="module")
def small(dense_llama, tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
  """A random Llama and what it was imported as."""
  out = tmp_path_factory.mktemp("small") / "ours"
  args = f"--from={dense_llama}", f"--out={out}", "--order=none"
  result = helpers.run_program("import_model", *args)
  assert result.returncode == 0, result.stderr
  return dense_llama, out


def twin(directory: pathlib.Path) -> transformers.PreTrainedModel:
  config = json.loads((directory / "config.json").read_text())
  config.pop("architectures")
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, pad_token_id=0))
  weights = {}
  for file in sorted(directory.glob("*.safetensors")):
    weights |= safetensors.torch.load_file(file)
  model.load_state_dict(weights)
  return model.eval()


def test_scores_are_hfs(small):
  """Of 240 choices, of which some are one token and some too long, and of texts in windows."""
  theirs, ours = small
  hf = lm_eval.models.huggingface.HFLM(
    pretrained=twin(theirs),
    tokenizer=transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(theirs / "tokenizer.json"), eos_token="<|endoftext|>"
    ),
    batch_size=16,
  )
  model = MatFormerLM(model=load(ours), **ONE_DEVICE)
  assert (hf.max_length, hf.prefix_token_id) == (model.max_length, model.prefix_token_id)
  compare(hf, model, choices(0, 160, 40), TOPICS[:20], 1e-3)
  assert len(model.scorer.programs) <= 24, model.scorer.programs


@pytest.mark.slow
def test_scores_of_smollm2_are_hfs(smollm2_file, tmp_path):
  out = tmp_path / "ours"
  args = f"--from={smollm2_file}", f"--out={out}", "--order=none", "--seq_len=256"
  result = helpers.run_program("import_model", *args)
  assert result.returncode == 0, result.stderr
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    smollm2_file.parent, gguf_file=smollm2_file.name
  )
  hf = lm_eval.models.huggingface.HFLM(
    pretrained=theirs, tokenizer=tokenizer, batch_size=8, max_length=256
  )
  model = MatFormerLM(model=load(out), prefix_token_id=hf.prefix_token_id, **ONE_DEVICE)
  # transformers rebuilds another pre-tokenizer from GGUF: both take the same ids.
  hf.tok_encode = lambda text, add_special_tokens=None, **kwargs: model.tok_encode(text)
  compare(hf, model, choices(1, 300, 100), [t[:3000] for t in TOPICS[:2]], 1e-3)
