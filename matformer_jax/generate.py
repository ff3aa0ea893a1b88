"""Continues a text with any size of a trained model, plainly or speculatively.

  python -m matformer_jax.generate --workdir=runs/quickstart --prompt='def main(' \\
      --granularity=XL --draft=S --temperature=0 --max_tokens=200

The continuation streams to standard output, and nothing else does; speed and
acceptance rate go to standard error.
"""

from __future__ import annotations

import sys
import time

from absl import flags

from matformer_jax import cli, runtime
from matformer_jax.decoding.decode import Sampling
from matformer_jax.errors import UserError
from matformer_jax.loading import LanguageModel, Settings, load


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  settings = Settings(
    _GRANULARITY.value,
    _MAX_TOKENS.value,
    Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value),
    _SEED.value,
    _DRAFT.value,
    _draft_lengths(_DRAFT_LENGTH.value),
    _SHARE_CACHE.value,
  )
  runtime.enable_compilation_cache()
  model = load(workdir, _STEP.value, LanguageModel)
  prompt = model.tokenizer.prompt(_PROMPT.value)
  shown, text, ids, stats = "", "", [], None
  first_at, first_count = 0.0, 0
  for (ids,), stats in model.stream([prompt], settings):
    if not first_count:
      first_at, first_count = time.perf_counter(), len(ids)
    text = model.tokenizer.continuation(prompt, ids)
    whole = text.rstrip("\ufffd")  # a character may be cut in the middle of its bytes
    sys.stdout.write(whole[len(shown) :])
    sys.stdout.flush()
    shown = whole
  sys.stdout.write(text[len(shown) :] + ("\n" if sys.stdout.isatty() else ""))
  sys.stdout.flush()
  seconds = time.perf_counter() - first_at
  report = f"{len(ids)} tokens"
  if len(ids) > first_count:
    report += f", {(len(ids) - first_count) / seconds:,.0f} tokens/s after the first"
  if stats is not None:
    report += (
      f", {100 * stats.acceptance():.0f}% of drafted tokens accepted, "
      f"{stats.tokens_per_round():.2f} tokens per verifier pass"
    )
  print(report, file=sys.stderr)


def _draft_lengths(text: str) -> tuple[int, ...] | None:
  if text == "auto":
    return None
  if not text.isdecimal() or int(text) < 1:
    raise UserError(f"--draft_length={text!r} must be auto or a number of tokens, 1 or more")
  return (int(text),)


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained or extracted model.")
  _STEP = cli.define_step()
  _PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty starts a new document.")
  _GRANULARITY = flags.DEFINE_string(
    "granularity", None, "Size that decodes: S, 'M*2+L*2', XL; default everything stored."
  )
  _MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most tokens to add.")
  _TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
  _TOP_K = flags.DEFINE_integer("top_k", 0, "Keep only the k most likely tokens; 0 keeps all.")
  _TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the most likely tokens up to this probability.")
  _SEED = cli.define_seed("The same seed gives the same text.")
  _DRAFT = flags.DEFINE_string(
    "draft",
    None,
    "A smaller size that drafts (speculative decoding): "
    "faster where it is, the same text at temperature 0.",
  )
  _DRAFT_LENGTH = flags.DEFINE_string(
    "draft_length",
    "auto",
    "Tokens per draft; auto chooses by measured acceptance and time, and "
    "stops drafting where it does not pay.",
  )
  _SHARE_CACHE = flags.DEFINE_bool("share_cache", True, "Draft on the verifier's attention cache.")
  cli.run(main)
