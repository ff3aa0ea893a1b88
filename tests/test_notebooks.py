"""Every notebook runs from top to bottom, on the tests' own small models."""

import pathlib

import helpers
import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((helpers.ROOT / "notebooks").glob("*.ipynb"))
WITH_PEERS = "06_out_into_the_world"  # runs in tests/peers


@pytest.mark.parametrize(
  "path", [p for p in NOTEBOOKS if p.stem != WITH_PEERS], ids=lambda p: p.stem
)
def test_notebook_runs(path: pathlib.Path, tiny_run, digits_run, dense_llama, monkeypatch):
  run = digits_run if "retrieval" in path.stem else tiny_run
  monkeypatch.setenv("MATFORMER_RUN", str(run))
  monkeypatch.setenv("MATFORMER_DENSE", str(dense_llama))
  monkeypatch.setenv("MATFORMER_TEXT", f"text:{dense_llama}/text/*.txt")
  monkeypatch.setenv("XLA_FLAGS", helpers.xla_flags(1))
  execute(path)


def execute(path: pathlib.Path) -> None:
  """Raises at the first cell that fails."""
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    timeout=helpers.BACKSTOP_S,
    startup_timeout=helpers.BACKSTOP_S,
    kernel_name="python3",
    resources={"metadata": {"path": str(path.parent)}},
  )
  client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_with_its_outputs(path: pathlib.Path):
  cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
  assert all(c.execution_count for c in cells), "run it, and save it with its outputs"
  assert not any(o.output_type == "error" for c in cells for o in c.outputs)
  assert any("image/png" in o.get("data", {}) for c in cells for o in c.outputs)
