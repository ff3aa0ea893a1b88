"""What `auto` stands for in a training config: how this machine runs a step of this model."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from matformer_jax import sharding
from matformer_jax.config import Execution, MatLMConfig, ModelConfig
from matformer_jax.config_keys import Config
from matformer_jax.errors import UserError
from matformer_jax.models import attention
from matformer_jax.tpu import chips

KERNELS = ("auto", "none")
DTYPES_ACROSS = ("", "float32", "bfloat16")  # of gradients, between slices
# Layers of which a TPU program with the attention kernel is unrolled: 14% off 850M's step on a
# v5p, and twice the time to compile, which grows with their number.
UNROLLED = 32
_SHARE = 0.9  # of a core's memory; the rest is for what `remat_for` does not count


def choose_execution(
  config: Config, model_config: ModelConfig, mesh: jax.sharding.Mesh, state, parent=None
) -> Execution:
  """The execution of a run's steps.

  Args:
    state: shapes and shardings of the train state.
    parent: those of a frozen teacher's float32 parameters, kept in the compute dtype.

  Raises:
    UserError: for a setting with a value that it cannot have.
  """
  device = mesh.devices.flat[0]
  # Older runs lack some keys.
  layers, kernels = getattr(config, "layers", "auto"), getattr(config, "kernels", "auto")
  execution = Execution.for_platform(
    device.platform,
    mesh,
    config.dtype,
    config.remat,
    device.device_kind,
    layers,
    getattr(config, "logits_gib", 0.0),
  )
  across = getattr(config, "slice_grad_dtype", "")
  if across not in DTYPES_ACROSS:
    raise UserError(f"slice_grad_dtype={across!r} is not one of {DTYPES_ACROSS}")
  execution = dataclasses.replace(execution, slice_grad_dtype=across)
  if kernels not in KERNELS:
    raise UserError(f"kernels={kernels!r} is not one of {KERNELS}")
  if kernels == "none":
    execution = dataclasses.replace(execution, kernels=None)
  tpu = chips.find(device.device_kind)
  # Without the attention kernel scores are saved or computed again, which is not counted below.
  if tpu is None or not attention.runs_kernel(model_config.num_tokens, execution):
    return execution
  if layers == "auto":
    execution = dataclasses.replace(execution, scan_layers=model_config.num_layers > UNROLLED)
  if config.remat == "auto":
    rows = config.batch_size // sharding.batch_shards(mesh) // config.grad_accum
    # A gradient, and while micro-batches are added up a second one.
    gradients = (1 + (config.grad_accum > 1)) * tree_bytes(state.params)
    stored = tree_bytes(state) + gradients
    if parent is not None:
      stored += tree_bytes(parent) * jnp.dtype(execution.dtype).itemsize // 4
    remat = remat_for(model_config, rows, stored, execution, tpu)
    execution = dataclasses.replace(execution, remat=remat)
  return execution


def remat_for(
  config: ModelConfig, rows: int, stored_bytes: int, execution: Execution, tpu: chips.Tpu
) -> str:
  """The remat policy that recomputes least among those whose saved arrays fit.

  Args:
    config: of the universal model.
    rows: sequences or images of a micro-batch on one device.
    stored_bytes: parameters, their gradients, optimizer state and a teacher on one device.
    execution: of the step but for its remat policy.
  """
  left = _SHARE * tpu.core_hbm_bytes - stored_bytes
  left -= head_bytes(config, rows, execution)
  if not execution.scan_layers:
    left -= gathered_bytes(config, execution)
  # To save everything in a loop costs more time than to compute some of it again.
  policies = ("products", "attn_out") if execution.scan_layers else ("none", "products", "attn_out")
  return next((p for p in policies if saved_bytes(config, rows, p, execution) <= left), "full")


def saved_bytes(config: ModelConfig, rows: int, remat: str, execution: Execution) -> int:
  """What the layers keep from forward to backward on one device.

  Raises:
    KeyError: for a policy other than none, products, attn_out and full.
  """
  d, hidden = config.d_model, config.ffn_widths[-1]
  qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
  heads = config.num_heads * (attention.kernel_width(config.head_dim) + 2)  # and log-sum-exp
  # Elements per token: whole on each device, and split over the tensor axis.
  whole, split = {
    "full": (d, 0),
    "attn_out": (2 * d, 0),
    "products": (2 * d, qkv + heads + hidden),
    "none": (5 * d, qkv + heads + (4 if config.gated else 2) * hidden),
  }[remat]
  itemsize, tensor = _shares(execution)
  return itemsize * rows * config.num_tokens * config.num_layers * (whole + split // tensor)


def gathered_bytes(config: ModelConfig, execution: Execution) -> int:
  """The layers' weights in the compute dtype, gathered once for forward and backward."""
  matrices = 3 if config.gated else 2
  itemsize, tensor = _shares(execution)
  attention_widths = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
  per_layer = config.d_model * (attention_widths + matrices * config.ffn_widths[-1])
  return itemsize * config.num_layers * per_layer // tensor


def head_bytes(config: ModelConfig, rows: int, execution: Execution) -> int:
  """Of a vocabulary: a chunk's logits and their gradient, the embedding, its float32 gradient."""
  if not isinstance(config, MatLMConfig):
    return 0
  itemsize, tensor = _shares(execution)
  logits = min(4 * rows * config.num_tokens * config.vocab_size // tensor, execution.logits_bytes)
  embedding = config.vocab_size * config.d_model // tensor
  return logits * (4 + itemsize) // 4 + embedding * (itemsize + 4)


def _shares(execution: Execution) -> tuple[int, int]:
  """(bytes of a computed number, devices of the tensor axis)."""
  mesh = execution.mesh
  return jnp.dtype(execution.dtype).itemsize, mesh.shape[sharding.TENSOR] if mesh else 1


def tree_bytes(tree) -> int:
  """Of one device's shards."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
