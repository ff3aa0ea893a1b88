"""The keys of a config and their types, for editors and type checkers.

At run time a config is a plain `ml_collections.ConfigDict`, and configs/ says what each key
means. A task's config has the keys of every task and its own.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_collections

if TYPE_CHECKING:

  class _Keys(ml_collections.ConfigDict, Mapping[str, Any]):
    """A ConfigDict behaves as a mapping, without saying so to type checkers."""

else:
  _Keys = ml_collections.ConfigDict


class MeshKeys(_Keys):
  """`config.mesh`."""

  slices: int
  data: int
  fsdp: int
  tensor: int


class ModelKeys(_Keys):
  """`config.model`."""

  num_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  ffn_ratios: tuple[float, ...]
  ffn_widths: tuple[int, ...]
  activation: str
  gated: bool
  nested_heads: bool
  head_ratios: tuple[float, ...]
  ffn_groups: int
  head_groups: int
  norm_eps: float
  # matlm
  vocab_size: int
  seq_len: int
  rope_base: float
  rope_scaling: tuple[float, ...]
  tied_head: bool
  embedding_scale: float
  qkv_bias: bool
  qk_norm: bool
  # matvit
  image_size: int
  patch_size: int
  channels: int
  num_classes: int
  pooling: str
  representation_size: int
  head_bias: float
  dropout: float
  stochastic_depth: float


class DataKeys(_Keys):
  """`config.data`."""

  source: str
  data_dir: str
  log_samples: bool
  # matlm
  tokenizer: str
  tokenizer_type: str
  tokenizer_sample_bytes: int
  validation_fraction: float
  attend: str
  cache_dir: str
  # matvit
  train_split: str
  validation_split: str
  train_transform: str
  eval_transform: str
  label: str
  classes: tuple[int, ...]
  corrupt: str
  max_pixels: int
  workers: int


class OptimKeys(_Keys):
  """`config.optim`."""

  name: str
  scope: str
  schedule: str
  peak_lr: float
  warmup_steps: int
  final_lr_ratio: float
  b1: float
  b2: float
  momentum: float
  muon_momentum: float
  muon_rms: float
  muon_blocks: str
  eps: float
  weight_decay: float
  clip_norm: float


class DistillKeys(_Keys):
  """`config.distill`."""

  weight: float
  temperature: float
  teacher: str
  parent: str


class CheckpointKeys(_Keys):
  """`config.checkpoint`."""

  every: int
  keep_last: int
  keep_best: int


class EvalKeys(_Keys):
  """`config.eval`."""

  every: int
  batches: int
  batch_size: int


class Config(_Keys):
  """What `get_config` returns and `train` takes."""

  task: str
  init_from: str
  init_head: bool
  seed: int
  steps: int
  batch_size: int
  method: str
  sampling: str
  grad_accum: int
  slice_grad_dtype: str
  dtype: str
  remat: str
  layers: str
  logits_gib: float
  kernels: str
  max_nonfinite: int
  log_every: int
  replica_check_every: int
  hang_timeout_s: float
  peer_timeout_s: float
  storage_timeout_s: float
  mesh: MeshKeys
  model: ModelKeys
  data: DataKeys
  optim: OptimKeys
  checkpoint: CheckpointKeys
  eval: EvalKeys
  # matlm
  z_loss: float
  distill: DistillKeys
  # matvit
  loss: str
  mixup: float
