"""Process-wide settings of the machine a program runs on."""

from __future__ import annotations

from collections.abc import Mapping
import ctypes
import glob
import json
import math
import os
import platform
import sys
from typing import Any
import warnings

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
  """On a CPU-only machine, asks glibc to keep freed memory for the next call.

  XLA's CPU backend allocates a program's temporary buffers at every call;
  returned to the kernel in between, each call pays a page fault per 4 KiB (a train
  step takes 1.4x, an attention-sized buffer 2-3x). Must run before JAX starts its
  threads, since their memory arenas are fixed from then on.

  Returns:
    Whether it did: False with an accelerator, or without glibc's mallopt.
  """
  if any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*")):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return False
  return all(
    mallopt(option, value) == 1
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
  )


def enable_compilation_cache() -> str:
  """Turns on JAX's persistent compilation cache and returns its directory.

  `JAX_COMPILATION_CACHE_DIR` wins; else `cache_dir()/jit`.
  """
  import jax

  chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  path = chosen or os.path.join(cache_dir(), "jit")
  jax.config.update("jax_compilation_cache_dir", path)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  return path


def compile_fast() -> None:
  """Tells XLA's CPU backend to compile without optimisation, here and in processes started from
  here: for programs that run only a few times. Must come before JAX's first use."""
  flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def to_json(value: Any, indent: int | None = None) -> str:
  """JSON of plain values; a number that is not finite, which JSON does not have, becomes null."""

  def finite(value):
    if isinstance(value, float):
      return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
      return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value

  return json.dumps(finite(value), indent=indent, allow_nan=False)


def say(message: str) -> None:
  """Prints progress to standard output, once in a job of several processes."""
  import jax

  if jax.process_index() == 0:
    print(message, flush=True)


def warn(message: str) -> None:
  """Warns of something that does not stop the program, once in a job of several processes."""
  import jax

  if jax.process_index() == 0:
    warnings.warn(message, stacklevel=3)


def say_here(message: str) -> None:
  """Prints to standard error of whichever process calls it."""
  print(message, file=sys.stderr, flush=True)


def cache_dir() -> str:
  """Where tokenizers, token stores and compiled programs are kept between runs.

  `MATFORMER_CACHE`, else `XDG_CACHE_HOME`/matformer_jax, else ~/.cache/matformer_jax.
  """
  base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return os.environ.get("MATFORMER_CACHE") or os.path.join(base, "matformer_jax")


def cpu_model() -> str:
  """The CPU's name, or its architecture where the system does not tell."""
  try:
    with open("/proc/cpuinfo") as f:
      return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.machine()


def cpu_count() -> int:
  """CPUs this process may run on."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
