"""Writes a model as StableHLO functions, which JAX alone runs: on CPU, CUDA and TPU, in any batch.

A directory holds

  forward.bin, prefill.bin, decode.bin    serialised by `jax.export`; a ViT has the first only
  weights.safetensors                     their first argument, {name: array}
  manifest.json                           shapes of the cache, limits, end of text
  README.md                               the lines that run it

Batch b, tokens t and cache length s are symbolic: one file serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from matformer_jax import granularity as gran
from matformer_jax.config import Execution, MatLMConfig, MatViTConfig
from matformer_jax.decoding.decode import Decoder
from matformer_jax.errors import UserError, import_extra
from matformer_jax.formats import hf_export
from matformer_jax.models import cache as kv
from matformer_jax.models import matlm, matvit

PLATFORMS = ("cpu", "cuda", "tpu")
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
Flat = Mapping[str, Any]


def write_language(
  out: pathlib.Path, config: MatLMConfig, params: Any, dtype: str, eos_id: int, bos_id: int | None
) -> None:
  """Writes a MatLM into an existing directory.

  Args:
    config: what `params` is.
    dtype: of weights, cache and products, a key of DTYPES; logits are float32.

  Raises:
    UserError: for a missing package.
  """
  execution = _execution(dtype)
  weights = _weights(params, dtype)
  forward, prefill, decode = language_functions(config, execution)
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  empty = lambda b, s: jax.eval_shape(lambda: _flat_cache(kv.init_cache(config, execution, b, s)))
  longest = config.seq_len
  b, t = _symbols("b, t", f"t <= {longest}")
  _export(out / "forward.bin", forward, weights, ids(b, t))
  b, t, s = _symbols("b, t, s", "t <= s", f"s <= {longest}")
  _export(out / "prefill.bin", prefill, weights, ids(b, t), ids(b), empty(b, s))
  b, s = _symbols("b, s", f"s <= {longest}")
  cache = empty(b, s)
  _export(out / "decode.bin", decode, weights, ids(b), ids(b), cache)
  shapes = {
    name: [n if isinstance(n, int) else str(n) for n in leaf.shape] for name, leaf in cache.items()
  }
  _write(
    out,
    weights,
    dtype,
    _README_LANGUAGE,
    {
      "kind": "language model",
      "max_length": config.seq_len,
      "vocab_size": config.vocab_size,
      "eos_id": eos_id,
      "bos_id": bos_id,
      "cache": shapes,
    },
  )


def write_vision(
  out: pathlib.Path, config: MatViTConfig, params: Any, dtype: str, classes: list[str]
) -> None:
  """Writes a MatViT into an existing directory; arguments as in `write_language`."""
  weights = _weights(params, dtype)
  model = matvit.MatViT(config, _execution(dtype))
  forward = lambda weights, images: model.apply({"params": _unflatten(weights)}, images)
  (b,) = _symbols("b")
  shape = (config.image_size, config.image_size, config.channels)
  _export(out / "forward.bin", forward, weights, jax.ShapeDtypeStruct((b, *shape), jnp.uint8))
  manifest = {"kind": "image classifier", "image": shape, "classes": classes}
  _write(out, weights, dtype, _README_VISION, manifest)


def language_functions(config: MatLMConfig, execution: Execution) -> tuple[Callable, ...]:
  """What is exported of a MatLM.

  Returns:
    forward(weights, tokens [b, t]) -> logits [b, t, V];
    prefill(weights, tokens [b, t], length [b], cache) -> (logits [b, V] after each row's first
      `length` tokens, cache); what is beyond them is not seen later;
    decode(weights, token [b], position [b], cache) -> (logits [b, V], cache), with all tokens
      before `position` in the cache.
  """
  decoder = Decoder(config, execution, gran.full(config))

  def forward(weights: Flat, tokens):
    params = _unflatten(weights)
    return matlm.MatLM(config, execution).apply({"params": params}, tokens)

  def prefill(weights: Flat, tokens, length, cache: Flat):
    return run(weights, tokens, length - 1, None, cache)

  def decode(weights: Flat, token, position, cache: Flat):
    return run(weights, token[:, None], jnp.zeros_like(position), position, cache)

  def run(weights: Flat, tokens, last, start, cache: Flat):
    """Extends a cache by `tokens`: (logits of the column `last` of each row, cache)."""
    submodel = decoder.submodel(_unflatten(weights))
    hidden, new = decoder.extend(submodel, tokens, _unflatten_cache(cache), start)
    hidden = jnp.take_along_axis(jnp.asarray(hidden), last[:, None, None], axis=1)
    return decoder.logits(submodel, hidden)[:, 0], _flat_cache(new)

  return forward, prefill, decode


def load(directory: pathlib.Path) -> tuple[dict[str, Callable], dict[str, np.ndarray]]:
  """({name: function}, weights) of a written directory."""
  read = import_extra("safetensors.numpy", "reading weights", "export").load_file
  functions = {
    path.stem: jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    for path in directory.glob("*.bin")
  }
  return functions, read(directory / WEIGHTS)


def empty_cache(manifest: Mapping[str, Any], batch: int, length: int) -> dict[str, jax.Array]:
  """A cache of `length` positions, as a manifest describes it."""
  sizes = {"b": batch, "s": length}
  return {
    name: jnp.zeros([sizes.get(n, n) for n in shape], manifest["dtype"])
    for name, shape in manifest["cache"].items()
  }


# ------------------------------------------------------------------------ helpers


def _execution(dtype: str) -> Execution:
  """Scanned, so that the program does not grow with the layers; the same on every platform."""
  return Execution(dtype=DTYPES[dtype], scan_layers=True, flat_weights=False)


def _symbols(names: str, *constraints: str):
  """Symbolic sizes; a call whose sizes break a constraint is refused."""
  return jax.export.symbolic_shape(names, scope=jax.export.SymbolicScope(constraints))


def _export(path: pathlib.Path, function: Callable, weights: Flat, *args) -> None:
  # It needs flatbuffers to serialise, and does not declare it.
  import_extra("flatbuffers", "--format=stablehlo", "export")
  exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(weights, *args)
  path.write_bytes(exported.serialize())


def _weights(params: Any, dtype: str) -> dict[str, jax.Array]:
  flat = traverse_util.flatten_dict(params, sep="/")
  return {name: jnp.asarray(leaf, DTYPES[dtype]) for name, leaf in flat.items()}


def _unflatten(weights: Flat) -> Any:
  return traverse_util.unflatten_dict(dict(weights), sep="/")


def _flat_cache(cache: kv.Cache) -> dict[str, Any]:
  return {f"{i}/{name}": leaf for i, part in enumerate(cache) for name, leaf in part.items()}


def _unflatten_cache(cache: Flat) -> kv.Cache:
  parts = range(len(cache) // 2)
  return [{name: cache[f"{i}/{name}"] for name in ("k", "v")} for i in parts]


def _write(out: pathlib.Path, weights: Flat, dtype: str, readme: str, manifest: Flat) -> None:
  save = import_extra("safetensors.numpy", "--format=stablehlo", "export").save_file
  save({name: np.asarray(leaf) for name, leaf in weights.items()}, out / WEIGHTS)
  described = {"dtype": DTYPES[dtype], "platforms": PLATFORMS, **manifest}
  hf_export.write_json(out / MANIFEST, described)
  (out / "README.md").write_text(readme)


def check_dtype(dtype: str) -> None:
  """Raises UserError for one that JAX does not multiply in."""
  if dtype not in DTYPES:
    raise UserError(
      f"--dtype={dtype} is not for --format=stablehlo; give one of {', '.join(DTYPES)}"
    )


_README_LANGUAGE = """\
# A language model as StableHLO

JAX runs it, on CPU, CUDA or TPU (`pip install jax flatbuffers safetensors`). From this directory:

```python
import json
import pathlib

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

manifest = json.loads(pathlib.Path("manifest.json").read_text())
weights = jax.device_put(load_file("weights.safetensors"))
load = lambda name: jax.jit(jax.export.deserialize(bytearray(pathlib.Path(name).read_bytes())).call)
forward, prefill, decode = (load(f"{name}.bin") for name in ("forward", "prefill", "decode"))

prompts = jnp.array([[5, 6, 7, 8], [9, 10, 0, 0]], jnp.int32)  # padded at the end
length = jnp.array([4, 2], jnp.int32)
logits = forward(weights, prompts)  # [2, 4, V]

sizes = {"b": 2, "s": 32}  # the batch, and prompt and continuation together, at most max_length
cache = {
  name: jnp.zeros([sizes.get(n, n) for n in shape], manifest["dtype"])
  for name, shape in manifest["cache"].items()
}
logits, cache = prefill(weights, prompts, length, cache)  # [2, V]
text = []
for i in range(8):
  token = logits.argmax(-1).astype(jnp.int32)
  text.append(token)
  logits, cache = decode(weights, token, length + i, cache)
print(jnp.stack(text, 1).tolist())
```

`manifest.json` has the ids that begin and end a text; the tokenizer's files lie beside it.
"""

_README_VISION = """\
# An image classifier as StableHLO

JAX runs it, on CPU, CUDA or TPU (`pip install jax flatbuffers safetensors`). From this directory:

```python
import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file

manifest = json.loads(pathlib.Path("manifest.json").read_text())
weights = jax.device_put(load_file("weights.safetensors"))
forward = jax.jit(jax.export.deserialize(bytearray(pathlib.Path("forward.bin").read_bytes())).call)
images = np.zeros([2, *manifest["image"]], np.uint8)  # as many as you like
print([manifest["classes"][i] for i in forward(weights, images).argmax(-1)])
```
"""
