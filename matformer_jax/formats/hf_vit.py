"""Writes MatViTs as `transformers`' ViTForImageClassification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import pathlib
from typing import Any

import numpy as np

from matformer_jax.config import MatViTConfig
from matformer_jax.data.augment import Transform
from matformer_jax.errors import UserError
from matformer_jax.formats import families, hf_export, layout

_LAYER = {
  "attention_norm": "layernorm_before",
  "ffn_norm": "layernorm_after",
  "q": "attention.attention.query",
  "k": "attention.attention.key",
  "v": "attention.attention.value",
  "o": "attention.output.dense",
  "up": "intermediate.dense",
  "down": "output.dense",
}


def write(
  out: pathlib.Path,
  config: MatViTConfig,
  params: Mapping[str, Any],
  classes: Sequence[str],
  transform: Transform,
  dtype: str = "f32",
) -> str:
  """Writes weights, config and, where `transformers` has an equal of the transform, preprocessor.

  Args:
    out: an existing directory.
    config: what `params`, a tree of float32 arrays, is.
    classes: names of the outputs.
    transform: what images go through in evaluation.
    dtype: of the weights, a key of hf_export.DTYPES.

  Returns:
    The class that `transformers` loads it as.

  Raises:
    UserError: for a model that this class does not compute, or a missing package.
  """
  described = hf_config(config, classes, dtype)
  preprocessor = preprocessor_config(config, transform)
  hf_export.write_safetensors(out, arrays(config, params), hf_export.DTYPES[dtype])
  hf_export.write_json(out / "config.json", described)
  if preprocessor is not None:
    hf_export.write_json(out / "preprocessor_config.json", preprocessor)
  return described["architectures"][0]


def common_size(config: MatViTConfig) -> layout.LayerSize:
  """To which layers are padded: ViTConfig knows heads of d_model / heads only, so to all heads."""
  return layout.LayerSize(layout.widest(layout.layer_sizes(config)).neurons, config.num_kv_heads)


def hf_config(config: MatViTConfig, classes: Sequence[str], dtype: str) -> dict[str, Any]:
  """The `config.json`.

  Raises:
    UserError: for what ViTForImageClassification does not do.
  """
  odd = {
    "a gate": config.gated,
    "grouped queries": config.queries_per_kv > 1,
    f"head_dim={config.head_dim}": config.head_dim * config.num_heads != config.d_model,
    f"pooling={config.pooling}": config.pooling != "cls",
    "a representation layer": config.representation_size > 0,
  }
  for what, present in odd.items():
    if present:
      raise UserError(
        f"--format=hf: ViTForImageClassification has no model with {what}; --format=stablehlo does"
      )
  names = dict(enumerate(classes))
  return {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": config.d_model,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "intermediate_size": common_size(config).neurons,
    "hidden_act": families.written_activation(config),
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": config.norm_eps,
    "image_size": config.image_size,
    "patch_size": config.patch_size,
    "num_channels": config.channels,
    "qkv_bias": True,
    "id2label": {str(i): name for i, name in names.items()},
    "label2id": {name: i for i, name in names.items()},
    "dtype": hf_export.DTYPES[dtype],
  }


def preprocessor_config(config: MatViTConfig, transform: Transform) -> dict[str, Any] | None:
  """The `preprocessor_config.json` that does what a transform does, and scales to [-1, 1].

  None where `transformers` has no equal of the transform.
  """
  half = [0.5] * config.channels
  shared = {
    "resample": 2,  # bilinear
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": half,
    "image_std": half,
  }
  side = config.image_size
  match transform.steps:
    case []:
      return {"image_processor_type": "ViTImageProcessor", "do_resize": False, **shared}
    case [("resize", (_,))]:
      return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        **shared,
      }
    case [("resize_small", (edge,)), ("center_crop", (_,))]:
      return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": edge},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": config.channels == 3,
        **shared,
      }
  return None


def arrays(config: MatViTConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
  """(name in `transformers`, float32 array), one after the other."""
  p, c = config.patch_size, config.channels
  yield "vit.embeddings.cls_token", np.asarray(params["cls"])[None, None]
  yield "vit.embeddings.position_embeddings", np.asarray(params["positions"])[None]
  kernel = np.asarray(params["patches"]["kernel"]).reshape(config.d_model, p, p, c)
  projection = "vit.embeddings.patch_embeddings.projection"
  yield f"{projection}.weight", kernel.transpose(0, 3, 1, 2)
  yield f"{projection}.bias", np.asarray(params["patches"]["bias"])
  for i, layer in enumerate(layout.dense_layers(config, params, common_size(config))):
    for name, array in layer.items():
      part, _, kind = name.partition(".")
      yield f"vit.encoder.layer.{i}.{_LAYER[part]}.{kind}", array
  yield "vit.layernorm.weight", np.asarray(params["final_norm"]["scale"])
  yield "vit.layernorm.bias", np.asarray(params["final_norm"]["bias"])
  yield "classifier.weight", np.asarray(params["head"]["kernel"])
  yield "classifier.bias", np.asarray(params["head"]["bias"])
