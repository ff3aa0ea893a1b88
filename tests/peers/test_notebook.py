"""The notebook that needs other people's runtimes, on a small model."""

import helpers
from test_notebooks import WITH_PEERS, execute


def test_it_runs(dense_llama, monkeypatch):
  monkeypatch.setenv("MATFORMER_DENSE", str(dense_llama))
  monkeypatch.setenv("MATFORMER_TEXT", f"text:{dense_llama}/text/*.txt")
  monkeypatch.delenv("XLA_FLAGS")
  execute(helpers.ROOT / "notebooks" / f"{WITH_PEERS}.ipynb")
