"""Finding and loading config files: a path, or the name of one that is shipped."""

from __future__ import annotations

import os
import pathlib
import runpy
import traceback
from typing import cast

import ml_collections

from matformer_jax.config_keys import Config
from matformer_jax.errors import UserError, nearest

_HERE = pathlib.Path(__file__).resolve().parent
# Inside the package where a wheel is installed, beside it in a checkout.
DIRECTORY = next((d for d in (_HERE / "configs", _HERE.parent / "configs") if d.is_dir()), _HERE)


def get_config(spec: str | os.PathLike) -> Config:
  """Loads a config, as `--config` does.

  Args:
    spec: `FILE[:ROW]`. FILE is the path of a Python file that defines `get_config(row)`, or
      the name of a shipped config, from any directory: `matlm:tiny`, `configs/matlm.py:tiny`.
      An existing file wins over a name. Without ROW the file's default row is taken.

  Returns:
    The row's config, every key of which may be changed.

  Raises:
    UserError: if there is no such file or row, or the file cannot be loaded.
  """
  file, _, row = os.fspath(spec).partition(":")
  path = _find(file)
  try:
    module = runpy.run_path(str(path))
  except Exception as e:
    raise UserError(f"config {file!r} cannot be loaded: {_reason(e)}") from e
  if not callable(module.get("get_config")):
    raise UserError(f"config {file!r} does not define get_config(row)")
  try:
    config = module["get_config"](*[row] if row else [])
  except Exception as e:
    rows = module.get("ROWS", ())
    if isinstance(e, ValueError) and row not in rows:
      raise UserError(f"{e}{nearest(row, rows)}") from e
    raise UserError(f"config {os.fspath(spec)!r} cannot be made: {_reason(e)}") from e
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f"config {os.fspath(spec)!r} is a {type(config).__name__}; get_config(row) must return an "
      "ml_collections.ConfigDict"
    )
  return cast(Config, config)


def names() -> list[str]:
  """Names of the shipped configs."""
  return sorted(p.stem for p in DIRECTORY.glob("*.py") if p.stem not in ("common", "__init__"))


def _find(file: str) -> pathlib.Path:
  path = pathlib.Path(file)
  if path.is_file():
    return path
  name = path.stem
  if name in names() and file in (name, f"{name}.py", f"configs/{name}.py"):
    return DIRECTORY / f"{name}.py"
  raise UserError(
    f"config {file!r} is neither a file nor one of the shipped configs, "
    f"{' and '.join(names())}{nearest(name, names())}"
  )


def _reason(error: Exception) -> str:
  """What went wrong and where, in one line: a config file is its user's own code."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
