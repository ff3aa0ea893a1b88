"""Calling the package's programs from an experiment."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys
from typing import Any

from matformer_jax.checkpoints import checkpoint
from matformer_jax.errors import UserError


def run(module: str, *args: str | os.PathLike) -> None:
  """`python -m matformer_jax.MODULE ARGS`, shown. Raises UserError if it fails."""
  command = [sys.executable, "-m", f"matformer_jax.{module}", *map(str, args)]
  print(f"\n$ python {shlex.join(command[1:])}", flush=True)
  code = subprocess.run(command).returncode
  if code:
    raise UserError(
      f"the command above ended with {code}; fix what it reports and run this again; "
      "finished work is kept"
    )


def overrides() -> list[str]:
  """--config and its overrides, as this program was given them."""
  return [arg for arg in sys.argv[1:] if arg.startswith("--config")]


def measured(
  workdir: pathlib.Path,
  file: str,
  module: str,
  *args: str | os.PathLike,
  source: str | None = None,
) -> Any:
  """What a program writes to `file` in `workdir`.

  It is called where the file is missing, is not of the newest step, or is of another source.

  Args:
    source: the program's --source, if it is to have one.
  """
  path = workdir / file

  def is_fresh(found: dict[str, Any]) -> bool:
    newest = checkpoint.steps(workdir)[-1]
    return found["step"] == newest and (source is None or found["source"] == source)

  if not path.exists() or not is_fresh(json.loads(path.read_text())):
    run(module, f"--workdir={workdir}", *([f"--source={source}"] if source else []), *args)
  return json.loads(path.read_text())
