"""Retrieval with elastic query encoders: a corpus embedded once, queries at any size.

  python -m matformer_jax.retrieve --workdir=runs/fashion --ladder=9 --symmetric=trained
  python -m matformer_jax.retrieve --workdir=runs/fashion --baselines=runs/vit_s,runs/vit_l

The universal model embeds the corpus (by default the training images) once; the embeddings
are kept and reused. Then every granularity embeds the queries (the validation images) and
each query is given the class of its nearest neighbours (Section 4.2.2, Figure 5). With
--symmetric the corpus is embedded by the query encoder too (Table 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import io
import json
import os
import pathlib

from absl import flags
import jax
import numpy as np
import tqdm

from matformer_jax import cli, plots, runtime, sharding, storage, tables
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import checkpoint
from matformer_jax.data import image_sources
from matformer_jax.data.batches import Corrupt, LabelledBatches, read_ahead
from matformer_jax.errors import UserError
from matformer_jax.evals import retrieval
from matformer_jax.loading import VisionModel, load, open_task

MANIFEST = "manifest.json"
CHUNK_IMAGES = 65_536  # per file


# ----------------------------------------------------------------- embedding


class Embedder:
  """Embeds images with a model at any granularity, a batch split over this host's devices."""

  def __init__(self, model: VisionModel, batch_size: int, workers: int = 0):
    devices = jax.local_devices()
    mesh = sharding.make_mesh({"data": -1}, devices)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self._split = sharding.batch_sharding(mesh)
    self.model = dataclasses.replace(model, params=jax.device_put(model.params, whole))
    self._batch_size = -(-batch_size // len(devices)) * len(devices)
    self._workers = workers
    self._corrupt = Corrupt(model.card["config"]["data"]["corrupt"])

  def embed(
    self, source: image_sources.Images, granularity: gran.Granularity, bar: tqdm.tqdm
  ) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [N, F], labels int32 [N, R], -1 where there are none) of all images, in order."""
    reader = LabelledBatches(source, self._batch_size, self.model.transform, self._corrupt)
    features, labels = [], []
    for (batch,) in read_ahead(
      reader, 0, reader.num_batches - 1, [range(self._batch_size)], self._workers
    ):
      features.append(self.model.features(jax.device_put(batch["image"], self._split), granularity))
      labels.append(batch["labels"])
      if len(features) > 2:  # the device is this much ahead of the disk, not more
        features[-3] = np.asarray(features[-3])
      bar.update(min(self._batch_size, source.size - self._batch_size * (len(labels) - 1)))
    return (
      np.concatenate([np.asarray(f) for f in features])[: source.size],
      np.concatenate(labels)[: source.size],
    )


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Embedded images in a directory: features-*.npy, labels-*.npy and a manifest.

  Attributes:
    path: of the directory.
    chunks: files.
    labels: int32 [N], the (first) class of every image; -1 where there is none.
  """

  path: pathlib.Path
  chunks: int
  labels: np.ndarray

  def blocks(self) -> Iterator[np.ndarray]:
    """float32 [rows, F] each, read from disk as they are needed."""
    for i in range(self.chunks):
      yield np.load(self.path / f"features-{i:05d}.npy", mmap_mode="r")


def embed_corpus(
  embedder: Embedder,
  source: image_sources.Images,
  granularity: gran.Granularity,
  root: pathlib.Path,
  chunk_images: int = CHUNK_IMAGES,
) -> Corpus:
  """Embeds a corpus, or opens one embedded earlier; resumes after an interruption.

  Args:
    root: gets a directory per model, granularity and set of images.
  """
  model = embedder.model
  name = gran.to_text(granularity, model.config)
  facts = {
    "workdir": str(model.workdir),
    "step": model.step,
    "granularity": name,
    "model": checkpoint.read_meta(model.workdir, model.step)["seal"],
    "images": source.fingerprint,
    "source": source.name,
    "num_images": source.size,
    "features": model.config.features,
    "transform": model.transform.text,
    "chunk_images": chunk_images,
  }
  key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
  path = root / f"{name.replace('*', 'x').replace('/', '_')}-{key}"
  path.mkdir(parents=True, exist_ok=True)
  chunks = [
    range(i, min(i + chunk_images, source.size)) for i in range(0, source.size, chunk_images)
  ]
  with tqdm.tqdm(
    total=source.size, unit="img", desc=f"embedding the corpus with {name}", mininterval=1.0
  ) as bar:
    for i, rows in enumerate(chunks):
      files = path / f"features-{i:05d}.npy", path / f"labels-{i:05d}.npy"
      if all(_holds(f, len(rows)) for f in files):
        bar.update(len(rows))
        continue
      for file, array in zip(files, embedder.embed(source.part(rows), granularity, bar)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        storage.replace_file(file, buffer.getvalue())
  storage.replace_file(path / MANIFEST, json.dumps(facts, indent=1).encode())
  labels = [np.load(path / f"labels-{i:05d}.npy")[:, 0] for i in range(len(chunks))]
  return Corpus(path, len(chunks), np.concatenate(labels))


def _holds(path: pathlib.Path, rows: int) -> bool:
  try:
    return len(np.load(path, mmap_mode="r")) == rows
  except (OSError, ValueError):
    return False


# ----------------------------------------------------------------- measuring


@dataclasses.dataclass(frozen=True)
class Row:
  """A query encoder and what retrieval with it gives.

  Attributes:
    encoder: `MatViT`, or the directory of a baseline.
    granularity: of the query encoder.
    corpus: granularity that embedded the corpus.
    params, flops: of the query encoder, per image.
    accuracy: {k: share of queries given one of their classes by their k nearest}.
  """

  encoder: str
  granularity: str
  corpus: str
  params: int
  flops: int
  accuracy: dict[int, float]


def measure(
  embedder: Embedder,
  queries: image_sources.Images,
  granularity: gran.Granularity,
  corpus: Corpus,
  corpus_name: str,
  ks: Sequence[int],
  metric: str,
  backend: str,
  encoder: str,
) -> Row:
  """Retrieval with one query encoder."""
  config = embedder.model.config
  name, counts = gran.to_text(granularity, config), gran.count(config, granularity)
  with tqdm.tqdm(
    total=queries.size,
    unit="img",
    desc=f"queries by {encoder} {name}",
    mininterval=1.0,
    leave=False,
  ) as bar:
    features, labels = embedder.embed(queries, granularity, bar)
  neighbours, _ = retrieval.search(features, corpus.blocks(), max(ks), metric, backend)
  return Row(
    encoder,
    name,
    corpus_name,
    counts.params,
    counts.flops,
    {k: retrieval.accuracy(neighbours, corpus.labels, labels, k) for k in ks},
  )


def results_table(rows: Sequence[Row]) -> str:
  """The table a person reads; each row is compared with the corpus's own encoder."""
  ks = list(rows[0].accuracy)
  header = ["query encoder", "corpus", "parameters", "FLOPs/image"] + [f"{k}-NN" for k in ks]
  return tables.table(
    header,
    [
      [f"{r.encoder} {r.granularity}", r.corpus, f"{r.params:,}", tables.si(r.flops)]
      + [f"{r.accuracy[k]:.2%}" for k in ks]
      for r in rows
    ],
  )


def plot(rows: Sequence[Row], k: int, title: str, path: str | os.PathLike) -> None:
  """Accuracy against the query encoder's FLOPs (Figure 5)."""
  with plots.figure(path) as axes:
    universal = [r for r in rows if r.encoder == UNIVERSAL]
    largest = max(universal, key=lambda r: r.flops).granularity
    groups = (
      ("MatViT queries, corpus by " + largest, "o", [r for r in universal if r.corpus == largest]),
      (
        "the same encoder on both sides",
        "s",
        [r for r in universal if r.corpus == r.granularity and r.granularity != largest],
      ),
      (
        "independent ViT queries, corpus by " + largest,
        "x",
        [r for r in rows if r.encoder != UNIVERSAL],
      ),
    )
    for label, marker, group in groups:
      if group:
        group = sorted(group, key=lambda r: r.flops)
        axes.plot(
          [r.flops / 1e9 for r in group],
          [100 * r.accuracy[k] for r in group],
          marker=marker,
          label=label,
          linestyle="-" if marker == "o" else "",
          alpha=0.9,
        )
        for r in group if marker == "o" else ():
          if "*" not in r.granularity:
            axes.annotate(
              r.granularity,
              (r.flops / 1e9, 100 * r.accuracy[k]),
              textcoords="offset points",
              xytext=(5, -13),
            )
    axes.set(xlabel="GFLOPs per query image", ylabel=f"{k}-NN accuracy (%)", title=title)
    axes.legend()


UNIVERSAL = "MatViT"


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  try:
    ks = sorted({int(k) for k in _K.value})
  except ValueError:
    ks = []
  if not ks or ks[0] < 1:
    raise UserError(f"--k={','.join(_K.value)!r} must be positive numbers, e.g. 1,20")
  runtime.enable_compilation_cache()
  model = load(workdir, _STEP.value, VisionModel)
  task = open_task(model)
  config, data = model.config, model.card["config"]["data"]
  chosen = [gran.parse(g, config) for g in _GRANULARITIES.value] or gran.trained(config)
  chosen += gran.ladder_points(config, _LADDER.value) if _LADDER.value else []
  full = gran.full(config)
  chosen = sorted(dict.fromkeys([*chosen, full]), key=lambda g: gran.count(config, g).params)
  splits = {
    data["train_split"]: task.train_images,
    data["validation_split"]: task.validation_images,
  }
  corpus_images, queries = (
    splits.get(s) or task.open_split(s)
    for s in (_CORPUS.value or data["train_split"], _QUERIES.value or data["validation_split"])
  )
  if _MAX_QUERIES.value:
    queries = queries.part(range(min(_MAX_QUERIES.value, queries.size)))
  embedder = Embedder(model, _BATCH_SIZE.value, _WORKERS.value)
  staging = storage.Staging(storage.path(_OUT.value or model.workdir / "retrieval"))
  root = staging.local
  text = lambda g: gran.to_text(g, config)
  corpus = embed_corpus(embedder, corpus_images, full, root)
  options = ks, _METRIC.value, _BACKEND.value
  rows = [measure(embedder, queries, g, corpus, text(full), *options, UNIVERSAL) for g in chosen]
  if _SYMMETRIC.value != "none":
    trained = gran.trained(config)
    for g in (g for g in chosen if g != full and (_SYMMETRIC.value == "all" or g in trained)):
      own = embed_corpus(embedder, corpus_images, g, root)
      rows.append(measure(embedder, queries, g, own, text(g), *options, UNIVERSAL))
  for directory in _BASELINES.value:
    other = load(directory, kind=VisionModel)
    rows.append(
      measure(
        Embedder(other, _BATCH_SIZE.value, _WORKERS.value),
        queries,
        gran.full(other.config),
        corpus,
        text(full),
        *options,
        directory,
      )
    )
  print(
    f"\n{model.workdir}, step {model.step:,}: {queries.size:,} queries ({queries.name}) in "
    f"{corpus_images.size:,} images ({corpus_images.name}), {_METRIC.value}\n"
  )
  print(results_table(rows) + "\n")
  root.mkdir(parents=True, exist_ok=True)
  flat = [dataclasses.asdict(r) for r in rows]
  for row in flat:
    row.update({f"{k}-nn": share for k, share in row.pop("accuracy").items()})
  tables.write_csv(root / "retrieval.csv", flat)
  (root / "retrieval.json").write_text(
    runtime.to_json(
      {
        "workdir": str(model.workdir),
        "step": model.step,
        "corpus": corpus_images.name,
        "queries": queries.size,
        "metric": _METRIC.value,
        "rows": flat,
      },
      indent=1,
    )
  )
  plot(
    rows,
    ks[0],
    f"{model.workdir.name}: retrieval with elastic query encoders",
    root / "retrieval.png",
  )
  staging.sync()
  print(f"wrote {staging.directory / 'retrieval.csv'}, retrieval.json, retrieval.png")


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained MatViT.")
  _STEP = cli.define_step()
  _GRANULARITIES = flags.DEFINE_list(
    "granularities", [], "Query encoders; default the trained sizes."
  )
  _LADDER = flags.DEFINE_integer(
    "ladder", 0, "Also this many Mix'n'Match query encoders.", lower_bound=0
  )
  _SYMMETRIC = flags.DEFINE_enum(
    "symmetric",
    "none",
    ("none", "trained", "all"),
    "Also embed the corpus with the query encoders: those that were trained, or all.",
  )
  _BASELINES = flags.DEFINE_list(
    "baselines",
    [],
    "Directories of independently trained ViTs, to use as query encoders against the same corpus.",
  )
  _CORPUS = flags.DEFINE_string("corpus", None, "Split to search in; default the training split.")
  _QUERIES = flags.DEFINE_string("queries", None, "Split of queries; default the validation split.")
  _MAX_QUERIES = flags.DEFINE_integer(
    "max_queries", 0, "Use only this many queries; 0: all.", lower_bound=0
  )
  _K = flags.DEFINE_list("k", ["1", "20"], "Neighbours that vote.")
  _METRIC = flags.DEFINE_enum("metric", "cosine", retrieval.METRICS, "How near is measured.")
  _BACKEND = flags.DEFINE_enum("backend", "jax", retrieval.BACKENDS, "What searches.")
  _BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images per batch.", lower_bound=1)
  _WORKERS = flags.DEFINE_integer(
    "workers", 0, "Processes that decode; 0: this one.", lower_bound=0
  )
  _OUT = flags.DEFINE_string(
    "out", None, "Directory for embeddings and results; default WORKDIR/retrieval."
  )
  cli.run(main)
