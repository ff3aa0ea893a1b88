"""What all command-line programs share: flags, errors, exit codes."""

from __future__ import annotations

from collections.abc import Callable
import errno
import os
import re
import signal
import sys
from typing import Any, NoReturn
import warnings

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from matformer_jax import config_files, runtime
from matformer_jax.errors import UserError

EXIT_ERROR = 1
EXIT_CLOSED_PIPE = 128 + signal.SIGPIPE

BUDGET_HELP = (
  "Choose the Mix'n'Match granularity that fits: 0.6x (of XL's parameters), 620M, "
  "nonembedding:245.5M, ffn:94M, flops:1.2G, or with a profile of this device "
  "latency:15ms (a forward pass), decode:0.4ms (a token)."
)

_DISK_ERRORS = (
  errno.ENOSPC,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.ENOTDIR,
  errno.EDQUOT,
  errno.EFBIG,
  errno.ENOENT,
  errno.EEXIST,
)


def define_config(required: bool = True):
  """Defines --config=FILE[:ROW] with --config.key=value overrides; FILE is a path or a name."""
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config and row: a shipped one by name, matlm:quickstart, or a file, "
    "configs/matlm.py:quickstart. Any key can be overridden: --config.optim.peak_lr=1e-3."
    + ("" if required else " Optional."),
  )
  flags.FLAGS["config"].parser = _ConfigParser()
  flags.declare_key_flag("config")
  return holder


class _ConfigParser(flags.ArgumentParser):
  """Finds what `get_config` finds; config_flags knows only paths."""

  def parse(self, argument: str) -> ml_collections.ConfigDict:
    return config_files.get_config(argument).lock()

  def flag_type(self) -> str:
    return "config"


def read_config(flag) -> Any:
  """The parsed config, a ConfigDict; Any, since its keys are typed nowhere.

  Raises:
    UserError: if --config is missing.
  """
  if flag.value is None:
    raise UserError("--config is missing; give for example --config=configs/matlm.py:quickstart")
  return flag.value


def check(argv: list[str]) -> None:
  """Raises UserError for stray arguments."""
  if len(argv) > 1:
    raise UserError(
      f"unexpected argument {argv[1]!r}; flags are --name=value, quoted where the "
      "value holds spaces or '*'"
    )


def required(flag: flags.FlagHolder) -> str:
  """The value of a directory flag. Raises UserError where it is missing."""
  if not flag.value:
    raise UserError(f"--{flag.name} is missing; give a directory, e.g. --{flag.name}=runs/mine")
  return flag.value


def fail(message: str) -> NoReturn:
  """Prints one line to stderr and exits with code 1."""
  print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
  sys.exit(EXIT_ERROR)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
  """Runs `main` under absl; user mistakes become one line and exit code 1."""

  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except flags.Error as e:
      fail(str(e))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      fail(_unknown_key(argv, e))

  def guarded(argv):
    try:
      code = main(argv)
      sys.stdout.flush()  # here, where a closed pipe can still be answered
      return code
    except UserError as e:
      fail(str(e))
    except BrokenPipeError:
      # Whoever read the output has enough: as other tools do, end without a word.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(EXIT_CLOSED_PIPE)
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr, flush=True)
      sys.exit(128 + signal.SIGINT)
    except OSError as e:
      if e.errno not in _DISK_ERRORS:
        raise
      fail(
        f"{e.filename or 'file'}: {e.strerror}; free space, or choose a directory "
        "that can be written"
      )

  runtime.keep_freed_memory()  # here, since it must come before JAX's first use
  warnings.showwarning = _print_warning
  sys.unraisablehook = _ignore_closed_event_loops
  # Orbax logs every phase, and tracebacks of errors that we report in one line.
  logging.set_verbosity(logging.FATAL)
  app.run(guarded, flags_parser=parse)


def _unknown_key(argv: list[str], e: Exception) -> str:
  """One line for what config_flags raises at an override it does not know."""
  near = re.search(r'Did you mean "([^"]+)" instead of "([^"]+)"', str(e))
  if near:
    flag = next((a for a in argv if near.group(2) in a), "--config.*")
    return f"unknown config key {near.group(2)!r} in {flag}; did you mean {near.group(1)!r}?"
  names = [a for a in argv if a.startswith("--config.")]
  return f"unknown config key in {' '.join(names)} ({' '.join(str(e).split())})"


def _ignore_closed_event_loops(unraisable) -> None:
  """After a failed save, writes still under way find Orbax's event loop closed."""
  if "Event loop is closed" not in str(unraisable.exc_value):
    sys.__unraisablehook__(unraisable)


def _print_warning(message, category, filename, lineno, file=None, line=None):
  print(f"warning: {message}", file=sys.stderr, flush=True)
