"""Every command and every piece of Python in the documents is run, or parsed, or skipped by reason.

A fenced block says what it holds: `sh` commands, `python`, or `text`, which nobody types.
Commands on trained models run on tiny ones; commands that train or compile for long have their
flags parsed; an unknown command fails.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import helpers
from helpers import ROOT
import pytest

DOCUMENTS = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
  ROOT / "launch" / "README.md",
  *sorted((ROOT / "docs").rglob("*.md")),
]
# The quickstart model has four layers, the tests' tiny one has two.
TINY = {"M*2+L*2": "M*1+L*1", "S*2+M*2": "S*1+M*1"}
# Programs that run, where they are first mentioned, on a copy of the tests' tiny models, and what
# makes them short. Where they are mentioned again their flags are parsed.
RUN = {
  "describe": [],
  "evaluate": ["--batches=1"],
  "extract": [],
  "export": ["--nocheck"],
  "generate": ["--max_tokens=4"],
  "latency": ["--rounds=1"],
  "retrieve": ["--ladder=2", "--max_queries=8", "--batch_size=512"],
}
# Programs that train, tokenise or compile for minutes: their flags are parsed, and --config loaded.
# Each is run elsewhere in the tests.
PARSE = {
  *("train", "search", "serve", "pod_plan", "data.prepare"),
  *("import_model", "experiments", "experiments.elastify"),
  "downstream",  # needs the extra eval; run in test_downstream.py
}
SKIP = {
  "pip install": "installs packages; test_wheel.py installs one",
}

# Reads [[program or file, flags], ...] and prints what is wrong with each, or "". Flags are defined
# where a program starts, so each is started, in a process of its own, up to where it parses them.
PARSER = """
import json, os, pathlib, runpy, sys
from absl import app, flags
from matformer_jax import cli
import fork_server

fork_server.preload()

def parse(main, **_):
  flags.FLAGS(sys.argv)
  sys.exit(0)

app.run = cli.run = parse
for target, args in json.load(sys.stdin):
  read, write = os.pipe()
  child = os.fork()
  if not child:
    try:
      sys.argv = [target, *args]
      if target.endswith(".py"):
        sys.path.insert(0, str(pathlib.Path(target).parent))
        runpy.run_path(target, run_name="__main__")
      else:
        runpy.run_module(f"matformer_jax.{target}", run_name="__main__", alter_sys=True)
      os.write(write, b"does not parse its flags")
    except SystemExit as e:
      os.write(write, str(e.code or "").encode())
    except BaseException as e:
      os.write(write, f"{type(e).__name__}: {e}".encode())
    os._exit(0)
  os.close(write)
  os.waitpid(child, 0)
  print(json.dumps(os.read(read, 65536).decode()), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Command:
  """One command of a document, its continuation lines joined."""

  where: str
  argv: tuple[str, ...]
  env: tuple[tuple[str, str], ...] = ()

  @property
  def program(self) -> str | None:
    """`train` of `matformer train` and of `python -m matformer_jax.train`."""
    if self.argv[0] == "matformer":
      return self.argv[1]
    if self.argv[1:2] == ("-m",) and self.argv[2].startswith("matformer_jax."):
      return self.argv[2].removeprefix("matformer_jax.")
    return None

  @property
  def args(self) -> list[str]:
    start = 2 if self.argv[0] == "matformer" else 3
    return [_tiny(arg) for arg in self.argv[start:]]


def _tiny(text: str) -> str:
  for large, small in TINY.items():
    text = text.replace(large, small)
  return text


def blocks() -> list[tuple[str, str, str]]:
  """(where, kind, text) of every fenced block."""
  found = []
  for path in DOCUMENTS:
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S):
      line = path.read_text()[: match.start()].count("\n") + 2
      found.append((f"{path.relative_to(ROOT)}:{line}", match[1], match[2]))
  return found


def commands() -> list[Command]:
  found, seen = [], set()
  for where, kind, text in blocks():
    if kind != "sh":
      continue
    env = {}
    for line in text.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      exported = words[:1] == ["export"]
      assigned = {}
      for word in words[exported:]:
        if not re.match(r"[A-Z_]+=", word):
          break
        assigned |= [word.split("=", 1)]
      words = words[exported + len(assigned) :]
      if exported:
        env |= assigned
      command = Command(
        f"{where} {' '.join(words[:2])}", tuple(words), (*(env | assigned).items(),)
      )
      if words and (command.argv, command.env) not in seen:
        seen.add((command.argv, command.env))
        found.append(command)
  return found


COMMANDS = commands()
FIRST = {program: next((c for c in COMMANDS if c.program == program), None) for program in RUN}


def parsed(command: Command) -> tuple[str, list[str]] | None:
  """(program or file, flags) of a command whose flags are parsed only."""
  if command.program in PARSE or FIRST.get(command.program, command) is not command:
    return command.program, command.args
  if command.argv[0] == "python" and command.argv[1].startswith("benchmarks/"):
    return command.argv[1], list(command.argv[2:])
  if command.argv[0].startswith("--config."):  # options of train, shown alone
    return "train", ["--config=matlm:tiny", *command.argv]
  return None


@pytest.fixture(scope="module")
def mistakes() -> dict[tuple[str, ...], str]:
  """What is wrong with the flags of each command that is only parsed, "" if nothing."""
  targets = {c.argv: t for c in COMMANDS if (t := parsed(c))}
  result = subprocess.run(
    [sys.executable, "-c", PARSER],
    input=json.dumps(list(targets.values())),
    cwd=ROOT,
    env=helpers.PROGRAM_ENV | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    capture_output=True,
    text=True,
    timeout=helpers.BACKSTOP_S,
  )
  assert result.returncode == 0, result.stderr
  lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('"')]
  return dict(zip(targets, lines, strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_run, digits_run) -> pathlib.Path:
  """A directory that looks like the repository after the quickstart and the digits were trained."""
  root = tmp_path_factory.mktemp("documents")
  for name, run in (("quickstart", tiny_run), ("digits", digits_run)):
    shutil.copytree(run, root / "runs" / name)
  return root


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.where)
def test_command(command: Command, place, mistakes):
  argv = list(command.argv)
  for words, reason in SKIP.items():
    if " ".join(argv).startswith(words):
      pytest.skip(reason)
  if command.argv in mistakes:
    assert mistakes[command.argv] == ""
  elif command.program in RUN:
    argv = helpers.command(command.program, *command.args, *RUN[command.program])
    check(argv, place, PYTHONPATH=str(ROOT))
  elif argv[0] == "make":
    check(["make", "--dry-run", *argv[1:]], ROOT)
    pytest.skip("takes minutes: make --dry-run knows it")
  elif argv[:3] == [".venv/bin/python", "-m", "pytest"]:
    words = [word for word in argv[1:] if word not in ("-n", "2")]
    check([sys.executable, *words, "--collect-only"], ROOT)
    pytest.skip("runs tests: they were only collected")
  elif argv[0].startswith("launch/"):
    split = argv.index("--") if "--" in argv else len(argv)
    check(
      [*argv[:split], "--dry-run", *argv[split:]], ROOT, PYTHON=sys.executable, **dict(command.env)
    )
  else:
    pytest.fail(f"no rule says how to check {shlex.join(argv)}")


def check(argv: list[str], cwd: pathlib.Path, **env: str) -> None:
  result = subprocess.run(
    argv,
    cwd=cwd,
    env={**helpers.PROGRAM_ENV, **env},
    capture_output=True,
    text=True,
    timeout=helpers.BACKSTOP_S,
  )
  assert result.returncode == 0, result.stdout + result.stderr


PYTHON = [(where, text) for where, kind, text in blocks() if kind == "python"]


@pytest.mark.parametrize("where,text", PYTHON, ids=[where for where, _ in PYTHON])
def test_python(where, text, place, monkeypatch):
  monkeypatch.chdir(place)
  exec(compile(_tiny(text), where, "exec"), {})


def test_every_block_says_what_it_holds():
  odd = [where for where, kind, _ in blocks() if kind not in ("sh", "python", "text")]
  assert not odd, f"say ```sh, ```python or ```text at {', '.join(odd)}"


def test_links_lead_to_files():
  """Of the documents that are read in a checkout; make docs checks the site's, and anchors."""
  for path in DOCUMENTS:
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
      assert ":" in link or (path.parent / link).exists(), f"{path}: {link}"


def test_the_example_runs(tmp_path):
  result = subprocess.run(
    [sys.executable, ROOT / "examples" / "every_size.py", tmp_path / "run"],
    cwd=tmp_path,
    env={**helpers.PROGRAM_ENV, "PYTHONPATH": os.fspath(ROOT)},
    capture_output=True,
    text=True,
    timeout=helpers.BACKSTOP_S,
  )
  assert result.returncode == 0, result.stderr
  universal, extracted = re.search(r"universal (\S+), extracted (\S+)", result.stdout).groups()
  assert universal == extracted


@pytest.mark.parametrize(
  "command", [c for c in commands() if c.program == "train" and c.env], ids=lambda c: c.where
)
def test_training_on_virtual_devices_runs(command, tmp_path):
  args = [arg for arg in command.args if not arg.startswith("--workdir")]
  short = ["--config.steps=1", "--config.eval.every=0", "--config.sampling=0/0/0/1"]
  result = helpers.run_program(
    "train", *args, f"--workdir={tmp_path}", *short, env=dict(command.env)
  )
  assert result.returncode == 0, result.stderr
