"""Checkpoints: Orbax for the bytes, our own manifest for the trust.

A step directory holds four Orbax items: `params`, `opt_state`, `data` (JSON state
of the data source) and `meta` (JSON: step, metrics, model card, manifest). The
manifest has every leaf's shape, dtype and checksum; every restore verifies it,
since Orbax alone returns silently wrong values after a flipped bit.

So does every layer's share of every granularity, so that a submodel can be read, and
verified, without reading the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import pathlib
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
import tensorstore

from matformer_jax import storage
from matformer_jax.checkpoints import checksums, manifest
from matformer_jax.config import ModelConfig, Span, model_config
from matformer_jax.errors import UserError, first_line
from matformer_jax.hosts.multihost import Hosts
from matformer_jax.runtime import warn
from matformer_jax.sharding import logical_axes, path_names

STEPS_DIR = "checkpoints"
DAMAGED_DIR = "checkpoints_damaged"
_COMMITTED = "commit_success.txt"  # in a bucket, where nothing can be renamed: written last
FORMAT = checksums.FORMAT
MIN_CHUNK_BYTES = 2**20  # on disk; smaller ones cost more in files than they save in reading


BEST_FILE = "validation.json"  # beside STEPS_DIR: validation loss by step, for `keep_best`


class DamagedCheckpoint(UserError):
  """A checkpoint whose content is missing, truncated or altered; names the leaf or item."""


class OtherCheckpoint(UserError):
  """A healthy checkpoint of something else: a leaf is missing, extra or of another shape."""


class NothingRestored(UserError):
  """A run has checkpoints, and all of them are damaged."""


# ---------------------------------------------------------------------- meta


def _compare(
  found: Mapping, expected: Mapping, keys: Sequence[str], where: str, error: type[UserError]
) -> None:
  for path in expected:
    if path not in found:
      raise error(f"{where}: leaf {path} is missing")
  for path in found:
    if path not in expected:
      raise error(f"{where}: leaf {path} is not part of this model")
  for path, want in expected.items():
    for key in keys:
      if found[path][key] != want[key]:
        raise error(f"{where}: leaf {path} has {key} {found[path][key]}, expected {want[key]}")


def _seal(meta: Mapping[str, Any]) -> str:
  body = {k: v for k, v in meta.items() if k != "seal"}
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------- reading


def steps(workdir: str | os.PathLike) -> list[int]:
  """Numbers of the step directories under `workdir`, oldest first, damaged or not."""
  return sorted(int(p.name) for p in _step_directories(workdir) if _is_committed(p))


def _step_directories(workdir: str | os.PathLike) -> list[storage.Path]:
  root = storage.path(workdir) / STEPS_DIR
  if not root.is_dir():
    return []
  return [p for p in root.iterdir() if p.name.isdecimal() and p.is_dir()]


def _is_committed(step: storage.Path) -> bool:
  """Whether a step was written to its end, as far as its directory's name does not say it."""
  return not storage.is_bucket(step) or (step / _COMMITTED).exists()


def _half_written(workdir: str | os.PathLike) -> list[storage.Path]:
  """What a save that was cut off has left."""
  root = storage.path(workdir) / STEPS_DIR
  if storage.is_bucket(root):
    return [p for p in _step_directories(workdir) if not _is_committed(p)]
  return [p for p in root.iterdir() if ".orbax-checkpoint-tmp" in p.name] if root.is_dir() else []


def read_meta(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
  """The `meta` item of a step.

  Raises:
    DamagedCheckpoint: if it is missing, unreadable, or its seal does not match.
  """
  path = storage.path(workdir) / STEPS_DIR / str(step) / "meta" / "metadata"
  try:
    meta = json.loads(path.read_bytes())
    if meta["seal"] != _seal(meta) or meta["step"] != step:
      raise ValueError("its content does not match its seal")
  except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as e:
    raise DamagedCheckpoint(f"checkpoint {path.parent.parent}: meta is unreadable ({e})") from e
  return meta


def restore(workdir: str | os.PathLike, step: int, items: Mapping[str, Any]):
  """Restores and verifies items of one step.

  Args:
    workdir: the run's directory.
    step: a number out of `steps(workdir)`.
    items: item name -> tree of `jax.ShapeDtypeStruct` with shardings: any mesh.

  Returns:
    ({item: tree of arrays}, meta, data): `data` is the data source's state.

  Raises:
    OtherCheckpoint: naming the leaf that is missing, extra or reshaped.
    DamagedCheckpoint: naming the leaf that cannot be read or fails its checksum.
    UserError: where the file system refuses to read, which says nothing of the checkpoint.
  """
  where = f"checkpoint {storage.path(workdir) / STEPS_DIR / str(step)}"
  meta = read_meta(workdir, step)
  for name, abstract in items.items():
    if name not in meta["manifest"]:
      raise OtherCheckpoint(f"{where} holds no {name}")
    _compare(
      meta["manifest"][name],
      manifest.describe(abstract),
      ("shape", "dtype"),
      f"{where}, {name}",
      OtherCheckpoint,
    )
  args = {name: ocp.args.StandardRestore(abstract) for name, abstract in items.items()}
  # Waiting for no other process: one that cannot read its share must not hang the others.
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
  )
  path = _for_tensorstore(workdir) / STEPS_DIR / str(step)
  try:
    with ocp.Checkpointer(
      ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
      ),
      multiprocessing_options=alone,
    ) as reader:
      restored = reader.restore(path, args=ocp.args.Composite(data=ocp.args.JsonRestore(), **args))
  except Exception as e:
    _raise_unreadable(e, where)
  for name in items:
    _compare(
      manifest.of(restored[name], meta["format"]),
      meta["manifest"][name],
      ("shape", "dtype", "checksum"),
      f"{where}, {name}",
      DamagedCheckpoint,
    )
  if restored["data"] != meta["data"]:
    raise DamagedCheckpoint(f"{where}: data state does not match the manifest")
  return {name: restored[name] for name in items}, meta, restored["data"]


def check_place(workdir: str | os.PathLike) -> storage.Path:
  """The path of a directory. Raises UserError where checkpoints cannot be in it."""
  path = storage.path(workdir)
  if storage.is_bucket(path) and not os.fspath(path).startswith("gs://"):
    raise UserError(
      f"{path}: checkpoints can be in gs:// or on a file system; Orbax does not write to s3://"
    )
  return path


def _for_tensorstore(directory: str | os.PathLike) -> storage.Path:
  """The absolute path of a directory, by a name that tensorstore does not change.

  It reads a backslash as a slash, so such a directory is named by its file descriptor.

  Raises:
    UserError: for a bucket in which checkpoints cannot be.
  """
  path = check_place(directory)
  if storage.is_bucket(path):
    return path
  path = path.absolute()
  return pathlib.Path(f"/proc/self/fd/{_descriptor(path)}") if "\\" in str(path) else path


@functools.cache
def _descriptor(path: pathlib.Path) -> int:
  path.mkdir(parents=True, exist_ok=True)
  return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def _raise_unreadable(e: Exception, where: str) -> NoReturn:
  """Raises what an exception of Orbax or tensorstore says about a checkpoint, if anything.

  They raise many types for missing, truncated and altered files. What is known to be about
  something else, such as memory, permissions or a lost peer, is no damage.
  """
  if isinstance(e, (MemoryError, jax.errors.JaxRuntimeError)):
    raise e
  refused = _file_system_reason(e)
  if refused and refused not in _MISSING:
    raise UserError(
      f"{where} cannot be read ({refused}); nothing was changed. Correct that and run again"
    ) from e
  raise DamagedCheckpoint(f"{where}: {_reason(e)}") from e


def restore_newest(
  workdir: str | os.PathLike, items: Mapping[str, Any], repair: bool, hosts: Hosts = Hosts()
):
  """Restores the newest step that verifies on all hosts; as `restore`, or None without any step.

  Newer steps that are damaged are skipped with a warning and, with `repair`, moved to
  `checkpoints_damaged/`, so that later saves of the same number are not blocked: once another
  one has verified, which shows that the fault is theirs. Steps half-written are moved too.

  Raises:
    NothingRestored: if there are steps and none can be restored; nothing is moved then.
    UserError: as `restore` for what is no damage.
  """
  root = storage.path(workdir) / STEPS_DIR
  if repair and hosts.first:
    for leftover in _half_written(workdir):
      warn(f"half-written {leftover} set aside as {set_aside(leftover)}")
  problems: dict[int, str] = {}
  for step in reversed(hosts.gather(steps(workdir))[0]):
    restored, problem = None, None
    try:
      restored = restore(workdir, step, items)
    except DamagedCheckpoint as e:
      problem = str(e)
    problem = next((p for p in hosts.gather(problem) if p), None)
    if problem is None:
      if hosts.first:
        for bad, why in problems.items():
          aside = f"set aside as {set_aside(root / str(bad))}" if repair else "skipped"
          warn(f"{why}; {aside}")
      hosts.barrier()
      return restored
    problems[step] = problem
  if problems:
    raise NothingRestored(
      f"none of the {len(problems)} checkpoints of {workdir} can be restored; nothing was moved. "
      f"Tried: {'; '.join(problems.values())}"
    )
  return None


class SliceReader:
  """Reads verified slices of a step's parameters, and of the files no more than those."""

  def __init__(self, workdir: str | os.PathLike, step: int, config: ModelConfig):
    self._meta = read_meta(workdir, step)
    self._where = f"checkpoint {storage.path(workdir) / STEPS_DIR / str(step)}"
    self._path = _for_tensorstore(workdir) / STEPS_DIR / str(step) / "params"
    self._config = config

  def read(self, names: tuple[str, ...], layers: slice, lengths: Mapping[str, int]) -> jax.Array:
    """Part of a leaf.

    Args:
      names: the leaf's path.
      layers: which of its layers; ignored by leaves that have none.
      lengths: {nested axis: how much of it}, from `ModelConfig.slice_lengths`.

    Raises:
      DamagedCheckpoint: if the leaf cannot be read, or the part fails its checksum.
    """
    name = "/".join(names)
    try:
      known = self._meta["manifest"]["params"][name]
      table = self._meta["slices"].get(name)
    except KeyError as e:
      raise DamagedCheckpoint(
        f"{self._where} has no {e} of {name}: an earlier version wrote it, or it is another "
        "model; resume its training for a few steps to write a new one"
      ) from e
    axes, shape = logical_axes(names), known["shape"]
    index = [layers if a == "layers" else slice(0, lengths.get(a, n)) for a, n in zip(axes, shape)]
    spec = {
      "driver": "zarr",
      "kvstore": {
        "driver": "ocdbt",
        "base": _kvstore(self._path),
        "path": ".".join(names),
      },
    }
    try:
      part = jnp.asarray(tensorstore.open(spec, open=True).result()[tuple(index)].read().result())
    except Exception as e:
      _raise_unreadable(e, f"{self._where}, leaf {name}")
    if table is None:
      wanted = [known["checksum"]]
    else:
      count = manifest.segments(names, shape, self._config).among_first(lengths)
      wanted = [text for row in table[layers] for text in row[:count]]
    start = tuple(i.start or 0 for i in index)
    found = checksums.part(part, tuple(shape), start, self._meta["format"])
    if checksums.to_hex(found) != checksums.add(wanted):
      raise DamagedCheckpoint(f"{self._where}: leaf {name} fails its checksum")
    return part


def _kvstore(directory: storage.Path) -> dict[str, Any]:
  """A directory for tensorstore; not as a URL, in which some characters mean something else."""
  if not storage.is_bucket(directory):
    return {"driver": "file", "path": f"{directory}/"}
  bucket, _, path = os.fspath(directory).removeprefix("gs://").partition("/")
  return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


def set_aside(path: storage.Path) -> storage.Path:
  """Moves a damaged file or step out of the way, into the run's checkpoints_damaged/."""
  run = path.parent.parent if path.parent.name == STEPS_DIR else path.parent
  target = _unused(run / DAMAGED_DIR / path.name)
  storage.move(path, target)
  return target


def set_run_aside(workdir: storage.Path, but: str) -> storage.Path | None:
  """Moves all of a run, `but` one file, into its checkpoints_damaged/run; None: there is none."""
  found = [path for path in workdir.iterdir() if path.name not in (but, DAMAGED_DIR)]
  if not found:
    return None
  target = _unused(workdir / DAMAGED_DIR / "run")
  target.mkdir()
  for path in found:
    storage.move(path, target / path.name)
  return target


def _unused(path: storage.Path) -> storage.Path:
  """`path`, or the first of `path.1`, `path.2`, ... that is not taken; in a directory that is."""
  path.parent.mkdir(exist_ok=True)
  target, n = path, 1
  while target.exists():
    target, n = path.with_name(f"{path.name}.{n}"), n + 1
  return target


def _reason(e: Exception) -> str:
  """The reason in a tensorstore or Orbax error, which can be pages long."""
  return _file_system_reason(e) or f"{type(e).__name__}: {first_line(e)}"


# What a file system may refuse a writer; tensorstore tells it in the text of other exceptions.
_FILE_SYSTEM_ERRORS = tuple(
  os.strerror(getattr(errno, name))
  for name in (
    *("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EIO", "ENOENT", "ENOTDIR"),
    *("EEXIST", "EISDIR", "ENAMETOOLONG", "EMFILE", "ENFILE", "ESTALE", "ENODEV", "ENXIO"),
  )
)
# What tensorstore says of a bucket.
_BUCKET_ERRORS = (
  *("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
  "RESOURCE_EXHAUSTED",
)


_MISSING = tuple(os.strerror(number) for number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR))


def _file_system_reason(e: BaseException) -> str | None:
  """What the file system, or bucket, refused, where an exception is about that; else None."""
  if isinstance(e, jax.errors.JaxRuntimeError):
    return None  # a collective that failed may quote anything
  if storage.is_refusal(e):
    return f"{type(e).__name__}: {first_line(e)}"
  return next((words for words in _FILE_SYSTEM_ERRORS + _BUCKET_ERRORS if words in str(e)), None)


# ------------------------------------------------------------------- writing


def _chunks(params, config: ModelConfig):
  """How leaves are cut on disk: layer by layer, and no coarser than the narrowest slice."""
  narrowest: Any = config.slice_lengths(Span(1, 0, 0))

  def chunk(path, leaf):
    axes = logical_axes(path_names(path))
    if axes[0] != "layers":
      return ocp.SaveArgs()
    lengths = [min(narrowest.get(a, n), n) for a, n in zip(axes[1:], leaf.shape[1:])]
    size = leaf.dtype.itemsize * math.prod(lengths)
    return ocp.SaveArgs(chunk_byte_size=max(size, MIN_CHUNK_BYTES), shard_axes=(0,))

  return jax.tree_util.tree_map_with_path(chunk, params)


@dataclasses.dataclass
class _KeepLastAndBest(checkpoint_managers.PreservationPolicy):
  """Keeps the last `last` steps and the `best` ones by our own recorded metric."""

  last: int
  best: int
  metric: dict[int, float]

  def should_preserve(self, checkpoints, *, context):
    numbers = [c.step for c in checkpoints]
    scored = sorted((s for s in numbers if s in self.metric), key=self.metric.__getitem__)
    keep = set(numbers[-self.last :]) | set(scored[: self.best])
    return [s in keep for s in numbers]


class Writer:
  """Saves steps of a run asynchronously; keeps the last few and the best."""

  def __init__(
    self, workdir: str | os.PathLike, keep_last: int, keep_best: int, card: Mapping[str, Any]
  ):
    self._root = _for_tensorstore(workdir) / STEPS_DIR
    self._card = dict(card)
    self._config = model_config(card)
    self._best_file = storage.path(workdir) / BEST_FILE
    self._metric = self._read_metrics(workdir)
    try:
      self._manager = ocp.CheckpointManager(
        self._root,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=_KeepLastAndBest(keep_last, keep_best, self._metric)
        ),
      )
    except OSError as e:
      self._explain(e)
      raise

  def save(
    self,
    step: int,
    params,
    opt_state,
    data: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
  ) -> None:
    """Starts saving; returns once the arrays may be overwritten.

    Args:
      step: steps done. Saving a step that exists already does nothing.
      params, opt_state: trees of arrays on any mesh; opt_state None saves a model that
        is not trained on.
      data: JSON state of the data source.
      extra: more JSON for `meta`.

    Raises:
      UserError: if this or the previous save could not be written.
    """
    if step in self._manager.all_steps():
      return
    trees = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items["params"] = ocp.args.StandardSave(params, _chunks(params, self._config))
    meta = {
      "format": FORMAT,
      "step": step,
      "data": dict(data),
      "card": self._card,
      "manifest": {name: manifest.of(tree) for name, tree in trees.items()},
      "slices": manifest.of_segments(params, self._config),
      **(extra or {}),
    }
    meta["seal"] = _seal(meta)
    try:
      saved = self._manager.save(
        step,
        force=True,
        args=ocp.args.Composite(
          meta=ocp.args.JsonSave(meta), data=ocp.args.JsonSave(dict(data)), **items
        ),
      )
    except Exception as e:
      self._explain(e)
      raise
    if not saved:
      raise UserError(
        f"checkpoint of step {step} was refused: {self._root} already holds "
        f"step {self._manager.latest_step()}; use another --workdir"
      )

  def record(self, step: int, metric: float) -> None:
    """Ranks a step, saved or about to be, for `keep_best`: the lower the better.

    One that is not finite is no rank.
    """
    if not math.isfinite(metric):
      return
    self._metric[step] = metric
    if jax.process_index() == 0:
      rows = {str(step): value for step, value in sorted(self._metric.items())}
      storage.replace_file(self._best_file, json.dumps(rows).encode())

  def _read_metrics(self, workdir: str | os.PathLike) -> dict[int, float]:
    """By step; of checkpoints of earlier versions from their meta."""
    found = {}
    for step in steps(workdir):
      with contextlib.suppress(DamagedCheckpoint):
        found[step] = read_meta(workdir, step).get("metric")
    with contextlib.suppress(OSError, ValueError, AttributeError):
      found |= {int(k): float(v) for k, v in json.loads(self._best_file.read_text()).items()}
    return {s: m for s, m in found.items() if m is not None and math.isfinite(m)}

  def wait(self) -> None:
    """Blocks until the last save is on disk. Raises UserError if it could not be written."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as e:
      self._explain(e)
      raise

  def close(self) -> None:
    """Waits for the last save and releases Orbax's threads."""
    self.wait()
    self._manager.close()

  def _explain(self, e: Exception) -> None:
    """Raises UserError if the file system is to blame; a lost peer or a bug is no user's matter."""
    reason = _file_system_reason(e)
    if reason:
      raise UserError(
        f"cannot write checkpoints under {self._root} ({reason}); free "
        "space or choose another --workdir. Checkpoints saved before are intact"
      ) from e
