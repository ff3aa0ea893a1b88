"""A model directory that no training run wrote: extracted, or imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
from typing import Any

from matformer_jax import storage
from matformer_jax.checkpoints import card as cards
from matformer_jax.checkpoints import checkpoint
from matformer_jax.errors import UserError


def check_free(out: storage.Path) -> None:
  """Raises UserError where a new model directory cannot go."""
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} exists already and is not empty; give a new directory")


def write(
  out: storage.Path,
  card: Mapping[str, Any],
  params,
  step: int,
  add_files: Callable[[storage.Path], None],
) -> None:
  """Writes card, weights and checksums; aside first, so that a kill leaves nothing that looks
  like a model. In a bucket, which cannot rename, the card and the commit marker come last.

  Args:
    out: a directory that does not exist yet, or is empty.
    add_files: writes what else belongs to the model, such as a tokenizer, into a directory.
  """
  check_free(out)
  with _new_directory(out) as directory:
    add_files(directory)
    writer = checkpoint.Writer(directory, keep_last=1, keep_best=0, card=card)
    writer.save(step, params, None, {"step": step})
    writer.close()
    cards.write(directory, dict(card))


@contextlib.contextmanager
def _new_directory(out: storage.Path) -> Iterator[storage.Path]:
  """Where to write what becomes `out`: in a bucket `out` itself, so that weights are sent once."""
  if storage.is_bucket(out):
    yield out
    return
  with storage.written_aside(out) as temporary:
    temporary.mkdir()
    yield temporary
