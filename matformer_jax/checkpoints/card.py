"""The model card, config.json: read, written, and compared when a run is resumed."""

from __future__ import annotations

import hashlib
from importlib import metadata
import json
import os
import pathlib
import sys
from typing import Any

import jax

from matformer_jax import granularity as gran
from matformer_jax import storage
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import kind_of, model_config
from matformer_jax.config_keys import Config, ModelKeys
from matformer_jax.errors import UserError
from matformer_jax.hosts.multihost import differences
from matformer_jax.runtime import say, warn
from matformer_jax.tasks import Task

VERSIONED = (
  "matformer_jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
  "sentencepiece",
)
VERSIONED_EXTRAS = ("tokenizers",)  # where a run uses them
CARD_FILE = "config.json"
# A run in which one of these changes is another run.
FIXED = (
  "task",
  "model",
  "seed",
  "batch_size",
  "method",
  "sampling",
  "identity",
  "optimizer",
  "distill",
)


def keeps_head(config: Config) -> bool:
  """Whether a run that starts from a trained model takes its output head over."""
  return bool(config.get("init_head", True))


def with_model_of_init(config: Config, card: dict[str, Any] | None = None) -> Config:
  """The config with its model taken from `init_from`, where given, but for what may be adapted.

  Args:
    card: instead of that of `init_from`, which may be gone when a run resumes.

  Raises:
    UserError: if `init_from` is no model, or of another task.
  """
  if not config.get("init_from"):
    return config
  card = card or read(config.init_from)
  if card["task"] != config.task:
    raise UserError(
      f"init_from={config.init_from!r} is of task {card['task']!r}, and this config "
      f"of {config.task!r}"
    )
  kind = kind_of(config).config
  own = kind.adaptable + (() if keeps_head(config) else kind.adaptable_with_head)
  own = {key: config.model[key] for key in own}
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model = ModelKeys(card["model"] | own)
  return config


def make_card(config: Config, task: Task, distill: dict[str, Any] | None = None) -> dict[str, Any]:
  """What config.json stores: everything needed to rebuild the model, and how it was made.

  Args:
    distill: `distill.Distillation.identity` of a run that learns from a teacher.
  """
  return {
    "format": checkpoint.FORMAT,
    "task": config.task,
    "model": task.model_config.to_dict(),
    "seed": config.seed,
    "batch_size": config.batch_size,
    "method": config.get("method", "sampled"),
    "sampling": list(gran.sampling_probabilities(config.sampling, task.model_config)),
    "optimizer": config.optim.name,
    "identity": dict(task.identity()),
    **({} if distill is None else {"distill": distill}),
    "config": json.loads(config.to_json_best_effort()),
    **versions(),
  }


def versions() -> dict[str, Any]:
  """With what a model was made."""
  used = [name for name in VERSIONED_EXTRAS if name in sys.modules]
  return {
    "versions": {name: metadata.version(name) for name in [*VERSIONED, *used]},
    "python": sys.version.split()[0],
  }


def read(workdir: str | os.PathLike) -> dict[str, Any]:
  """The run's config.json, or where that is unreadable the newest checkpoint's copy.

  Raises:
    UserError: if the directory holds neither.
  """
  path = storage.path(workdir) / CARD_FILE
  try:
    card = json.loads(path.read_bytes())
    if not {"model", "identity", "config"} <= card.keys():
      raise ValueError("keys are missing")
    return card
  except (OSError, ValueError, AttributeError) as e:
    problem = e
  for step in reversed(checkpoint.steps(workdir)):
    try:
      card = checkpoint.read_meta(workdir, step)["card"]
    except checkpoint.DamagedCheckpoint:
      continue
    warn(f"{path} is unreadable ({problem}); using the copy in checkpoint {step}")
    return card
  raise UserError(
    f"{workdir} is not a run: {path} cannot be read ({problem}); give the --workdir "
    "of a training run"
  )


def read_existing(workdir: storage.Path) -> dict[str, Any] | None:
  """The card of a run to resume; None in a fresh directory."""
  try:
    return read(workdir)
  except UserError as e:
    if (workdir / CARD_FILE).exists():
      warn(f"{e}; writing a new one")
    return None


def write(workdir: storage.Path, card: dict[str, Any]) -> None:
  """Writes config.json atomically."""
  storage.replace_file(workdir / CARD_FILE, json.dumps(card, indent=1).encode())


def check_model(workdir: storage.Path, old_card, config: Config) -> None:
  """Compares what is known before any data is read, so that a wrong workdir fails fast."""
  _raise_if_different(
    workdir, {"model": _model(old_card)}, {"model": _as_json(model_config(config).to_dict())}
  )


def check_same_run(workdir: storage.Path, old_card, new_card) -> None:
  """Raises UserError where a resumed run would not be the same; notes other changes."""
  new_card = _as_json(new_card)
  # Runs made before there was a choice of methods sampled.
  fixed = lambda card: {"method": "sampled"} | {k: card[k] for k in FIXED if k in card}
  _raise_if_different(workdir, fixed(old_card) | {"model": _model(old_card)}, fixed(new_card))
  changed = _differences(old_card["config"], new_card["config"])
  if changed:
    say(f"note: resuming with a changed config: {'; '.join(changed)}")


def changed_keys(old_card, config: Config, section: str) -> list[str]:
  """What differs in a section of the config from the run's, e.g. of `optim`, in words."""
  new = json.loads(config.to_json_best_effort())
  return _differences({section: old_card["config"][section]}, {section: new[section]})


def host_facts(card: dict[str, Any]) -> dict[str, Any]:
  """What must be equal on all hosts of a job: the card, this code, the kind of machine."""
  sources = hashlib.sha256()
  root = pathlib.Path(__file__).parent.parent
  for path in sorted(root.rglob("*.py")):
    sources.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
  return _as_json(card) | {
    "code": sources.hexdigest()[:16],
    "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
  }


def _model(card) -> dict[str, Any]:
  """A card's model with today's names of its keys."""
  return _as_json(model_config(card).to_dict())


def _as_json(value: Any) -> Any:
  """With JSON's types: tuples as lists."""
  return json.loads(json.dumps(value))


def _differences(old: Any, new: Any) -> list[str]:
  return [f"{path} is {was!r} there and {now!r} here" for path, was, now in differences(old, new)]


def _raise_if_different(workdir, old, new) -> None:
  changed = _differences(old, new)
  if changed:
    raise UserError(
      f"--workdir={workdir} holds another run: {'; '.join(changed)}. Use another "
      "--workdir, or that run's config"
    )
