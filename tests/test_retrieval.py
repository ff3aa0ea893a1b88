"""Nearest neighbours: the search against the textbook, the corpus on disk, the command."""

import json

from helpers import run_program
import numpy as np
import pytest

import matformer_jax
from matformer_jax import UserError, retrieve
from matformer_jax import granularity as gran
from matformer_jax.evals import retrieval
from matformer_jax.loading import open_task


@pytest.fixture(scope="module")
def vectors():
  rng = np.random.default_rng(0)
  return rng.normal(size=(37, 12)).astype(np.float32), rng.normal(size=(501, 12)).astype(np.float32)


def textbook(queries, corpus, k, metric):
  if metric == "cosine":
    queries, corpus = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, corpus))
    near = queries.astype(float) @ corpus.T.astype(float)
    order = np.argsort(-near, 1, kind="stable")[:, :k]
  else:
    near = np.linalg.norm(queries[:, None].astype(float) - corpus[None], axis=2)
    order = np.argsort(near, 1, kind="stable")[:, :k]
  return order, np.take_along_axis(near, order, 1)


@pytest.mark.parametrize("backend", retrieval.BACKENDS)
@pytest.mark.parametrize("metric", retrieval.METRICS)
@pytest.mark.parametrize("cuts", [[], [100, 103, 490]])
def test_search_is_exact(vectors, backend, metric, cuts, monkeypatch):
  """In one block or several, some smaller than k, over 8 devices."""
  if backend == "faiss":
    pytest.importorskip("faiss")
  monkeypatch.setattr(retrieval, "QUERY_ROWS", 16)
  queries, corpus = vectors
  indices, scores = retrieval.search(queries, np.split(corpus, cuts), 5, metric, backend)
  want_indices, want_scores = textbook(queries, corpus, 5, metric)
  np.testing.assert_array_equal(indices, want_indices)
  np.testing.assert_allclose(scores, want_scores, rtol=1e-4, atol=1e-4)


def test_equally_near_ones_come_in_order():
  corpus = np.ones((20, 3), np.float32)
  indices, _ = retrieval.search(corpus[:2], [corpus[:9], corpus[9:]], 4)
  np.testing.assert_array_equal(indices, [[0, 1, 2, 3]] * 2)


def test_votes():
  np.testing.assert_array_equal(
    retrieval.vote(np.array([[1, 2, 2], [3, 1, 2], [1, 2, 1]])), [2, 3, 1]
  )
  neighbours = np.array([[0, 1, 2], [2, 1, 0], [1, 0, 2]])
  corpus_labels = np.array([5, 6, 6])
  queries = np.array([[5, -1], [-1, -1], [7, 6]])  # the second counts for nothing
  assert retrieval.accuracy(neighbours, corpus_labels, queries, 1) == 1.0
  assert retrieval.accuracy(neighbours, corpus_labels, queries, 3) == 0.5


@pytest.mark.parametrize(
  "change,words",
  [
    (dict(metric="dot"), "metric='dot'"),
    (dict(backend="annoy"), "backend='annoy'"),
    (dict(k=502), "only 501 images"),
    (dict(blocks=[np.zeros((9, 3))]), "12 features and the corpus 3"),
  ],
)
def test_mistakes(vectors, change, words):
  queries, corpus = vectors
  with pytest.raises(UserError, match=words):
    retrieval.search(**{"queries_QxF": queries, "blocks": [corpus], "k": 3} | change)


# ----------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(digits_run):
  return matformer_jax.load(digits_run)


def test_a_corpus_is_embedded_once_and_goes_on_after_a_kill(model, tmp_path, monkeypatch):
  source = open_task(model).validation_images
  embedder = retrieve.Embedder(model, 60)
  whole = retrieve.embed_corpus(
    embedder, source, gran.parse("M", model.config), tmp_path / "a", 1000
  )
  assert whole.chunks == 1
  done = []

  def counting(part, granularity, bar, embed=embedder.embed):
    done.append(part.size)
    if len(done) == 3:
      raise KeyboardInterrupt
    return embed(part, granularity, bar)

  monkeypatch.setattr(embedder, "embed", counting)
  with pytest.raises(KeyboardInterrupt):
    retrieve.embed_corpus(embedder, source, gran.parse("M", model.config), tmp_path / "b", 100)
  cut = retrieve.embed_corpus(embedder, source, gran.parse("M", model.config), tmp_path / "b", 100)
  assert done == [100, 100, 100, 100, 59]  # the third again, and what was left
  again = retrieve.embed_corpus(
    embedder, source, gran.parse("M", model.config), tmp_path / "b", 100
  )
  assert len(done) == 5
  for corpus in (cut, again):
    np.testing.assert_allclose(
      np.concatenate(list(corpus.blocks())), np.concatenate(list(whole.blocks())), atol=1e-5
    )
    np.testing.assert_array_equal(corpus.labels, whole.labels)
  # Every row is the model's own representation of that image.
  image, (label,) = source.decode(237)
  want = model.features(model.prepare([image]), "M")[0]
  np.testing.assert_allclose(np.concatenate(list(cut.blocks()))[237], want, rtol=1e-4, atol=1e-4)
  assert cut.labels[237] == label
  manifest = json.loads((cut.path / "manifest.json").read_text())
  assert manifest["granularity"] == "M" and manifest["num_images"] == 359


def test_retrieve(digits_run, tmp_path):
  result = run_program(
    "retrieve",
    f"--workdir={digits_run}",
    f"--out={tmp_path}",
    "--symmetric=all",
    "--granularities=S,M+L",
    f"--baselines={digits_run}",
    "--k=1,5",
  )
  assert result.returncode == 0, result.stderr
  report = json.loads((tmp_path / "retrieval.json").read_text())
  rows = report["rows"]
  assert [(r["encoder"], r["granularity"], r["corpus"]) for r in rows] == [
    ("MatViT", "S", "XL"),
    ("MatViT", "M*1+L*1", "XL"),
    ("MatViT", "XL", "XL"),
    ("MatViT", "S", "S"),
    ("MatViT", "M*1+L*1", "M*1+L*1"),
    (str(digits_run), "XL", "XL"),
  ]
  # The model as its own baseline.
  assert [rows[5][k] for k in ("1-nn", "5-nn")] == [rows[2][k] for k in ("1-nn", "5-nn")]
  assert rows[2]["1-nn"] > 0.5 and rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]
  assert f"{rows[0]['1-nn']:.2%}" in result.stdout
  assert (tmp_path / "retrieval.png").read_bytes().startswith(b"\x89PNG")
  assert len((tmp_path / "retrieval.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize(
  "args,words",
  [
    (["--k=0"], "--k='0'"),
    (["--corpus=nope"], "no split 'nope'"),
    (["--granularities=Q"], "'Q' is not a size"),
  ],
)
def test_command_mistakes(digits_run, args, words):
  result = run_program("retrieve", f"--workdir={digits_run}", *args)
  assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


def test_a_language_model_has_no_images(tiny_run):
  result = run_program("retrieve", f"--workdir={tiny_run}")
  assert result.returncode == 1 and "holds a MatLM" in result.stderr
