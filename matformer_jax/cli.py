"""What all command-line programs share: flags, errors, exit codes."""

from __future__ import annotations

import errno
import sys
import warnings
from typing import Callable, NoReturn

from absl import app, flags
from ml_collections import config_flags

from matformer_jax.errors import UserError

EXIT_ERROR = 1
EXIT_PREEMPTED = 143  # 128 + SIGTERM

_DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
                errno.EDQUOT, errno.EFBIG, errno.ENOENT, errno.EEXIST)


def define_config(required: bool = True):
  """Defines --config=FILE.py[:ROW] with --config.key=value overrides."""
  return config_flags.DEFINE_config_file(
      "config", None, "Config file and row, e.g. configs/matlm.py:quickstart; any key can be "
      "overridden: --config.optim.peak_lr=1e-3." + ("" if required else " Optional."))


def read_config(flag):
  """The parsed config. Raises UserError where --config is missing or unreadable."""
  config = flag.value
  if config is None:
    raise UserError("--config is missing; give for example --config=configs/matlm.py:quickstart")
  if type(config).__name__ == "_ErrorConfig":  # what config_flags leaves for a bad file
    try:
      config.model
    except Exception as e:
      raise UserError(f"--config cannot be read: {' '.join(str(e).split())}") from None
  return config


def fail(message: str) -> NoReturn:
  """Prints one line to stderr and exits with code 1."""
  print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
  sys.exit(EXIT_ERROR)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
  """Runs `main` under absl; user mistakes become one line and exit code 1."""

  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except (flags.Error, UserError) as e:
      fail(str(e))
    except (AttributeError, KeyError, TypeError, ValueError, ImportError, OSError) as e:
      # config_flags raises these for an unknown key or an unreadable file.
      text = e.args[0] if e.args else str(e)
      text = str(text).replace('\\n', ' ')
      fail(f"in the --config flags: {text.strip(chr(39))}")

  def guarded(argv):
    try:
      return main(argv)
    except UserError as e:
      fail(str(e))
    except OSError as e:
      if e.errno not in _DISK_ERRORS:
        raise
      fail(f"{e.filename or 'file'}: {e.strerror}; free space, or choose a directory "
           "that can be written")

  warnings.showwarning = _print_warning
  app.run(guarded, flags_parser=parse)


def _print_warning(message, category, filename, lineno, file=None, line=None):
  print(f"warning: {message}", file=sys.stderr, flush=True)
