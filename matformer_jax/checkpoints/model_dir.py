"""A model directory that no training run wrote: extracted, or imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import os
import pathlib
import shutil
from typing import Any

from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint
from matformer_jax.errors import UserError


def check_free(out: pathlib.Path) -> None:
  """Raises UserError where a new model directory cannot go."""
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} exists already and is not empty; give a new directory")


def write(
  out: pathlib.Path,
  card: Mapping[str, Any],
  params,
  step: int,
  add_files: Callable[[pathlib.Path], None],
) -> None:
  """Writes card, weights and checksums; aside first, so that a kill leaves nothing that looks
  like a model.

  Args:
    out: a directory that does not exist yet, or is empty.
    add_files: writes what else belongs to the model, such as a tokenizer, into a directory.
  """
  check_free(out)
  temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
  temporary.mkdir(parents=True)
  try:
    add_files(temporary)
    cards.write(temporary, dict(card))
    writer = checkpoint.Writer(temporary, keep_last=1, keep_best=0, card=card)
    writer.save(step, params, None, {"step": step})
    writer.close()
    if out.exists():
      out.rmdir()
    temporary.rename(out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
