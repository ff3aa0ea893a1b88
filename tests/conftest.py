"""Shared fixtures. In-process tests see 8 virtual CPU devices; programs see one."""

import importlib.util
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "test-cache"  # token stores and compiled programs, kept between runs
os.environ["MATFORMER_CACHE"] = str(CACHE)
os.environ["JAX_PLATFORMS"] = "cpu"


def xla_flags(devices: int) -> str:
  """Virtual CPU devices, and LLVM's optimisations off: most of a test is compiling."""
  return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


# PYTHONPATH: a program out of tests/ would import whatever is installed, not this tree.
PROGRAM_ENV = {**os.environ, "XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
# Seconds after which a test gives up on what it waits for. No test may fail on a busy machine:
# it waits for what it is about, and asserts causes and orders, not seconds.
BACKSTOP_S = 1800
OPTIMISED = {"XLA_FLAGS": ""}  # for programs, as users run them
os.environ["XLA_FLAGS"] = xla_flags(8)

import jax
import pytest

from matformer_jax import runtime
from matformer_jax.config import MatLMConfig

runtime.enable_compilation_cache()


def get_config(row: str, file: str = "matlm"):
  """A row of configs/FILE.py, as --config would load it."""
  spec = importlib.util.spec_from_file_location(f"{file}_configs", ROOT / "configs" / f"{file}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(row)


def command(module: str, *args) -> list[str]:
  return [sys.executable, "-u", "-m", f"matformer_jax.{module}", *map(str, args)]


def run_program(
  module: str, *args, timeout: int = BACKSTOP_S, env=None
) -> subprocess.CompletedProcess:
  """Runs a command-line program from the repository root, as a user would."""
  return _run(command(module, *args), timeout, env)


def train_until_signal(step: int, signum: int, *args) -> subprocess.CompletedProcess:
  """Runs the train program, which gets a signal once it has recorded `step` (0: compiling)."""
  program = [sys.executable, "-u", *signalled(0, step, signum)]
  return _run([*program, *map(str, args)], BACKSTOP_S, None)


def signalled(process: int, step: int, signum: int) -> list[str]:
  """Arguments of Python: the train program, one process of which gets a signal at `step`."""
  path = ROOT / "tests" / "signalled_train.py"
  return [str(path), f"{process}:{step}:{int(signum)}"]


def _run(command: list[str], timeout: int, env) -> subprocess.CompletedProcess:
  return subprocess.run(
    command,
    cwd=ROOT,
    env={**PROGRAM_ENV, **(env or {})},
    capture_output=True,
    text=True,
    timeout=timeout,
  )


ONE_SIZE = "0/0/0/1"  # sampling: one program to compile, where a test is not about sizes


def train_args(workdir, **overrides) -> list[str]:
  """Arguments that train the tiny row; overrides as `optim__peak_lr=1e-3`."""
  return _args("matlm.py:tiny", workdir, overrides)


def digits_args(workdir, **overrides) -> list[str]:
  """The same, for the tiny MatViT."""
  return _args("matvit.py:digits", workdir, overrides)


def _args(row: str, workdir, overrides) -> list[str]:
  return [f"--config=configs/{row}", f"--workdir={workdir}"] + [
    f"--config.{k.replace('__', '.')}={v}" for k, v in overrides.items()
  ]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> pathlib.Path:
  """One tiny model, trained by the real command; shared, never written to."""
  workdir = tmp_path_factory.mktemp("tiny_run") / "run"
  result = run_program("train", *train_args(workdir))
  assert result.returncode == 0, result.stderr
  return workdir


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> pathlib.Path:
  """One tiny MatViT, trained by the real command; shared, never written to."""
  workdir = tmp_path_factory.mktemp("digits_run") / "run"
  result = run_program("train", *digits_args(workdir))
  assert result.returncode == 0, result.stderr
  return workdir


@pytest.fixture(scope="session")
def small() -> MatLMConfig:
  """A universal model small enough to compare with anything."""
  return MatLMConfig(vocab_size=64, num_layers=4, d_model=32, num_heads=4, seq_len=16)


@pytest.fixture(scope="session")
def small_params(small):
  from matformer_jax.models import matlm

  return matlm.init_params(small, jax.random.key(0))


@pytest.fixture(scope="session")
def lively_params(small_params):
  """Larger weights: at initialisation a model with tied embeddings repeats its last token."""
  return {**small_params, "blocks": jax.tree.map(lambda x: 4 * x, small_params["blocks"])}
