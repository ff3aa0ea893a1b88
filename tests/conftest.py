"""Fixtures that tests share: one tiny model of each kind, trained by the real command."""

import pathlib
import re

from buckets import BUCKET, Gcs
from helpers import digits_args, run_program, train_args  # sets the environment: before JAX
import jax
import llama_files
import pytest

from matformer_jax import runtime, storage
from matformer_jax.config import MatLMConfig

runtime.enable_compilation_cache()


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
def dense_llama(tmp_path_factory) -> pathlib.Path:
  """A random Llama with a tokenizer, and text in DIR/text; shared, never written to."""
  return llama_files.write_readable(tmp_path_factory.mktemp("dense_llama"))


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


@pytest.fixture(scope="session")
def gcs():
  """A GCS server, started."""
  server = Gcs()
  server.start()
  yield server
  server.stop()


@pytest.fixture
def bucket(gcs, monkeypatch, request):
  """A directory of its own in a bucket, which this process can reach."""
  for name, value in gcs.env.items():
    monkeypatch.setenv(name, value)
  yield storage.path(f"gs://{BUCKET}/" + re.sub(r"\W+", "_", request.node.name))
  gcs.fail_every, gcs.stall = 0, lambda method, path: None
