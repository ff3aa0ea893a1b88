"""Distillation: the frozen teacher that a run's sizes also learn from (Hinton et al. 2015).

The teacher is XL of the run's own weights (`self`), or another trained model (`parent`). Its
forward pass is part of the step of each size; models/losses.py has the loss.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from matformer_jax import granularity as gran
from matformer_jax import sharding
from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import MatLMConfig, ModelConfig, model_config
from matformer_jax.config_keys import Config, DistillKeys
from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.hosts.multihost import Hosts
from matformer_jax.runtime import say
from matformer_jax.tasks import Task, Teacher

TEACHERS = ("none", "self", "parent")


@dataclasses.dataclass(frozen=True)
class Distillation:
  """How a run distils.

  Attributes:
    weight, temperature: of the loss, see `losses.chunked_distillation`.
    parent: directory of the teacher; empty where it is XL of the run's own weights.
    model: the teacher's.
  """

  weight: float
  temperature: float
  parent: str
  model: ModelConfig

  def teaches(self, granularity: gran.Granularity) -> bool:
    """Whether a size has a teacher: all but XL, who would be its own."""
    return bool(self.parent) or granularity != gran.full(self.model)

  def teacher(self, params) -> Teacher:
    """What a task's loss takes."""
    return Teacher(self.model, params, self.weight, self.temperature)

  def flops(self, granularity: gran.Granularity, num_tokens: int) -> int:
    """Of the teacher's forward pass, per token, beside a step of a size at T = num_tokens."""
    if not self.teaches(granularity):
      return 0
    return gran.count(self.model, gran.full(self.model), num_tokens).flops

  def identity(self, fingerprint: str = "") -> dict[str, Any]:
    """JSON that must not change in the course of a run; `fingerprint` is of a parent's weights."""
    own = {"weight": self.weight, "temperature": self.temperature}
    return own | ({"parent": fingerprint} if self.parent else {"teacher": "self"})


def check(config: Config) -> None:
  """Raises UserError for settings that cannot be, or that contradict each other."""
  keys = _settings(config)
  if keys is None:
    return
  weight, temperature, teacher = keys.weight, keys.temperature, keys.teacher
  if teacher not in TEACHERS:
    raise UserError(f"distill.teacher={teacher!r} is unknown{did_you_mean(str(teacher), TEACHERS)}")
  if not 0 <= weight <= 1:  # nor NaN
    raise UserError(f"distill.weight={weight!r} must be from 0 to 1")
  if not 0 < temperature < float("inf"):
    raise UserError(f"distill.temperature={temperature!r} must be a positive number")
  if weight and teacher == "none":
    raise UserError(f"distill.weight={weight:g} needs a teacher: --config.distill.teacher=self")
  if not weight and teacher != "none":
    raise UserError(
      f"distill.teacher={teacher!r} has no effect with distill.weight=0; set a weight, e.g. 0.5"
    )
  if teacher == "parent" and not _parent(config):
    raise UserError(
      "distill.teacher='parent' needs the directory of a trained model: --config.init_from=DIR, or "
      "--config.distill.parent=DIR"
    )
  if keys.parent and teacher != "parent":
    raise UserError(
      f"distill.parent={keys.parent!r} is not used by distill.teacher={teacher!r}; "
      "set --config.distill.teacher=parent"
    )


def from_config(
  config: Config, model: ModelConfig, mesh: jax.sharding.Mesh | None = None
) -> Distillation | None:
  """How a run of `model` distils; None where it does not.

  Args:
    mesh: over which a parent's weights are sharded too.

  Raises:
    UserError: as `check`, and for a parent that is no run, is of another task or vocabulary, or
      whose weights do not divide over the mesh.
  """
  check(config)
  keys = _settings(config)
  if keys is None or keys.teacher == "none":
    return None
  if keys.teacher == "self":
    return Distillation(keys.weight, keys.temperature, "", model)
  path = _parent(config)
  card = _read(path)
  if card["task"] != config.task:
    raise UserError(
      f"distill.parent={path!r} is of task {card['task']!r}, and this config of {config.task!r}"
    )
  parent = model_config(card)
  assert isinstance(model, MatLMConfig) and isinstance(parent, MatLMConfig)
  if parent.vocab_size != model.vocab_size:
    raise UserError(
      f"distill.parent={path!r} has a vocabulary of {parent.vocab_size:,} and this model one of "
      f"{model.vocab_size:,}; they must be the same"
    )
  try:
    if mesh is not None:
      sharding.check_model_fits_mesh(parent, mesh)
  except UserError as e:
    raise UserError(f"distill.parent={path!r} cannot be sharded over this mesh: {e}") from e
  return Distillation(keys.weight, keys.temperature, path, parent)


def check_parent(config: Config, task: Task, mesh: jax.sharding.Mesh) -> None:
  """Raises UserError as `from_config`, and where the tokenizer of a task's data is another."""
  distillation = from_config(config, task.model_config, mesh)
  if distillation is None or not distillation.parent:
    return
  path = distillation.parent
  theirs = _read(path)["identity"].get("tokenizer", "")
  ours = task.identity().get("tokenizer", "")
  if ours != theirs:
    raise UserError(
      f"distill.parent={path!r} was trained with another tokenizer ({theirs[:12]}) than the data's "
      f"({ours[:12]}), so it predicts other tokens; use that model's tokenizer: "
      f"--config.data.tokenizer={path}"
    )


def for_compute(params, dtype: str):
  """A frozen model's parameters as they are kept: what is cast at every use, cast once.

  Norms compute in float32, and their scales stay so.
  """

  def cast(path, leaf):
    matrix = "embed" in sharding.logical_axes(sharding.path_names(path))
    return leaf.astype(dtype) if matrix else leaf

  return jax.tree_util.tree_map_with_path(cast, params)


def abstract_parent(abstract, dtype: str):
  """The shapes, dtypes and shardings of `for_compute`, from those of the stored parameters."""
  shapes = jax.eval_shape(lambda params: for_compute(params, dtype), abstract)
  return jax.tree.map(
    lambda s, stored: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=stored.sharding),
    shapes,
    abstract,
  )


def load_parent(distillation: Distillation, abstract, dtype: str, hosts: Hosts) -> tuple[Any, str]:
  """(parameters of the parent's newest checkpoint for compute, fingerprint of those stored).

  Args:
    abstract: shapes, dtypes and shardings of the parent's parameters as stored.
    dtype: of compute.

  Raises:
    UserError: where there is no checkpoint, or none that verifies.
  """
  path = distillation.parent
  found = checkpoint.restore_newest(path, {"params": abstract}, False, hosts)
  if found is None:
    raise UserError(
      f"distill.parent={path!r} holds no checkpoint; give the directory of a trained or extracted "
      "model"
    )
  items, meta, _ = found
  say(f"read the teacher from {path}, step {meta['step']:,}")
  places = jax.tree.map(lambda s: s.sharding, abstract)
  cast = jax.jit(for_compute, static_argnums=1, out_shardings=places)
  weights = json.dumps(meta["manifest"]["params"], sort_keys=True)  # every leaf's checksum
  return cast(items["params"], jnp.dtype(dtype).name), hashlib.sha256(weights.encode()).hexdigest()


def _settings(config: Config) -> DistillKeys | None:
  """None of another task, and of an older run."""
  return getattr(config, "distill", None)


def _parent(config: Config) -> str:
  return config.distill.parent or config.init_from


def _read(path: str):
  try:
    return cards.read(path)
  except UserError as e:
    raise UserError(f"distill.parent={path!r}: {e}") from e
