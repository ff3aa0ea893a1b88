"""Writes a size of a trained model for other people's runtimes, and checks what it wrote.

  python -m matformer_jax.export --workdir=runs/quickstart --format=hf --granularity=M --out=out/m
  python -m matformer_jax.export --workdir=models/elastic --format=gguf --granularity='M*15+L*15' \\
      --dtype=q8_0 --out=out/ml.gguf

hf is a directory that `transformers` loads, gguf a file for llama.cpp, stablehlo a directory of
compiled functions that JAX runs without this package. What was written is loaded by that runtime,
where it is installed, and must give the logits that we give; --nocheck leaves that out.
"""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import time
from typing import Any

from absl import flags
import jax

from matformer_jax import cli, runtime, storage
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import model_dir
from matformer_jax.errors import UserError
from matformer_jax.evals import latency
from matformer_jax.exporting import compare, stablehlo
from matformer_jax.formats import gguf_export, hf_export, hf_vit
from matformer_jax.loading import LanguageModel, Model, VisionModel, load
from matformer_jax.models import slicing

FORMATS = ("hf", "gguf", "stablehlo")
DTYPES = ("f32", "f16", "bf16", "q8_0")
MIXED = ("padded", "remote_code")


def export(
  model: Model,
  granularity: gran.GranularityLike | None,
  format: str,
  out: str | os.PathLike,
  dtype: str = "f32",
  mixed: str = "padded",
  check: bool = True,
) -> list[str]:
  """Writes a size of a model.

  Args:
    model: from `load`.
    granularity: e.g. "M" or "M*8+L*8"; None is everything stored.
    format: one of FORMATS.
    out: a new directory; for gguf a new file.
    dtype: of the weights, one of DTYPES.
    mixed: how layers of different widths are written for transformers: `padded` with zeros, or
      at their true size for `trust_remote_code=True`.
    check: load what was written and compare logits; nothing is at `out` before that.

  Returns:
    Lines that say what was written and found.

  Raises:
    UserError: for what the format cannot hold, an `out` that is taken, a package that is missing,
      or logits that differ.
  """
  out = storage.path(out)
  g = gran.full(model.config) if granularity is None else gran.parse(granularity, model.config)
  config = gran.submodel_config(model.config, g)
  _check_free(out, format)
  write = _WRITERS.get((type(model), format))
  if write is None:
    raise UserError(f"--format={format} cannot hold a {model.config.name}; give hf or stablehlo")
  if mixed == "remote_code" and (format != "hf" or not hf_export.is_mix(config)):
    raise UserError(
      f"--mixed=remote_code is for --format=hf and layers of different widths, not for "
      f"{gran.to_text(g, model.config)} as {format}; leave it out"
    )
  params = jax.device_get(slicing.slice_params(model.params, model.config, g))
  with storage.written_aside(out) as temporary:
    return write(model, config, params, temporary, dtype, mixed, check)


def _check_free(out: storage.Path, format: str) -> None:
  if not out.name:
    raise UserError(f"--out={out} must name a new directory")
  if format != "gguf":
    return model_dir.check_free(out)
  if out.suffix != ".gguf":
    raise UserError(f"--out={out} must name a file that ends in .gguf")
  if out.exists():
    raise UserError(f"--out={out} exists already; give a new file")


# ------------------------------------------------------------------------ formats


def _hf_language(model: LanguageModel, config, params, out, dtype, mixed, check) -> list[str]:
  hf_export.refuse_dtype(dtype, "hf", hf_export.DTYPES)
  remote = mixed == "remote_code"
  out.mkdir()
  written = hf_export.write(out, config, params, model.tokenizer, dtype, remote)
  lines = [f"{written} of {_size(out)}"]
  padding = 0 if remote else hf_export.padding_bytes(config, dtype)
  if padding:
    lines.append(
      "layers differ in width and were padded with zeros to the widest, which is exact: "
      f"{padding:,} bytes more; --mixed=remote_code keeps the true size"
    )
  if check:
    reference = compare.of_language(config, params)
    lines += compare.hf_language(out, reference, model.tokenizer, dtype, remote)
  return lines


def _gguf_language(model: LanguageModel, config, params, out, dtype, mixed, check) -> list[str]:
  name = f"{model.workdir.resolve().name} {gran.to_text(gran.full(config), config)}"
  written = gguf_export.write(out, config, params, model.tokenizer, dtype, name)
  lines = [f"{written} of {_size(out)}"]
  if check:
    reference = compare.of_language(config, params)
    lines += compare.gguf(out, reference, config, params, model.tokenizer, dtype)
  return lines


def _stablehlo_language(model: LanguageModel, config, params, out, dtype, mixed, check):
  stablehlo.check_dtype(dtype)
  out.mkdir()
  tokenizer = model.tokenizer
  stablehlo.write_language(out, config, params, dtype, tokenizer.eos_id, tokenizer.bos_id)
  tokenizer.save(out)
  lines = [f"forward, prefill, decode and weights of {_size(out)}"]
  if check:
    lines += compare.stablehlo_language(out, compare.of_language(config, params), dtype)
  return lines


def _hf_vision(model: VisionModel, config, params, out, dtype, mixed, check) -> list[str]:
  hf_export.refuse_dtype(dtype, "hf", hf_export.DTYPES)
  out.mkdir()
  written = hf_vit.write(out, config, params, model.class_names, model.transform, dtype)
  lines = [f"{written} of {_size(out)}"]
  if hf_export.is_mix(config):
    lines.append("layers differ in width and were padded with zeros to the widest, exactly")
  if not (out / "preprocessor_config.json").exists():
    lines.append(
      f"no preprocessor_config.json: transformers has no equal of {model.transform.text!r}"
    )
  if check:
    lines += compare.hf_vision(out, compare.of_vision(config, params), dtype)
  return lines


def _stablehlo_vision(model: VisionModel, config, params, out, dtype, mixed, check) -> list[str]:
  stablehlo.check_dtype(dtype)
  out.mkdir()
  stablehlo.write_vision(out, config, params, dtype, model.class_names)
  lines = [f"forward and weights of {_size(out)}"]
  if check:
    lines += compare.stablehlo_vision(out, compare.of_vision(config, params), dtype)
  return lines


_WRITERS: dict[tuple[type, str], Callable[..., list[str]]] = {
  (LanguageModel, "hf"): _hf_language,
  (LanguageModel, "gguf"): _gguf_language,
  (LanguageModel, "stablehlo"): _stablehlo_language,
  (VisionModel, "hf"): _hf_vision,
  (VisionModel, "stablehlo"): _stablehlo_vision,
}


def _size(path: pathlib.Path) -> str:
  return f"{sum(storage.sizes(path).values()):,} bytes"


# ------------------------------------------------------------------------ program


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  out = cli.required(_OUT)
  format = cli.required(_FORMAT, f"one of {', '.join(FORMATS)}")
  if _GRANULARITY.value and _BUDGET.value:
    raise UserError("give --granularity or --budget, not both")
  _check_free(storage.path(out), format)
  runtime.enable_compilation_cache()
  started = time.perf_counter()
  model: Any = load(workdir, _STEP.value)
  chosen = _GRANULARITY.value
  if _BUDGET.value:
    profile = latency.read(workdir, model.config)
    chosen = gran.mix_n_match(model.config, _BUDGET.value, profile=profile)
  for line in export(model, chosen, format, out, _DTYPE.value, _MIXED.value, _CHECK.value):
    print(line)
  g = gran.full(model.config) if chosen is None else gran.parse(chosen, model.config)
  seconds = time.perf_counter() - started
  print(f"wrote {gran.to_text(g, model.config)} to {out} in {seconds:.1f} s")


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained or extracted model.")
  _STEP = cli.define_step()
  _GRANULARITY = flags.DEFINE_string(
    "granularity", None, "Size to write: S, 'M*2+L*2', XL; default everything stored."
  )
  _BUDGET = flags.DEFINE_string("budget", None, cli.BUDGET_HELP)
  _FORMAT = flags.DEFINE_enum("format", None, FORMATS, "What to write.")
  _OUT = flags.DEFINE_string("out", None, "New directory; for gguf, new file.")
  _DTYPE = flags.DEFINE_enum("dtype", "f32", DTYPES, "Type of the weights; q8_0 is gguf's only.")
  _MIXED = flags.DEFINE_enum(
    "mixed",
    "padded",
    MIXED,
    "Layers of different widths, hf: padded with zeros to the widest, or at their true size with "
    "code beside the weights.",
  )
  _CHECK = flags.DEFINE_bool("check", True, "Load what was written and compare logits.")
  cli.run(main)
