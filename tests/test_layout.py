"""Imports point one way, and no two modules import each other."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "matformer_jax"

# Lowest first. A module imports from its own layer and those below.
LAYERS = (
  ("errors", "runtime", "storage", "tables", "plots"),
  ("config", "config_keys", "config_files", "cli", "tpu"),
  ("sharding", "granularity"),
  ("data", "formats", "hosts"),
  ("models",),
  ("evals", "decoding"),
  ("tasks", "exporting"),
  ("training", "checkpoints"),
  ("loading", "planning"),
  ("serving",),
  ("programs", "experiments", "harness"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules() -> dict[str, pathlib.Path]:
  """Dotted name below matformer_jax -> file."""
  return {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
    if p != PACKAGE / "__init__.py"
  }


def is_program(path: pathlib.Path) -> bool:
  return 'if __name__ == "__main__":' in path.read_text()


def imports(path: pathlib.Path, known) -> set[str]:
  """What a file imports of the package, inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matformer_jax"):
      base = node.module.removeprefix("matformer_jax").lstrip(".")
      for alias in node.names:
        name = f"{base}.{alias.name}".lstrip(".")
        found.add(name if name in known else base)
  return found - {""}


def layer(name: str, path: pathlib.Path) -> int:
  top = name.split(".")[0]
  return RANK[top] if top in RANK else RANK["programs"] if is_program(path) else RANK[top]


def test_imports_point_one_way():
  known = modules()
  wrong = [
    f"{name} imports {other}"
    for name, path in known.items()
    for other in imports(path, known)
    if layer(other, known[other]) > layer(name, path)
  ]
  assert not wrong


def test_no_circle_of_imports():
  known = modules()
  edges = {name: imports(path, known) for name, path in known.items()}
  done, path = set(), []

  def visit(name):
    assert name not in path, " -> ".join([*path[path.index(name) :], name])
    if name not in done:
      path.append(name)
      for other in edges[name]:
        visit(other)
      path.pop()
      done.add(name)

  for name in known:
    visit(name)


def test_configs_import_only_ml_collections():
  for path in (ROOT / "configs").glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = (
        [a.name for a in node.names]
        if isinstance(node, ast.Import)
        else [node.module or ""]
        if isinstance(node, ast.ImportFrom)
        else []
      )
      for name in names:
        assert name.split(".")[0] in {"ml_collections", "re", "pathlib", "runpy"}
