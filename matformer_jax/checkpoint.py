"""Checkpoints: Orbax for the bytes, our own manifest for the trust.

A step directory holds four Orbax items: `params`, `opt_state`, `data` (JSON state
of the data source) and `meta` (JSON: step, metrics, model card, manifest). The
manifest has every leaf's shape, dtype and checksum; every restore verifies it,
since Orbax alone returns silently wrong values after a flipped bit.

The checksum is computed on device from the bits and global positions of a leaf's
elements, so it does not depend on how, or on how many hosts, the leaf is sharded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import warnings
from typing import Any, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from matformer_jax.errors import UserError
from matformer_jax.sharding import path_names

STEPS_DIR = "checkpoints"
DAMAGED_DIR = "checkpoints_damaged"
CARD_FILE = "config.json"
FORMAT = 1


class DamagedCheckpoint(UserError):
  """A checkpoint that is unreadable or fails verification; names the leaf or item."""


# ------------------------------------------------------------------ manifest


def _leaf_checksum(x: jax.Array) -> jax.Array:
  """Two uint32 sums over elements of bits x odd hash(position); a flipped bit changes both."""
  itemsize = np.dtype(x.dtype).itemsize
  if itemsize == 8:
    halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return _leaf_checksum(halves)
  bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[itemsize])
  bits = bits.astype(jnp.uint32)
  position, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    position += iota * np.uint32(stride % 2**32)
    stride *= x.shape[axis]
  sums = []
  for seed in (0x9E3779B9, 0x85EBCA6B):
    h = position ^ np.uint32(seed)
    h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    sums.append(jnp.sum(bits * ((h ^ (h >> 16)) | 1), dtype=jnp.uint32))
  return jnp.stack(sums)


_checksums = jax.jit(lambda tree: jax.tree.map(_leaf_checksum, tree))


def manifest(tree) -> dict[str, dict[str, Any]]:
  """{leaf path: {shape, dtype, checksum}} of a tree of arrays."""
  sums = jax.device_get(_checksums(tree))
  result = {}
  for (path, leaf), (_, checksum) in zip(jax.tree_util.tree_leaves_with_path(tree),
                                         jax.tree_util.tree_leaves_with_path(sums)):
    result["/".join(path_names(path))] = {
        "shape": list(leaf.shape), "dtype": str(leaf.dtype),
        "checksum": f"{int(checksum[0]):08x}{int(checksum[1]):08x}"}
  return result


def _compare(found: Mapping, expected: Mapping, keys: Sequence[str], where: str) -> None:
  for path in expected:
    if path not in found:
      raise DamagedCheckpoint(f"{where}: leaf {path} is missing")
  for path in found:
    if path not in expected:
      raise DamagedCheckpoint(f"{where}: leaf {path} is not part of this model")
  for path, want in expected.items():
    for key in keys:
      if found[path][key] != want[key]:
        raise DamagedCheckpoint(f"{where}: leaf {path} has {key} {found[path][key]}, "
                                f"expected {want[key]}")


def _abstract_manifest(tree) -> dict[str, dict[str, Any]]:
  return {"/".join(path_names(path)): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _seal(meta: Mapping[str, Any]) -> str:
  body = {k: v for k, v in meta.items() if k != "seal"}
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------- reading


def steps(workdir: str | os.PathLike) -> list[int]:
  """Numbers of the step directories under `workdir`, oldest first, damaged or not."""
  root = pathlib.Path(workdir) / STEPS_DIR
  if not root.is_dir():
    return []
  return sorted(int(p.name) for p in root.iterdir() if p.name.isdecimal() and p.is_dir())


def read_meta(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
  """The `meta` item of a step.

  Raises:
    DamagedCheckpoint: if it is missing, unreadable, or its seal does not match.
  """
  path = pathlib.Path(workdir) / STEPS_DIR / str(step) / "meta" / "metadata"
  try:
    meta = json.loads(path.read_bytes())
    if meta["seal"] != _seal(meta) or meta["step"] != step:
      raise ValueError("its content does not match its seal")
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise DamagedCheckpoint(f"checkpoint {path.parent.parent}: meta is unreadable ({e})") from e
  return meta


def read_card(workdir: str | os.PathLike) -> dict[str, Any]:
  """The run's config.json, or where that is unreadable the newest checkpoint's copy.

  Raises:
    UserError: if the directory holds neither.
  """
  path = pathlib.Path(workdir) / CARD_FILE
  try:
    card = json.loads(path.read_bytes())
    if not {"model", "identity", "config"} <= card.keys():
      raise ValueError("keys are missing")
    return card
  except (OSError, ValueError, AttributeError) as e:
    problem = e
  for step in reversed(steps(workdir)):
    try:
      card = read_meta(workdir, step)["card"]
    except DamagedCheckpoint:
      continue
    _warn(f"{path} is unreadable ({problem}); using the copy in checkpoint {step}")
    return card
  raise UserError(f"{workdir} is not a run: {path} cannot be read ({problem}); give the --workdir "
                  "of a training run")


def restore(workdir: str | os.PathLike, step: int, items: Mapping[str, Any]):
  """Restores and verifies items of one step.

  Args:
    workdir: the run's directory.
    step: a number out of `steps(workdir)`.
    items: item name -> tree of `jax.ShapeDtypeStruct` with shardings: any mesh.

  Returns:
    ({item: tree of arrays}, meta, data): `data` is the data source's state.

  Raises:
    DamagedCheckpoint: naming the leaf that is missing, extra, reshaped or damaged.
  """
  where = f"checkpoint {pathlib.Path(workdir) / STEPS_DIR / str(step)}"
  meta = read_meta(workdir, step)
  for name, abstract in items.items():
    _compare(meta["manifest"][name], _abstract_manifest(abstract), ("shape", "dtype"),
             f"{where}, {name}")
  args = {name: ocp.args.StandardRestore(abstract) for name, abstract in items.items()}
  path = (pathlib.Path(workdir) / STEPS_DIR / str(step)).absolute()
  try:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      restored = reader.restore(path, args=ocp.args.Composite(data=ocp.args.JsonRestore(), **args))
  except Exception as e:  # Orbax and tensorstore raise many types for damaged files
    raise DamagedCheckpoint(f"{where}: {_first_line(e)}") from e
  for name in items:
    _compare(manifest(restored[name]), meta["manifest"][name], ("shape", "dtype", "checksum"),
             f"{where}, {name}")
  if restored["data"] != meta["data"]:
    raise DamagedCheckpoint(f"{where}: data state does not match the manifest")
  return {name: restored[name] for name in items}, meta, restored["data"]


def restore_newest(workdir: str | os.PathLike, items: Mapping[str, Any], repair: bool):
  """Restores the newest step that verifies; as `restore`, or None if there is no step.

  Steps that do not verify are skipped with a warning and, with `repair`, moved to
  `checkpoints_damaged/`, so that later saves of the same number are not blocked.
  """
  if repair:
    root = pathlib.Path(workdir) / STEPS_DIR
    for leftover in root.iterdir() if root.is_dir() else ():
      if ".orbax-checkpoint-tmp" in leftover.name:
        _warn(f"half-written {leftover} set aside as {set_aside(leftover)}")
  for step in reversed(steps(workdir)):
    try:
      return restore(workdir, step, items)
    except DamagedCheckpoint as e:
      path = pathlib.Path(workdir) / STEPS_DIR / str(step)
      _warn(f"{e}; " + (f"set aside as {set_aside(path)}" if repair else "skipped"))
  return None


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Moves a damaged file or step out of the way, into the run's checkpoints_damaged/."""
  run = path.parent.parent if path.parent.name == STEPS_DIR else path.parent
  root = run / DAMAGED_DIR
  root.mkdir(exist_ok=True)
  target, n = root / path.name, 1
  while target.exists():
    target, n = root / f"{path.name}.{n}", n + 1
  path.rename(target)
  return target


def _warn(message: str) -> None:
  warnings.warn(message, stacklevel=3)


def _first_line(e: Exception) -> str:
  """The reason in a tensorstore or Orbax error, which can be pages long."""
  text = str(e).strip()
  known = re.search("No space left on device|Disk quota exceeded|Read-only file system|"
                    "Permission denied|File too large", text)
  if known:
    return known.group()
  return f"{type(e).__name__}: {text.splitlines()[0][:300] if text else ''}"


# ------------------------------------------------------------------- writing


@dataclasses.dataclass
class _KeepLastAndBest(checkpoint_managers.PreservationPolicy):
  """Keeps the last `last` steps and the `best` ones by our own recorded metric."""

  last: int
  best: int
  metric: dict[int, float]

  def should_preserve(self, checkpoints, *, context):
    numbers = [c.step for c in checkpoints]
    scored = sorted((s for s in numbers if s in self.metric), key=self.metric.get)
    keep = set(numbers[-self.last:]) | set(scored[:self.best])
    return [s in keep for s in numbers]


class Writer:
  """Saves steps of a run asynchronously; keeps the last few and the best."""

  def __init__(self, workdir: str | os.PathLike, keep_last: int, keep_best: int,
               card: Mapping[str, Any]):
    self._root = pathlib.Path(workdir).absolute() / STEPS_DIR
    self._card = dict(card)
    self._metric: dict[int, float] = {}
    for step in steps(workdir):
      try:
        metric = read_meta(workdir, step)["metric"]
      except DamagedCheckpoint:
        continue
      if metric is not None:
        self._metric[step] = metric
    try:
      self._manager = ocp.CheckpointManager(
          self._root, options=ocp.CheckpointManagerOptions(
              preservation_policy=_KeepLastAndBest(keep_last, keep_best, self._metric)))
    except OSError as e:
      raise self._failed(e) from e

  def save(self, step: int, params, opt_state, data: Mapping[str, Any],
           extra: Mapping[str, Any] | None = None, metric: float | None = None) -> None:
    """Starts saving; returns once the arrays may be overwritten.

    Args:
      step: steps done. Saving a step that exists already does nothing.
      params, opt_state: trees of arrays on any mesh.
      data: JSON state of the data source.
      extra: more JSON for `meta`.
      metric: lower is better; ranks the step for `keep_best`.

    Raises:
      UserError: if this or the previous save could not be written.
    """
    if step in self._manager.all_steps():
      return
    meta = {"format": FORMAT, "step": step, "metric": metric, "data": dict(data),
            "card": self._card, "manifest": {"params": manifest(params),
                                             "opt_state": manifest(opt_state)}, **(extra or {})}
    meta["seal"] = _seal(meta)
    if metric is not None:
      self._metric[step] = metric
    try:
      saved = self._manager.save(step, force=True, args=ocp.args.Composite(
          params=ocp.args.StandardSave(params), opt_state=ocp.args.StandardSave(opt_state),
          meta=ocp.args.JsonSave(meta), data=ocp.args.JsonSave(dict(data))))
    except Exception as e:
      raise self._failed(e) from e
    if not saved:
      raise UserError(f"checkpoint of step {step} was refused: {self._root} already holds "
                      f"step {self._manager.latest_step()}; use another --workdir")

  def wait(self) -> None:
    """Blocks until the last save is on disk. Raises UserError if it could not be written."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as e:
      raise self._failed(e) from e

  def close(self) -> None:
    """Waits for the last save and releases Orbax's threads."""
    self.wait()
    self._manager.close()

  def _failed(self, e: Exception) -> UserError:
    return UserError(f"cannot write checkpoints under {self._root} ({_first_line(e)}); free "
                     "space or choose another --workdir. Checkpoints saved before are intact")
