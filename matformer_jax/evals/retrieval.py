"""Nearest neighbours among embedded images, and what they say of an image's class (Section 4.2.2).

The search is exact. A corpus is taken block by block, so that its size is bounded by
the disk, not by the device; each block is split over the devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from matformer_jax import sharding
from matformer_jax.errors import UserError, import_extra

METRICS = ("cosine", "l2")
BACKENDS = ("jax", "faiss")
QUERY_ROWS = 1024  # queries taken at a time


def search(
  queries_QxF: np.ndarray,
  blocks: Iterable[np.ndarray],
  k: int,
  metric: str = "cosine",
  backend: str = "jax",
  devices: Sequence | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest rows of a corpus, nearest first; of equally near ones the first.

  Args:
    queries_QxF: float32.
    blocks: the corpus, float32 [rows, F] each, one after the other.
    k: at most the number of corpus rows.
    metric: `cosine` similarity, or Euclidean distance (`l2`).
    backend: `jax`, or `faiss` on the CPU (its flat, exact indices).
    devices: to split a block over; default all.

  Returns:
    (int64 [Q, k] row numbers, float32 [Q, k] similarities or distances).

  Raises:
    UserError: for an unknown metric or backend, a missing library, or widths that differ.
  """
  if metric not in METRICS:
    raise UserError(f"metric={metric!r} is not one of {METRICS}")
  if backend not in BACKENDS:
    raise UserError(f"backend={backend!r} is not one of {BACKENDS}")
  queries = np.asarray(queries_QxF, np.float32)
  blocks = (_checked(block, queries.shape[1]) for block in blocks)
  if metric == "cosine":
    queries, blocks = _normalized(queries), map(_normalized, blocks)
  if backend == "faiss":
    indices, scores = _search_faiss(queries, blocks, k, metric)
  else:
    indices, scores = _search_jax(queries, blocks, k, metric, devices or jax.devices())
  if indices.shape[1] < k:
    raise UserError(f"k={k}, but the corpus has only {indices.shape[1]} images")
  return indices, scores


def _checked(block: np.ndarray, width: int) -> np.ndarray:
  if block.shape[1] != width:
    raise UserError(
      f"queries have {width} features and the corpus {block.shape[1]}; both need "
      "encoders of one width"
    )
  return np.asarray(block, np.float32)


def _normalized(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _search_jax(queries, blocks, k, metric, devices):
  mesh = sharding.make_mesh({"data": -1}, devices)
  groups = [jnp.asarray(queries[i : i + QUERY_ROWS]) for i in range(0, len(queries), QUERY_ROWS)]
  best: list = [None] * len(groups)
  first = 0
  for block in blocks:
    rows = len(block)
    padded = np.zeros((-(-rows // len(devices)) * len(devices), block.shape[1]), np.float32)
    padded[:rows] = block
    on_devices = jax.device_put(padded, sharding.batch_sharding(mesh))
    for i, group in enumerate(groups):
      scores, indices = _nearest(group, on_devices, rows, mesh, k, metric)
      indices = np.asarray(indices, np.int64) + first
      best[i] = _merge(best[i], (np.asarray(scores), indices), min(k, first + rows))
    first += rows
  scores, indices = (np.concatenate(parts) for parts in zip(*best))
  return indices, np.sqrt(np.maximum(-scores, 0)) if metric == "l2" else scores


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _nearest(queries_QxF, block_RxF, rows, mesh: Mesh, k: int, metric: str):
  """(scores, row numbers in the block) of its best min(k, R) rows; the greater the nearer."""
  here = block_RxF.shape[0] // mesh.size

  def on_device(queries_QxF, part_PxF):
    dots = jnp.matmul(queries_QxF, part_PxF.T, precision="highest")
    if metric == "l2":
      squares = lambda x: jnp.sum(jnp.square(x), 1)
      dots = 2 * dots - squares(queries_QxF)[:, None] - squares(part_PxF)
    number = jax.lax.axis_index(sharding.BATCH_AXES) * here + jnp.arange(here)
    scores, places = jax.lax.top_k(jnp.where(number < rows, dots, -jnp.inf), min(k, here))
    return scores, number[places]

  split = sharding.spec(("batch",))
  scores, numbers = jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(PartitionSpec(), split),
    out_specs=(PartitionSpec(None, sharding.BATCH_AXES),) * 2,
    check_vma=False,
  )(queries_QxF, block_RxF)
  scores, places = jax.lax.top_k(scores, min(k, scores.shape[1]))
  return scores, jnp.take_along_axis(numbers, places, 1)


def _merge(old, new, k: int):
  """The best k of two (scores, indices); of equal ones the old."""
  if old is not None:
    new = tuple(np.concatenate(parts, 1) for parts in zip(old, new))
  order = np.argsort(-new[0], 1, kind="stable")[:, :k]
  return tuple(np.take_along_axis(part, order, 1) for part in new)


def _search_faiss(queries, blocks, k, metric):
  faiss = import_extra("faiss", "backend='faiss'", "faiss")
  kind = faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP
  index = kind(queries.shape[1])
  for block in blocks:
    index.add(block)
  scores, indices = index.search(queries, min(k, index.ntotal))
  return indices, np.sqrt(np.maximum(scores, 0)) if metric == "l2" else scores


def vote(labels_Qxk: np.ndarray) -> np.ndarray:
  """[Q] the class of most neighbours; between equally many, that of the nearest one."""
  same_Qxkxk = labels_Qxk[:, :, None] == labels_Qxk[:, None, :]
  return np.take_along_axis(labels_Qxk, same_Qxkxk.sum(2).argmax(1)[:, None], 1)[:, 0]


def accuracy(
  neighbours_Qxk: np.ndarray, corpus_labels_N: np.ndarray, query_labels_QxR: np.ndarray, k: int
) -> float:
  """Share of queries whose k nearest neighbours vote for one of the query's classes.

  Args:
    neighbours_Qxk: row numbers, nearest first, at least k.
    query_labels_QxR: up to R right classes, -1 where there are fewer; queries without any
      are not counted.
  """
  answer_Q = vote(corpus_labels_N[neighbours_Qxk[:, :k]])
  counted_Q = (query_labels_QxR >= 0).any(1)
  return float((query_labels_QxR == answer_Q[:, None]).any(1)[counted_Q].mean())
