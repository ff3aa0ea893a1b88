"""What tests share: where things are, and how a program is run as a user would.

Importing this sets the environment, so it comes before JAX: in-process tests see 8 virtual CPU
devices, programs see one.
"""

import atexit
import importlib.metadata
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "test-cache"  # token stores and compiled programs, kept between runs
# Seconds after which a test gives up on what it waits for. No test may fail on a busy machine:
# it waits for what it is about, and asserts causes and orders, not seconds.
BACKSTOP_S = 1800
ONE_SIZE = "0/0/0/1"  # sampling: one program to compile, where a test is not about sizes
# Models of fewer sizes: less to compile for evaluation too.
ONE_WIDTH = dict(model__ffn_ratios="(4.0,)", model__head_ratios="(1.0,)", sampling="1")
TWO_WIDTHS = dict(model__ffn_ratios="(2.0,4.0)", model__head_ratios="(0.5,1.0)", sampling="uniform")

# What Llama's family has and the paper's models do not, all at once; of the `small` fixture.
GROUPED = dict(
  num_heads=8,
  num_kv_heads=4,
  head_dim=6,
  ffn_ratios=(),
  ffn_widths=(12, 24, 40, 96),
  activation="silu",
  gated=True,
  rope_scaling=(8.0, 1.0, 4.0, 32.0),
  tied_head=False,
  embedding_scale=1.5,
  qkv_bias=True,
  qk_norm=True,
)

# Nested in the heads alone, of the `small` fixture.
HEADS_ONLY = dict(nested_heads=True, ffn_ratios=(), ffn_widths=(64,) * 4)

os.environ["MATFORMER_CACHE"] = str(CACHE)
os.environ["JAX_PLATFORMS"] = "cpu"


# Most of a test is compiling, and more than half of that is XLA's fusion emitters. From jaxlib
# 0.11.1 they cannot be turned off.
_EMITTERS = "xla_cpu_use_fusion_emitters"
_JAXLIB = tuple(int(n) for n in importlib.metadata.version("jaxlib").split(".")[:3])
_CAN_TURN_OFF = _JAXLIB < (0, 11, 1)
AS_USERS_COMPILE = {_EMITTERS: True} if _CAN_TURN_OFF else {}  # for `Lowered.compile`


def xla_flags(devices: int) -> str:
  """Virtual CPU devices, and what makes XLA compile fast."""
  return (
    f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1" + f" --{_EMITTERS}=false" * _CAN_TURN_OFF
  )


# PYTHONPATH: a program out of tests/ would import whatever is installed, not this tree.
PROGRAM_ENV = {**os.environ, "XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
OPTIMISED = {"XLA_FLAGS": ""}  # for programs, as users run them
os.environ["XLA_FLAGS"] = xla_flags(8)


class Program:
  """A program in a process of its own, as `subprocess.Popen` would start it.

  It is forked off a process that has imported the package: importing takes longer than most of the
  programs that tests run. See fork_server.py.

  Attributes:
    stdout: to read what it prints, if that goes nowhere else.
  """

  _server: socket.socket | None = None

  def __init__(self, target, *args, env=None, stdout=None, stderr=None):
    """Starts it.

    Args:
      target: a path, or a module of the package, such as train.
      env: changes of PROGRAM_ENV.
      stdout, stderr: open files; stderr goes where stdout goes by default.
    """
    self.args = [str(target), *map(str, args)]
    self.returncode: int | None = None
    self.stdout, theirs = None, stdout
    if stdout is None:
      reading, writing = os.pipe()
      self.stdout, theirs = open(reading, errors="replace"), open(writing, "w")
    target = str(target) if str(target).endswith(".py") else f"matformer_jax.{target}"
    request = {"target": target, "args": self.args[1:], "env": env or {}}
    self.pid = self._ask(request, theirs.fileno(), (stderr or theirs).fileno())
    if stdout is None:
      theirs.close()

  @classmethod
  def _ask(cls, request, *streams: int) -> Any:
    if cls._server is None:
      cls._server, theirs = socket.socketpair()
      server = subprocess.Popen(
        [sys.executable, "-u", ROOT / "tests" / "fork_server.py", str(theirs.fileno())],
        cwd=ROOT,
        env=PROGRAM_ENV,
        pass_fds=[theirs.fileno()],
      )
      theirs.close()
      atexit.register(server.kill)
    socket.send_fds(cls._server, [json.dumps(request).encode() + b"\n"], streams)
    answer = b""
    while not answer.endswith(b"\n"):
      part = cls._server.recv(2**16)
      assert part, "fork_server.py ended"
      answer += part
    return json.loads(answer)

  def poll(self) -> int | None:
    """The exit code, or None while it runs."""
    if self.returncode is None:
      self.returncode = self._ask({"ended": self.pid})
    return self.returncode

  def wait(self, timeout: float = BACKSTOP_S) -> int:
    """The exit code; after `timeout` seconds it is killed, with what it has started."""
    deadline = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > deadline:
        os.killpg(self.pid, signal.SIGKILL)
        raise subprocess.TimeoutExpired(self.args, timeout)
      time.sleep(0.02)
    return self.returncode  # pyright: ignore[reportReturnType]

  def communicate(self, timeout: float = BACKSTOP_S) -> tuple[str, None]:
    """(what else it prints, None), at its end; after `timeout` seconds it is killed."""
    assert self.stdout
    late = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
    late.start()
    with self.stdout:
      output = self.stdout.read()
    late.cancel()
    self.wait(timeout)
    return output, None

  def send_signal(self, number: int) -> None:
    """Sends a signal, if it runs."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)


def command(module: str, *args) -> list[str]:
  """The command line of a program, for a process that is not forked."""
  return [sys.executable, "-u", "-m", f"matformer_jax.{module}", *map(str, args)]


def run_program(
  module: str | pathlib.Path, *args, timeout: float = BACKSTOP_S, env=None
) -> subprocess.CompletedProcess:
  """Runs a program to its end."""
  env = env or {}
  if any(name.startswith("JAX_") for name in env):  # read when JAX is imported
    return subprocess.run(
      command(str(module), *args),
      cwd=ROOT,
      env={**PROGRAM_ENV, **env},
      capture_output=True,
      text=True,
      timeout=timeout,
    )
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    program = Program(module, *args, env=env, stdout=out, stderr=err)
    code = program.wait(timeout)
    for file in (out, err):
      file.seek(0)
    return subprocess.CompletedProcess(program.args, code, out.read(), err.read())


def train_until_signal(moment: int | str, signum: int, *args) -> subprocess.CompletedProcess:
  """Runs the train program, which gets a signal at a step or a moment of signalled_train.py."""
  return run_program(*signalled(0, moment, signum), *args)


def signalled(process: int, moment: int | str, signum: int) -> list[str]:
  """The train program, one process of which gets a signal at a moment; train's flags follow."""
  return [str(ROOT / "tests" / "signalled_train.py"), f"{process}:{moment}:{int(signum)}"]


def get_config(row: str, file: str = "matlm"):
  """A row of configs/FILE.py."""
  import matformer_jax

  return matformer_jax.get_config(ROOT / "configs" / f"{file}.py:{row}")


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


# What tokenizers get wrong.
AWKWARD = [
  "",
  " ",
  "a",
  "  two  spaces   and   runs ",
  "\ttab\t\ttabs\n\n\n newline\r\nCRLF\r\n\r\n",
  "0 12 345 6789 1234567 3.14159 1e-5 ٣४Ⅷ²",
  "don't WE'LL I'Ve it's",
  "é à ü ñ 漢字 かな 한국어 العربية ไทย",
  "😀 👩‍👩‍👧 🏳️‍🌈",
  "a\u0301 vs \u00e1, n\u0303 e\u0302\u0323",
  "\u2028 \ufeff \u00a0 \u2003 \u200d",
  "\x00\x01\x7f",
  "<|endoftext|> <|im_start|>user</s><s> <unk> <0x41> [PAD]",
  "x" * 3000,
  "def f(x):\n    return {k: v for k, v in x.items()}  # !?;,.-_=+*&^%$#@~|\\/<>[]\n",
]


def byte_level_library(documents, vocab_size: int, pre_tokenizer=None, **model):
  """A byte-level BPE that Hugging Face's library trains: its own object, with one special token."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  made = tokenizers.Tokenizer(models.BPE(**model))
  made.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator(documents, trainer)
  made.encode_special_tokens = True
  return made
