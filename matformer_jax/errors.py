"""The one exception for mistakes a user can fix, and the words that help to fix them."""

from __future__ import annotations

from collections.abc import Iterable
import difflib
import importlib
import operator
from typing import Any

SEED_LIMIT = 2**32  # of JAX's random keys and Grain's shuffles


class UserError(ValueError):
  """A mistake in a config, a flag, a path or a corpus.

  The message names the offending value, where it came from and how to fix it.
  Command-line programs print it on one line and exit with code 1.
  """


class Diverged(UserError):
  """Training whose losses or gradients stopped being finite: a learning rate too high, mostly."""


def check_seed(seed: Any, source: str) -> int:
  """`seed` as an int.

  Args:
    seed: an integer of any type.
    source: where it came from, for the error.

  Raises:
    UserError: unless it is an integer in [0, SEED_LIMIT).
  """
  try:
    number = -1 if isinstance(seed, bool) else operator.index(seed)
  except TypeError:
    number = -1
  if not 0 <= number < SEED_LIMIT:
    raise UserError(f"{source}={seed!r} must be an integer from 0 to {SEED_LIMIT - 1} (32 bits)")
  return number


def nearest(word: str, known: Iterable[str]) -> str:
  """`; did you mean 'x'?` for the known word that resembles it most; empty where none does."""
  near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f"; did you mean {near[0]!r}?" if near else ""


def did_you_mean(key: str, known: Iterable[str]) -> str:
  """`; did you mean 'x'?` for the nearest known key, else the list of keys."""
  return nearest(key, known) or f"; known keys: {', '.join(sorted(known))}"


def import_extra(module: str, needed_by: str, extra: str) -> Any:
  """A module of a package that only one of this project's extras installs.

  Raises:
    UserError: if it is not installed, with what needs it and the extra that brings it.
  """
  try:
    return importlib.import_module(module)
  except ImportError:
    name = module.partition(".")[0]
    package = {"sklearn": "scikit-learn", "lm_eval": "lm-eval"}.get(name, name)
    raise UserError(f"{needed_by} needs {package}: pip install 'matformer_jax[{extra}]'") from None


def first_line(e: BaseException, limit: int = 300) -> str:
  """The first line of an error's text, which can be pages long; its type where it has none."""
  lines = str(e).strip().splitlines()
  return lines[0][:limit] if lines else type(e).__name__
