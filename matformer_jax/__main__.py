"""The `matformer` command: one name for every program.

  matformer train --config=matlm:tiny --workdir=runs/tiny

is the same as `python -m matformer_jax.train --config=...`. Without a program, or with --help,
it lists them.
"""

from __future__ import annotations

import ast
import difflib
import pathlib
import runpy
import sys

import matformer_jax
from matformer_jax import cli

_PACKAGE = pathlib.Path(__file__).resolve().parent


def programs() -> dict[str, str]:
  """Every module that can be run, by its name within the package, and what it does in one line."""
  found = {}
  for path in sorted(_PACKAGE.rglob("*.py")):
    source = path.read_text(encoding="utf-8")
    if 'if __name__ == "__main__":' in source and path != _PACKAGE / "__main__.py":
      parts = path.relative_to(_PACKAGE).with_suffix("").parts
      name = ".".join(part for part in parts if part != "__main__")  # a package's own program
      found[name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
  return dict(sorted(found.items(), key=lambda item: ("." in item[0], item[0])))


def main() -> None:
  """Runs the program that the first argument names, as `python -m` would."""
  with cli.quiet_ends():
    _main()


def _main() -> None:
  program, *args = sys.argv[1:] or ["--help"]
  if program == "--version":
    print(f"matformer_jax {matformer_jax.__version__}")
    return
  known = programs()
  if program in ("--help", "-h", "help"):
    width = max(map(len, known))
    print("usage: matformer PROGRAM [--flags]; matformer PROGRAM --help lists a program's flags\n")
    print("\n".join(f"  {name:{width}}  {line}" for name, line in known.items()))
    return
  # prepare is short for data.prepare.
  matches = [name for name in known if program in (name, name.rpartition(".")[2])]
  if not matches:
    near = difflib.get_close_matches(program, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "matformer --help lists the programs"
    cli.fail(f"unknown program {program!r}; {hint}")
  sys.argv = [f"matformer {matches[0]}", *args]
  runpy.run_module(f"matformer_jax.{matches[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
