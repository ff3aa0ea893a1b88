"""What was written, loaded by who reads it, and its logits compared with ours.

Each function takes a `Reference` and returns a sentence that says what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import importlib
import inspect
import json
import pathlib
import pydoc
from typing import Any

import jax
import numpy as np

from matformer_jax.config import Execution, MatLMConfig, MatViTConfig
from matformer_jax.data.tokenizer import Tokenizer
from matformer_jax.errors import UserError, first_line
from matformer_jax.exporting import stablehlo
from matformer_jax.formats import families, gguf_export, sources
from matformer_jax.models import matlm, matvit

# How far float32 logits may be from ours, as a share of the largest one, or of 1; or how many
# times as far as ours are from each other, computed in two orders.
ROUNDINGS = 10
EXACT = 1e-5
LLAMA_CPP = 1e-4
LLAMA_CPP_GELU = 1e-3  # it looks gelu up in a table in half precision
LOOSE = 0.1  # of the logits' standard deviation, on average, where weights are rounded
TOKENS = 48  # of each of two sequences


@dataclasses.dataclass(frozen=True)
class Reference:
  """Our own logits.

  Attributes:
    inputs: int32 tokens [B, T], or uint8 images [B, S, S, channels].
    logits: float32 [B, T, V] or [B, C].
    rounding: how far logits computed in another order are from these, at most.
  """

  inputs: np.ndarray
  logits: np.ndarray
  rounding: float


def of_language(config: MatLMConfig, params: Any) -> Reference:
  """Logits of random tokens."""
  length = min(TOKENS, config.seq_len)
  shape = (2, length)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
  return _reference(lambda execution: matlm.MatLM(config, execution), params, tokens)


def of_vision(config: MatViTConfig, params: Any) -> Reference:
  """Logits of random images."""
  shape = (2, config.image_size, config.image_size, config.channels)
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  return _reference(lambda execution: matvit.MatViT(config, execution), params, images)


def _reference(make: Callable[[Execution], Any], params: Any, inputs: np.ndarray) -> Reference:
  one, other = (
    _apply(make(Execution(scan_layers=True, flat_weights=flat)), params, inputs)
    for flat in (True, False)
  )
  return Reference(inputs, one, float(np.abs(one - other).max()))


def _apply(model, params, inputs) -> np.ndarray:
  return np.asarray(jax.jit(model.apply)({"params": params}, inputs))


def agree(
  name: str, have: np.ndarray, reference: Reference, dtype: str = "f32", exact: float = EXACT
) -> str:
  """Says how far logits are from ours.

  Args:
    name: whose logits they are.
    dtype: of the weights; f32 is exact, the others round.
    exact: how far f32 logits may be from ours, as a share of the largest one, or of 1.

  Raises:
    UserError: where they are further apart than that.
  """
  want = reference.logits
  error = np.abs(have - want)
  # Where activations are large, float32 is not exact to begin with.
  bound = max(exact * max(1.0, float(np.abs(want).max())), ROUNDINGS * reference.rounding)
  top = float(np.mean(have.argmax(-1) == want.argmax(-1)))
  found = f"{name}: logits within {error.max():.1e} of ours, {top:.1%} of the likeliest the same"
  wrong = error.max() > bound if dtype == "f32" else error.mean() > LOOSE * want.std()
  if wrong or not np.isfinite(have).all():
    raise UserError(
      f"{found}, which is more than {dtype} explains ({bound:.1e} in f32): nothing was written; "
      "--nocheck writes it all the same"
    )
  return found


# ------------------------------------------------------------------ Hugging Face


def hf_language(
  out: pathlib.Path, reference: Reference, tokenizer: Tokenizer, dtype: str, remote_code: bool
) -> list[str]:
  """Loads a directory with `transformers`; without it, reads it back as `import_model` does."""
  found = _optional("transformers", "torch")
  if found is None:
    if remote_code:
      return ["logits were not checked: that needs transformers and torch"]
    source = sources.open_source(out)
    config = families.model_config(source)
    model = matlm.MatLM(config, Execution(scan_layers=True))
    have = _apply(model, families.read_params(source, config), reference.inputs)
    return [
      agree("read back", have, reference, dtype),
      "transformers and torch are not installed: it was not loaded with them",
    ]
  transformers, torch = found
  with _quiet(transformers):
    model = transformers.AutoModelForCausalLM.from_pretrained(
      out, dtype=torch.float32, trust_remote_code=remote_code
    ).eval()
    with torch.no_grad():
      have = model(torch.tensor(reference.inputs)).logits.numpy()
    theirs = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=remote_code)
  return [
    agree("transformers", have, reference, dtype),
    same_ids("transformers", lambda text: theirs(text).input_ids, tokenizer),
  ]


def hf_vision(out: pathlib.Path, reference: Reference, dtype: str) -> list[str]:
  """Loads a ViT with `transformers`."""
  found = _optional("transformers", "torch")
  if found is None:
    return ["logits were not checked: that needs transformers and torch"]
  transformers, torch = found
  with _quiet(transformers):
    model = transformers.AutoModelForImageClassification.from_pretrained(
      out, dtype=torch.float32
    ).eval()
    with torch.no_grad():
      images = torch.tensor(reference.inputs.transpose(0, 3, 1, 2)) / 127.5 - 1
      have = model(images).logits.numpy()
  return [agree("transformers", have, reference, dtype)]


@contextlib.contextmanager
def _quiet(transformers):
  """Without its own warnings and progress bars."""
  verbosity = transformers.logging.get_verbosity()
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  try:
    yield
  finally:
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


# ------------------------------------------------------------------------- GGUF


def gguf(
  file: pathlib.Path,
  reference: Reference,
  config: MatLMConfig,
  params: Any,
  tokenizer: Tokenizer,
  dtype: str,
) -> list[str]:
  """Loads a file with `llama-cpp-python`; without it, reads its arrays back."""
  found = _optional("llama_cpp")
  if found is None:
    written = gguf_export.gguf_arrays(config, params, gguf_export.target_of(config))
    gguf_export.check_arrays(file, written, dtype)
    return ["arrays read back; logits were not checked: that needs llama-cpp-python"]
  length = reference.inputs.shape[1]
  try:
    runtime = found[0].Llama(
      str(file),
      n_ctx=length,
      n_batch=length,
      logits_all=True,
      verbose=False,
      type_k=0,  # a cache in float32
      type_v=0,
    )
  except ValueError as e:
    raise UserError(f"llama.cpp does not load what was written ({first_line(e)})") from e
  exact = LLAMA_CPP_GELU if config.activation == "gelu" else LLAMA_CPP
  have = []
  for tokens in reference.inputs:
    runtime.reset()
    runtime.eval(tokens.tolist())
    have.append(np.array(runtime.scores[:length]))
  encode = lambda text: runtime.tokenize(text.encode(), add_bos=True, special=False)
  return [
    agree("llama.cpp", np.stack(have), reference, dtype, exact),
    same_ids("llama.cpp", encode, tokenizer),
  ]


# -------------------------------------------------------------------- StableHLO


def stablehlo_language(out: pathlib.Path, reference: Reference, dtype: str) -> list[str]:
  """Runs the functions of a directory: whole sequences, and a prompt continued token by token."""
  functions, weights = stablehlo.load(out)
  manifest = json.loads((out / stablehlo.MANIFEST).read_text())
  tokens = reference.inputs
  batch, length = tokens.shape
  have = np.asarray(functions["forward"](weights, tokens))
  prompt = length // 2
  size = lambda n: np.full(batch, n, np.int32)
  cache = stablehlo.empty_cache(manifest, batch, length)
  logits, cache = functions["prefill"](weights, tokens[:, :prompt], size(prompt), cache)
  steps = [logits]
  for i in range(prompt, length):
    logits, cache = functions["decode"](weights, tokens[:, i], size(i), cache)
    steps.append(logits)
  decoded = dataclasses.replace(reference, logits=reference.logits[:, prompt - 1 :])
  return [
    agree("forward", have, reference, dtype),
    agree("prefill and decode", np.stack(steps, 1), decoded, dtype),
  ]


def stablehlo_vision(out: pathlib.Path, reference: Reference, dtype: str) -> list[str]:
  """Runs the function of a directory."""
  functions, weights = stablehlo.load(out)
  have = np.asarray(functions["forward"](weights, reference.inputs))
  return [agree("forward", have, reference, dtype)]


# ------------------------------------------------------------------------ shared


def same_ids(name: str, encode: Callable[[str], Sequence[int]], tokenizer: Tokenizer) -> str:
  """Says whether a tokenizer gives the ids that ours gives, on some source text of Python."""
  texts = [inspect.getsource(module) for module in (pydoc, contextlib)]
  want, have = ([list(f(text)) for text in texts] for f in (tokenizer.begin, encode))
  count = sum(map(len, want))
  if want == have:
    return f"{name}: the same {count:,} token ids for two of Python's own modules"
  other = sum(len(a) != len(b) or sum(x != y for x, y in zip(a, b)) for a, b in zip(want, have))
  return f"{name}: {max(other, 1):,} of {count:,} token ids of two of Python's modules are others"


def _optional(*names: str) -> list[Any] | None:
  """Modules, where all are installed."""
  try:
    return [importlib.import_module(name) for name in names]
  except ImportError:
    return None
