"""Scoring in lm-eval: our model beside the harness's own `hf`, on the same weights and requests.

  python benchmarks/downstream.py                      # a small random Llama
  python benchmarks/downstream.py --hf=SmolLM2.gguf    # a directory or GGUF file that both can read

Needs the extras eval, import and peers. Multiple choice (a passage of Python's manual, four
sentences that may follow it) and rolling likelihoods of whole pages, in float32 on the same CPUs.
Both models answer in turn, `--rounds` times after one to warm up; a rate counts the tokens of the
requests, so it rises where tokens are not run twice. Ratios are medians over rounds. The last line
is one JSON object.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import pydoc_data.topics
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
import numpy as np

from matformer_jax import runtime, tables
from matformer_jax.loading import LanguageModel, load

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_HF = flags.DEFINE_string(
  "hf", None, "A Llama as transformers reads it; default a small random one."
)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "Tokens of context.")
_QUESTIONS = flags.DEFINE_integer("questions", 64, "Of four choices each.")
_CHARACTERS = flags.DEFINE_integer("characters", 1000, "Of the longest passage.")
_PAGES = flags.DEFINE_integer("pages", 12, "Whose rolling likelihoods are taken.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each model.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Of `hf`.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 0, "Of ours; 0 is its own choice.")

TOPICS = [pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)]


def write_small(directory: pathlib.Path) -> pathlib.Path:
  """A random Llama of 8 layers, d_model 256, vocabulary 8,192."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers
  import torch
  import transformers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=8192, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
  )
  tokenizer.train_from_iterator(TOPICS, trainer)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=tokenizer.get_vocab_size(),
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    max_position_embeddings=_SEQ_LEN.value,
    bos_token_id=None,
    eos_token_id=0,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(directory)
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<end>"
  ).save_pretrained(directory)
  return directory


def open_both(path: pathlib.Path, scratch: pathlib.Path) -> tuple[Any, Any]:
  """(lm-eval's model, ours) of the same weights."""
  from lm_eval.models.huggingface import HFLM
  import torch
  import transformers

  from matformer_jax.harness.model import MatFormerLM

  where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
  if path.is_file():
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
  subprocess.run(
    [
      *(sys.executable, "-m", "matformer_jax.import_model", f"--from={path}"),
      *(f"--out={scratch / 'ours'}", f"--seq_len={_SEQ_LEN.value}", "--order=none"),
    ],
    check=True,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  theirs = HFLM(
    pretrained=transformers.AutoModelForCausalLM.from_pretrained(
      **where, dtype=torch.float32
    ).eval(),
    tokenizer=transformers.AutoTokenizer.from_pretrained(**where),
    batch_size=_BATCH_SIZE.value,
    max_length=_SEQ_LEN.value,
  )
  ours = MatFormerLM(
    model=load(scratch / "ours", kind=LanguageModel),
    batch_tokens=_BATCH_TOKENS.value,
    data=1,
    prefix_token_id=theirs.prefix_token_id,
    quiet=True,
  )
  theirs.tok_encode = lambda text, add_special_tokens=None, **kwargs: ours.tok_encode(text)
  return theirs, ours


def make_requests(kind: str, arguments: list[tuple]) -> list:
  from lm_eval.api.instance import Instance

  return [
    Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("", i, 1))
    for i, args in enumerate(arguments)
  ]


def questions() -> list:
  """(passage, sentence) four times for each passage."""
  rng = random.Random(0)
  sentences = [text.split(". ") for text in TOPICS if text.count(". ") > 8]
  found = []
  for _ in range(_QUESTIONS.value):
    topic = rng.choice(sentences)
    at = rng.randrange(4, len(topic))
    length = rng.randrange(_CHARACTERS.value // 4, _CHARACTERS.value)
    passage = (". ".join(topic[:at]) + ".")[-length:].strip()
    others = [rng.choice(rng.choice(sentences)) for _ in range(3)]
    found += [(passage, " " + end.strip()[:120]) for end in (topic[at], *others)]
  return make_requests("loglikelihood", found)


def answer(model, kind: str, requests: list) -> np.ndarray:
  if kind == "rolling":
    return np.array(model.loglikelihood_rolling(requests, disable_tqdm=True))
  return np.array([log_p for log_p, _ in model.loglikelihood(requests, disable_tqdm=True)])


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  runtime.enable_compilation_cache()
  runtime.keep_freed_memory()
  with tempfile.TemporaryDirectory() as scratch:
    directory = pathlib.Path(scratch)
    path = pathlib.Path(_HF.value) if _HF.value else write_small(directory / "small")
    theirs, ours = open_both(path, directory)
    pages = [text[:8000] for text in sorted(TOPICS, key=len)[-3 * _PAGES.value :: 3]]
    work = {
      "multiple choice": questions(),
      "rolling": make_requests("loglikelihood_rolling", [(page,) for page in pages]),
    }
    rows, record = [], {}
    for kind, requests in work.items():
      tokens = sum(len(ours.tok_encode("".join(r.args))) for r in requests)
      started = time.perf_counter()
      have = answer(ours, kind, requests)
      first = time.perf_counter() - started
      worst = float(np.abs(have - answer(theirs, kind, requests)).max())
      times: dict[str, list[float]] = {"hf": [], "ours": [], "ours, nothing shared": []}
      for _ in range(_ROUNDS.value):
        for name, spent in times.items():
          ours.scorer.share = name == "ours"
          if not spent and name == "ours, nothing shared":
            answer(ours, kind, requests)  # compiles
          started = time.perf_counter()
          answer(theirs if name == "hf" else ours, kind, requests)
          spent.append(time.perf_counter() - started)
      ours.scorer.share = True
      ratio = {
        name: statistics.median(a / b for a, b in zip(times["hf"], spent))
        for name, spent in times.items()
      }
      for name, spent in times.items():
        rate = tokens / statistics.median(spent)
        rows.append([kind, name, f"{rate:,.0f}", f"{ratio[name]:.2f}x"])
        record[f"{kind}, {name}"] = {"tokens_per_s": rate, "ratio": ratio[name]}
      record[kind] = {"tokens": tokens, "first_call_s": first, "largest_difference": worst}
      print(
        f"{kind}: {len(requests)} requests, {tokens:,} tokens; differ by {worst:.1e} at most",
        flush=True,
      )
  print(tables.table(["requests", "model", "tokens/s", "of hf"], rows))
  record["programs"] = len(ours.scorer.programs)
  print(f"{record['programs']} programs compiled")
  print(json.dumps(record))


if __name__ == "__main__":
  app.run(main)
