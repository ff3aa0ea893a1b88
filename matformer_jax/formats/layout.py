"""How the arrays of a dense model lie in a parameter tree, both ways.

`read_tree` makes a tree of a dense model's arrays, `dense_layer` makes a layer's arrays of a tree;
each inverts the other. A dense model keeps heads and neurons in one axis; here they are in groups,
and the i-th of all is place i // groups of group i % groups, so that the first ones of all are
the first ones of each group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any

import numpy as np

from matformer_jax.config import MatLMConfig, ModelConfig

# What a layer's arrays are called here -> in `transformers`' decoders, after `model.layers.N.`.
DECODER_LAYER = {
  "attention_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "o": "self_attn.o_proj",
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
  "up": "mlp.up_proj",
  "gate": "mlp.gate_proj",
  "down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class LayerSize:
  """The nested widths of a layer.

  Attributes:
    neurons: of its FFN.
    kv_heads: heads of keys and values; each has `queries_per_kv` heads of queries.
  """

  neurons: int
  kv_heads: int


def layer_sizes(config: ModelConfig) -> list[LayerSize]:
  """Of every layer that a model stores."""
  return [
    LayerSize(config.ffn_widths[s.ffn], config.head_counts[s.heads] // config.queries_per_kv)
    for s in config.spans
    for _ in range(s.num_layers)
  ]


def widest(sizes: list[LayerSize]) -> LayerSize:
  """The size to which all layers can be padded."""
  return LayerSize(max(s.neurons for s in sizes), max(s.kv_heads for s in sizes))


# ----------------------------------------------------------- from dense arrays


def read_tree(
  config: MatLMConfig, read: Callable[..., np.ndarray], norm_offset: float
) -> dict[str, Any]:
  """The parameter tree of a universal model.

  Args:
    read: (name as in `transformers`, shape) -> float32 array.
    norm_offset: what is added to stored scales of norms.
  """
  d, vocab = config.d_model, config.vocab_size
  norm = lambda name, size: read(name, (size,)) + np.float32(norm_offset)
  params: dict[str, Any] = {"embedding": read("model.embed_tokens.weight", (vocab, d))}
  if not config.tied_head:
    params["head"] = read("lm_head.weight", (vocab, d))
  params["final_norm"] = {"scale": norm("model.norm.weight", d)}
  stacks: dict[tuple[str, ...], np.ndarray] = {}
  for layer in range(config.num_layers):
    prefix = f"model.layers.{layer}."
    of_layer = lambda name, *shape, prefix=prefix: read(prefix + name, shape)
    for path, array in _layer(config, of_layer, lambda name, n, p=prefix: norm(p + name, n)):
      stack = stacks.setdefault(path, np.empty((config.num_layers, *array.shape), np.float32))
      stack[layer] = array
  blocks: dict[str, Any] = {}
  for (module, name), stack in stacks.items():
    blocks.setdefault(module, {})[name] = stack
  return params | {"blocks": {"0": blocks}}


def _layer(config: MatLMConfig, read, norm) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
  """((module, name), array) of a layer, as in models/layers.py."""
  d, h, kv, ratio = config.d_model, config.head_dim, config.num_kv_heads, config.queries_per_kv
  yield ("attention_norm", "scale"), norm("input_layernorm.weight", d)
  yield ("ffn_norm", "scale"), norm("post_attention_layernorm.weight", d)

  def heads(name: str, *rest: int) -> np.ndarray:
    """[R + 2, A, N, H, ...] of the query, key and value projections."""
    q = read(f"self_attn.q_proj.{name}", kv * ratio * h, *rest)
    q = q.reshape(kv, ratio, h, *rest).swapaxes(0, 1)
    k_v = [read(f"self_attn.{x}_proj.{name}", kv * h, *rest) for x in "kv"]
    return grouped(np.concatenate([q, *(x.reshape(1, kv, h, *rest) for x in k_v)]), 1)

  grouped = lambda array, axis: _in_groups(array, axis, config.head_groups)
  yield ("attention", "qkv"), heads("weight", d)
  if config.qkv_bias:
    yield ("attention", "qkv_bias"), heads("bias")
  if config.qk_norm:
    for x in "qk":
      yield ("attention", f"{x}_norm"), read(f"self_attn.{x}_norm.weight", h)
  out = read("self_attn.o_proj.weight", d, kv * ratio * h).T
  yield ("attention", "out"), grouped(out.reshape(kv, ratio * h, d), 0)
  width = config.ffn_widths[-1]
  neurons = lambda array: _in_groups(array, 0, config.ffn_groups)
  yield ("ffn", "in"), neurons(read("mlp.up_proj.weight", width, d))
  if config.gated:
    yield ("ffn", "gate"), neurons(read("mlp.gate_proj.weight", width, d))
  yield ("ffn", "out"), neurons(read("mlp.down_proj.weight", d, width).T)


def _in_groups(array: np.ndarray, axis: int, groups: int) -> np.ndarray:
  """An axis as (group, place)."""
  shape = array.shape
  split = array.reshape(*shape[:axis], shape[axis] // groups, groups, *shape[axis + 1 :])
  return split.swapaxes(axis, axis + 1)


# ------------------------------------------------------------- to dense arrays


def dense_layers(
  config: ModelConfig, params: Mapping[str, Any], size: LayerSize | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Every stored layer's `dense_layer`; with `size`, padded to it."""
  for i, span in enumerate(config.spans):
    stack = params["blocks"][str(i)]
    for layer in range(span.num_layers):
      of_layer = {
        module: {name: np.asarray(leaf[layer], np.float32) for name, leaf in leaves.items()}
        for module, leaves in stack.items()
      }
      yield dense_layer(config, of_layer, size)


def dense_layer(
  config: ModelConfig, layer: dict[str, Any], size: LayerSize | None = None
) -> dict[str, np.ndarray]:
  """A layer's arrays as dense models have them.

  Args:
    layer: {module: {name: float32 array}}, of a stack of `config`.
    size: to which heads and neurons are padded with zeros, which add nothing to what the layer
      computes; None pads nothing.

  Returns:
    {"q.weight": [heads * H, D], "o.weight": [D, heads * H], "up.weight": [neurons, D], ...}, by
    the names of DECODER_LAYER; where the model has biases "q.bias" and so on.
  """
  attention, ffn, ratio = layer["attention"], layer["ffn"], config.queries_per_kv
  arrays: dict[str, np.ndarray] = {}
  for norm in ("attention_norm", "ffn_norm"):
    arrays[f"{norm}.weight"] = layer[norm]["scale"]
    if config.layer_norm:
      arrays[f"{norm}.bias"] = layer[norm]["bias"]

  kv_heads = size.kv_heads if size else attention["qkv"].shape[1] * attention["qkv"].shape[2]
  for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
    stored = attention["qkv" if kind == "weight" else "qkv_bias"]
    qkv = _padded(_out_of_groups(stored, 1), 1, kv_heads)  # [R + 2, kv_heads, H, ...]
    parts = qkv[:ratio].swapaxes(0, 1), qkv[ratio], qkv[ratio + 1]
    for name, part in zip("qkv", parts):
      arrays[f"{name}.{kind}"] = part.reshape(-1, *stored.shape[4:])
  out = _padded(_out_of_groups(attention["out"], 0), 0, kv_heads)
  arrays["o.weight"] = out.reshape(-1, config.d_model).T
  for name in ("q_norm", "k_norm") if config.qk_norm else ():
    arrays[f"{name}.weight"] = attention[name]

  neurons = size.neurons if size else ffn["in"].shape[0] * ffn["in"].shape[1]
  ordered = lambda name: _padded(_out_of_groups(ffn[name], 0), 0, neurons)
  for name, stored in (("up", "in"), ("gate", "gate")) if config.gated else (("up", "in"),):
    arrays[f"{name}.weight"] = ordered(stored)
    if config.biases:
      arrays[f"{name}.bias"] = ordered(f"{stored}_bias")
  arrays["down.weight"] = ordered("out").T
  if config.biases:
    arrays["o.bias"], arrays["down.bias"] = attention["out_bias"], ffn["out_bias"]
  return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _out_of_groups(array: np.ndarray, axis: int) -> np.ndarray:
  """Axes (group, place) as one: the inverse of `_in_groups`."""
  groups, places = array.shape[axis : axis + 2]
  merged = (*array.shape[:axis], places * groups, *array.shape[axis + 2 :])
  return array.swapaxes(axis, axis + 1).reshape(merged)


def _padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
  """Zeros at the end of an axis, up to `size`."""
  widths = [(0, 0)] * array.ndim
  widths[axis] = (0, size - array.shape[axis])
  return np.pad(array, widths)
