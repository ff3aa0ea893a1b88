"""Makes a universal model of a dense one: a public checkpoint becomes elastic.

  python -m matformer_jax.import_model --from=models/SmolLM2-135M --out=models/elastic \\
      --calibration='text:books/*.txt'
  python -m matformer_jax.import_model --from=model.Q4_1.gguf --out=models/elastic --order=none

Reads a Hugging Face directory (safetensors) or a GGUF file of a Llama, Mistral, Qwen 2 or 3,
Gemma or Arcee model; nothing is downloaded or unpickled. At full width what comes out computes
what the source does. Its smaller sizes take the first FFN neurons, which --order=importance makes
the most important ones; they are good once they have been trained (configs/elastify.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
import json
import os
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from matformer_jax import cli, runtime, storage
from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint, model_dir
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.config_files import get_config
from matformer_jax.config_keys import ModelKeys
from matformer_jax.data import text_sources
from matformer_jax.data.tokenizer import Tokenizer
from matformer_jax.errors import UserError
from matformer_jax.evals import importance, sizes
from matformer_jax.formats import families, sources

ORDERS = ("importance", "none")
CALIBRATION_WINDOW = 512  # tokens that attend to each other, at most
CALIBRATION_BYTES = 16  # of text read per token that is measured, about four times what it takes


def import_model(
  source: sources.Source,
  out: storage.Path,
  config: MatLMConfig,
  calibration: str | None = None,
  tokens: int = 65_536,
) -> None:
  """Writes a model directory: config, tokenizer, weights, checksums.

  Args:
    source: a dense model.
    out: a directory that does not exist yet, or is empty.
    config: the universal model, from `families.model_config`.
    calibration: text by which neurons, and nested heads, are sorted, e.g. `text:GLOB`; None
      leaves them as they are.
    tokens: of it, at most.

  Raises:
    UserError: for a source that does not hold what its config says, or too little text.
  """
  model_dir.check_free(out)
  tokenizer = source.tokenizer()
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
      f"--from={source.path}: its tokenizer has {tokenizer.vocab_size:,} tokens and its embedding "
      f"{config.vocab_size:,} rows"
    )
  length = min(CALIBRATION_WINDOW, config.seq_len)
  windows = _windows(calibration, tokenizer, length, tokens) if calibration else []
  params = families.read_params(source, config)
  if windows:
    bar = tqdm.tqdm(windows, desc="measuring importance", unit="window", mininterval=1.0)
    device = jax.devices()[0]
    execution = Execution.for_platform(
      device.platform, dtype="float32", device_kind=device.device_kind
    )
    params = importance.sort(params, importance.measure(params, config, execution, bar))
    runtime.say(f"sorted by importance on {len(windows) * length:,} tokens of {calibration}")
  card = _card(source, config, tokenizer, calibration)
  model_dir.write(out, card, jax.tree.map(jnp.asarray, params), 0, tokenizer.save)


def _windows(calibration: str, tokenizer: Tokenizer, length: int, tokens: int) -> list[np.ndarray]:
  """int32 [1, T] windows, evenly spread over what training on that text would train on."""
  corpus = text_sources.open_corpus(calibration, key="--calibration").without_held_out(
    get_config("elastify").data.validation_fraction
  )
  ids: list[int] = []
  for text in corpus.spread(CALIBRATION_BYTES * tokens):
    ids += [*tokenizer.begin(text), tokenizer.eos_id]
  found = len(ids) // length
  if not found:
    raise UserError(
      f"--calibration={calibration} has {len(ids):,} tokens, fewer than one window of {length}; "
      "give more text"
    )
  chosen = np.linspace(0, found - 1, min(found, max(1, tokens // length))).round().astype(int)
  return [np.array(ids[i * length : (i + 1) * length], np.int32)[None] for i in chosen]


def _card(
  source: sources.Source, config: MatLMConfig, tokenizer: Tokenizer, calibration: str | None
) -> dict[str, Any]:
  training = get_config("elastify")
  training.model = ModelKeys(config.to_dict())
  kind, colon, path = (calibration or training.data.source).partition(":")
  if kind == "text" and not storage.is_bucket(path):
    path = os.path.abspath(os.path.expanduser(path))
  training.data.source = f"{kind}{colon}{path}"  # from wherever the model is measured
  return {
    "format": checkpoint.FORMAT,
    "task": "matlm",
    "model": config.to_dict(),
    "identity": {"tokenizer": tokenizer.sha256},
    "config": json.loads(training.to_json_best_effort()),
    "imported": {
      "from": str(storage.absolute(source.path)),
      "architecture": families.architecture(source),
      "calibration": calibration,
    },
    **cards.versions(),
  }


# --------------------------------------------------------------------- program


def _widths(full: int) -> tuple[int, ...]:
  """Of the granularities, from the flags."""
  if _WIDTHS.value:
    widths = [Fraction(text) for text in _numbers(_WIDTHS)]
  else:
    widths = [ratio * full for ratio in _numbers(_RATIOS)]
  for width in widths:
    if width.denominator != 1:
      given = "--ffn_widths holds" if _WIDTHS.value else f"--ratios of {full} neurons give"
      raise UserError(f"{given} {float(width):g}; --ffn_widths takes whole numbers of neurons")
  return tuple(map(int, widths))


def _numbers(flag: flags.FlagHolder[list[str]]) -> Sequence[Fraction]:
  try:
    return [Fraction(text.strip()) for text in flag.value]
  except (ValueError, ZeroDivisionError) as e:
    raise UserError(
      f"--{flag.name}={','.join(flag.value)} are not numbers, e.g. 1/4,1/2,3/4,1"
    ) from e


def main(argv) -> None:
  cli.check(argv)
  path = cli.required(_FROM, sources.WHAT_TO_GIVE)
  out = checkpoint.check_place(cli.required(_OUT))
  if (_CALIBRATION.value or "").startswith("tokens:"):
    raise UserError(
      f"--calibration={_CALIBRATION.value}: text is needed, for the source's own tokenizer; give "
      "text:GLOB, stdlib or tfds:NAME:FEATURE"
    )
  if _ORDER.value == "importance" and not _CALIBRATION.value:
    raise UserError(
      "--order=importance needs --calibration=text:GLOB, text like what the model is for; "
      "--order=none leaves neurons as they are"
    )
  started = time.perf_counter()
  source = sources.open_source(path)
  changes: dict[str, Any] = dict(ffn_groups=_FFN_GROUPS.value, head_groups=_HEAD_GROUPS.value)
  if _HEAD_RATIOS.value:
    ratios = tuple(float(ratio) for ratio in _numbers(_HEAD_RATIOS))
    changes |= dict(nested_heads=True, head_ratios=ratios)
  dense = families.model_config(source)
  if _SEQ_LEN.value:
    changes["seq_len"] = _SEQ_LEN.value
    if _SEQ_LEN.value > dense.seq_len:
      runtime.warn(f"--seq_len={_SEQ_LEN.value} is longer than the source's, {dense.seq_len}")
  config = families.model_config(source, _widths(dense.ffn_widths[-1]), **changes)
  calibration = _CALIBRATION.value if _ORDER.value == "importance" else None
  import_model(source, out, config, calibration, _TOKENS.value)
  print(sizes.table(config))
  seconds = time.perf_counter() - started
  runtime.say(f"\nwrote {families.architecture(source)} to {out} in {seconds:.1f} s")


if __name__ == "__main__":
  _FROM = flags.DEFINE_string("from", None, "Hugging Face directory, or .gguf file.")
  _OUT = flags.DEFINE_string("out", None, "New directory for the model.")
  _RATIOS = flags.DEFINE_list(
    "ratios", ["1/4", "1/2", "3/4", "1"], "FFN widths as shares of the source's."
  )
  _WIDTHS = flags.DEFINE_list("ffn_widths", [], "FFN widths in neurons, instead of --ratios.")
  _HEAD_RATIOS = flags.DEFINE_list(
    "head_ratios", [], "Nests attention too: shares of the key/value heads, with their queries."
  )
  _ORDER = flags.DEFINE_enum(
    "order", "importance", ORDERS, "importance: the most important neurons first."
  )
  _CALIBRATION = flags.DEFINE_string(
    "calibration", None, "Text on which importance is measured: text:GLOB, stdlib or tfds:..."
  )
  _TOKENS = flags.DEFINE_integer("calibration_tokens", 65_536, "Of it, at most.", lower_bound=1)
  _SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Context; default the source's.", lower_bound=1)
  _FFN_GROUPS = flags.DEFINE_integer(
    "ffn_groups", 1, "Multiple of the tensor-parallel devices to train on.", lower_bound=1
  )
  _HEAD_GROUPS = flags.DEFINE_integer("head_groups", 1, "The same for heads.", lower_bound=1)
  cli.run(main)
