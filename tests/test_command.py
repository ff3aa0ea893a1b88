"""The `matformer` command."""

import os
import subprocess
import sys

import helpers
from helpers import ROOT, run_program
import pytest

import matformer_jax


def matformer(*args, cwd=ROOT) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "matformer_jax", *args],
    cwd=cwd,
    env={**helpers.PROGRAM_ENV, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_it_lists_every_program():
  result = matformer()
  assert result.returncode == 0
  listed = dict(line.split(maxsplit=1) for line in result.stdout.splitlines()[2:])
  assert {"train", "evaluate", "pod_plan", "data.prepare", "experiments"} <= set(listed)
  assert all(line.endswith(".") for line in listed.values())
  assert matformer("--help").stdout == result.stdout


def test_a_program_is_the_same_as_its_module(tmp_path):
  args = ("--config=matlm:tiny", "--json")
  result = matformer("describe", *args, cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  assert result.stdout == run_program("describe", *args).stdout
  # A program's --help is its own, and its last name is enough.
  assert "--vocab_size" in matformer("prepare", "--help").stdout


def ends_of(*command) -> subprocess.CompletedProcess:
  """Runs a program whose output nobody reads, as after `| head` has seen enough."""
  reading, writing = os.pipe()
  os.close(reading)
  try:
    return subprocess.run(
      [sys.executable, *command],
      cwd=ROOT,
      env=helpers.PROGRAM_ENV,
      stdout=writing,
      stderr=subprocess.PIPE,
      text=True,
      timeout=helpers.BACKSTOP_S,
    )
  finally:
    os.close(writing)


@pytest.mark.parametrize("args", [("--help",), ("describe", "--config=matlm:tiny")])
def test_a_reader_may_leave(args):
  result = ends_of("-m", "matformer_jax", *args)
  assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize(
  "body,code,words",
  [
    ("raise KeyboardInterrupt", 130, ""),
    ("os.dup2(2, 1); raise BrokenPipeError('of a worker')", 1, "of a worker"),
    ("out = os.dup(1); os.dup2(2, 1); os.dup2(out, 2); print('x', file=sys.stderr)", 141, ""),
  ],
)
def test_ends_that_are_nobody_s_mistake(body, code, words):
  program = (
    f"import os, sys\nfrom matformer_jax import cli\ndef main(argv):\n  {body}\ncli.run(main)"
  )
  result = ends_of("-c", program)
  assert result.returncode == code and words in result.stderr, result.stderr
  assert ("Traceback" in result.stderr) == bool(words)


def test_no_standard_output_at_all():
  """As after `>&-`: Python has no sys.stdout then."""
  command = f"exec {sys.executable} -m matformer_jax.describe --config=matlm:tiny >&-"
  result = subprocess.run(
    command, shell=True, cwd=ROOT, env=helpers.PROGRAM_ENV, stderr=subprocess.PIPE, text=True
  )
  assert (result.returncode, result.stderr) == (0, "")


def test_mistakes_and_version():
  result = matformer("trian")
  assert result.returncode == 1
  assert result.stderr == "error: unknown program 'trian'; did you mean 'train'?\n"
  assert matformer("--version").stdout.split()[1] == matformer_jax.__version__
