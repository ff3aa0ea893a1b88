"""A bigram baseline: what a table of word pairs achieves on the same tokens."""

from __future__ import annotations

import numpy as np


def bigram_losses(
  train: np.ndarray, windows_NxT: np.ndarray, vocab_size: int, discount: float = 0.75
) -> np.ndarray:
  """[windows] cross-entropies of an interpolated Kneser-Ney bigram, summed over a window, nats.

  p(w | v) = max(c(v w) - d, 0) / c(v) + d n(v) / c(v) * q(w), where n(v) counts the
  distinct successors of v and q(w) the share of distinct predecessors of w,
  interpolated with uniform by the same discount (Chen & Goodman 1999).

  Args:
    train: 1-D token ids.
    windows_NxT: token ids; all but the first of a window are predicted.
    vocab_size: V.
    discount: d, absolute discount in (0, 1).
  """
  key = lambda tokens: tokens[..., :-1].astype(np.int64) * vocab_size + tokens[..., 1:]
  pairs, counts = np.unique(key(np.asarray(train)), return_counts=True)
  first, second = pairs // vocab_size, pairs % vocab_size
  total = np.bincount(first, weights=counts, minlength=vocab_size)
  successors = np.bincount(first, minlength=vocab_size)
  predecessors = np.bincount(second, minlength=vocab_size)
  q = (
    np.maximum(predecessors - discount, 0) + discount * np.count_nonzero(predecessors) / vocab_size
  ) / len(pairs)
  wanted = key(windows_NxT)
  v, w = wanted // vocab_size, wanted % vocab_size
  at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
  seen = np.where(pairs[at] == wanted, counts[at], 0)
  safe_total = np.maximum(total[v], 1)
  p = (
    np.maximum(seen - discount, 0) / safe_total
    + np.where(total[v] > 0, discount * successors[v] / safe_total, 1.0) * q[w]
  )
  return -np.sum(np.log(p), -1)
