"""What tests share: where things are, and how a program is run as a user would.

Importing this sets the environment, so it comes before JAX: in-process tests see 8 virtual CPU
devices, programs see one.
"""

import atexit
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

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


def command(module: str, *args) -> list[str]:
  """The command line of a program, for tests that send it signals."""
  return [sys.executable, "-u", "-m", f"matformer_jax.{module}", *map(str, args)]


def run_program(
  module: str, *args, timeout: int = BACKSTOP_S, env=None
) -> subprocess.CompletedProcess:
  """Runs a command-line program from the repository root, in a process of its own."""
  env = env or {}
  if any(name.startswith("JAX_") for name in env):  # read when JAX is imported
    return _run(command(module, *args), timeout, env)
  return _LAUNCHER.run(f"matformer_jax.{module}", list(map(str, args)), env, timeout)


def train_until_signal(moment: int | str, signum: int, *args) -> subprocess.CompletedProcess:
  """Runs the train program, which gets a signal at a step or a moment of signalled_train.py."""
  program = [sys.executable, "-u", *signalled(0, moment, signum)]
  return _run([*program, *map(str, args)], BACKSTOP_S, {})


def signalled(process: int, moment: int | str, signum: int) -> list[str]:
  """Arguments of Python: the train program, one process of which gets a signal at a moment."""
  path = ROOT / "tests" / "signalled_train.py"
  return [str(path), f"{process}:{moment}:{int(signum)}"]


def get_config(row: str, file: str = "matlm"):
  """A row of configs/FILE.py."""
  import matformer_jax

  return matformer_jax.get_config(ROOT / "configs" / f"{file}.py:{row}")


def _run(command: list[str], timeout: int, env) -> subprocess.CompletedProcess:
  return subprocess.run(
    command,
    cwd=ROOT,
    env={**PROGRAM_ENV, **env},
    capture_output=True,
    text=True,
    timeout=timeout,
  )


class _Launcher:
  """Forks programs off a process that has imported the package already.

  Importing takes longer than most of the programs that tests run. See fork_server.py.
  """

  def __init__(self):
    self._server = None

  def run(self, module, args, env, timeout) -> subprocess.CompletedProcess:
    if self._server is None:
      self._server = subprocess.Popen(
        [sys.executable, "-u", ROOT / "tests" / "fork_server.py"],
        cwd=ROOT,
        env=PROGRAM_ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
      atexit.register(self._server.kill)
    with tempfile.TemporaryDirectory() as directory:
      streams = [os.path.join(directory, name) for name in ("stdout", "stderr")]
      request = {"module": module, "args": args, "env": env, "timeout": timeout, "streams": streams}
      print(json.dumps(request), file=self._server.stdin, flush=True)
      code = json.loads(self._server.stdout.readline())
      out, err = (pathlib.Path(s).read_text(errors="replace") for s in streams)
    if code is None:
      raise subprocess.TimeoutExpired([module, *args], timeout, out, err)
    return subprocess.CompletedProcess([module, *args], code, out, err)


_LAUNCHER = _Launcher()


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
