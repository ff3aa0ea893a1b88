"""What all command-line programs share: flags, errors, exit codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import errno
import os
import re
import select
import signal
import sys
from typing import NoReturn
import warnings

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from matformer_jax import config_files, runtime, storage
from matformer_jax.config_keys import Config
from matformer_jax.errors import SEED_LIMIT, UserError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_CLOSED_PIPE = 128 + signal.SIGPIPE  # what a shell shows of a tool that `| head` ended

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


def read_config(flag) -> Config:
  """The parsed config.

  Raises:
    UserError: if --config is missing.
  """
  if flag.value is None:
    raise UserError("--config is missing; give for example --config=configs/matlm.py:quickstart")
  return flag.value


def define_seed(help_text: str) -> flags.FlagHolder[int]:
  """Defines --seed, by default 0."""
  return flags.DEFINE_integer("seed", 0, help_text, lower_bound=0, upper_bound=SEED_LIMIT - 1)


def define_step() -> flags.FlagHolder[int | None]:
  """Defines --step of a program that loads a model."""
  return flags.DEFINE_integer("step", None, "Checkpoint; default the newest that verifies.")


def define_source() -> flags.FlagHolder[str | None]:
  """Defines --source of a program that evaluates."""
  return flags.DEFINE_string(
    "source",
    None,
    "Other data to measure on, e.g. text:GLOB: what training on it would hold out; default that "
    "of the training.",
  )


def define_sample() -> tuple[flags.FlagHolder[int | None], flags.FlagHolder[int | None]]:
  """Defines --batches and --batch_size of a program that evaluates."""
  return (
    flags.DEFINE_integer(
      "batches",
      None,
      "Validation batches; 0 is the whole split; default the sample that training measures.",
      lower_bound=0,
    ),
    flags.DEFINE_integer(
      "batch_size", None, "Windows or images at a time; default as in training.", lower_bound=1
    ),
  )


def check(argv: list[str]) -> None:
  """Raises UserError for stray arguments."""
  if len(argv) > 1:
    raise UserError(
      f"unexpected argument {argv[1]!r}; flags are --name=value, quoted where the "
      "value holds spaces or '*'"
    )


def required(flag: flags.FlagHolder, what: str = "") -> str:
  """The value of a flag, by default of a directory. Raises UserError where it is missing."""
  if not flag.value:
    what = what or f"a directory, e.g. --{flag.name}=runs/mine"
    raise UserError(f"--{flag.name} is missing; give {what}")
  return flag.value


def fail(message: str) -> NoReturn:
  """Prints one line to stderr and exits with code 1."""
  print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
  sys.exit(EXIT_ERROR)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
  """Runs `main` under absl and exits.

  User mistakes become one line and exit code 1. Two ways of ending print nothing:
  Ctrl-C (exit code 130), and a reader that closes the pipe, as in `| head` (141).
  """

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
      sys.stdout.flush()  # here, where an error can still be handled
      return code
    except UserError as e:
      fail(str(e))
    except Exception as e:
      if storage.is_refusal(e):
        fail(str(storage.refusal(e)))
      if not isinstance(e, OSError) or e.errno not in _DISK_ERRORS:
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
  with quiet_ends():
    app.run(guarded, flags_parser=parse)
  sys.exit()


@contextlib.contextmanager
def quiet_ends() -> Iterator[None]:
  """Exits silently on Ctrl-C, and when the reader of the output is gone."""
  if sys.stdout is None:  # closed from the start: `>&-`
    sys.stdout = open(os.devnull, "w")
  try:
    yield
  except KeyboardInterrupt:
    sys.exit(EXIT_INTERRUPTED)
  except BrokenPipeError:
    if not (_reader_is_gone(sys.stdout) or _reader_is_gone(sys.stderr)):
      raise  # of another pipe
    sys.exit(EXIT_CLOSED_PIPE)
  finally:
    _drop_unwritable_output()


def _reader_is_gone(stream) -> bool:
  with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, or no file behind it
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
  return False


def _drop_unwritable_output() -> None:
  """Python writes what is left at exit, and would complain of an error that has been handled."""
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
