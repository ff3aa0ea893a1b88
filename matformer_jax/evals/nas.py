"""Architecture search as OFA does it (Appendix B.3, D.2): a loss predictor and evolution.

Measured (architecture, loss) pairs train a predictor, and regularised evolution (Real et al.
2019) asks it for the best architecture within a budget. Mix'n'Match needs neither.

An architecture is int [L], the size of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

LEAST = 20  # pairs to learn from
TRAIN_SHARE = 0.6  # of the pairs; the rest tell the predictor's error (D.2)
_SPREAD = 0.5  # of the shares of sizes (Dirichlet); less: more architectures near S and XL
_HIDDEN = (128, 128)
_STEPS = 2000
POPULATION = 64
_TOURNAMENT = 16
_CYCLES = 2000


def sample_architectures(
  tops: Sequence[int], number: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
  """Distinct random architectures, of all overall sizes.

  How often each size occurs in one is drawn first: layers drawn evenly, as OFA's are, nearly all
  make models of about the middle size.

  Args:
    tops: [L] the largest size of each layer.
    number: at most; there are no more than the product of (top + 1).
  """
  found: dict[tuple[int, ...], None] = {}
  for _ in range(20 * number):
    if len(found) == number:
      break
    shares = rng.dirichlet(np.full(max(tops) + 1, _SPREAD))
    layers = rng.choice(len(shares), len(tops), p=shares)
    found[tuple(int(i) for i in np.minimum(layers, tops))] = None
  return list(found)


@dataclasses.dataclass(frozen=True)
class Predictor:
  """A loss for every architecture: an MLP over one-hot layers, as in OFA.

  Attributes:
    mse: mean squared error on the pairs that it was not trained on.
    variance: of their losses, what a constant would get.
    rank_correlation: Spearman's, on the same.
    trained_on, tested_on: numbers of pairs.
  """

  layers: list[tuple[np.ndarray, np.ndarray]]
  num_sizes: int
  mse: float
  variance: float
  rank_correlation: float
  trained_on: int
  tested_on: int

  def __call__(self, architectures) -> np.ndarray:
    """float [n]: losses of int [n, L]."""
    return _forward(self.layers, one_hot(architectures, self.num_sizes), np)


def one_hot(architectures, num_sizes: int) -> np.ndarray:
  """float32 [n, L * num_sizes] of int [n, L]."""
  array = np.asarray(architectures)
  return np.eye(num_sizes, dtype=np.float32)[array].reshape(len(array), -1)


def fit(
  architectures: Sequence[Sequence[int]], losses: np.ndarray, num_sizes: int, seed: int
) -> Predictor:
  """Trains a predictor on 60% of the pairs, and measures it on the others.

  Args:
    architectures: n of L sizes each.
    losses: of each, float [n].
  """
  order = np.random.default_rng(seed).permutation(len(losses))
  split = round(TRAIN_SHARE * len(losses))
  train, test = order[:split], order[split:]
  x = one_hot(architectures, num_sizes)
  shift, scale = float(losses[train].mean()), float(losses[train].std()) or 1.0
  layers = _train(x[train], (losses[train] - shift) / scale, seed)
  # The last layer's weights take the scale, so that predictions are losses.
  weight, bias = layers[-1]
  layers[-1] = (weight * scale, bias * scale + shift)
  predicted = _forward(layers, x[test], np)
  rank = lambda values: np.argsort(np.argsort(values))
  return Predictor(
    layers=layers,
    num_sizes=num_sizes,
    mse=float(np.mean((predicted - losses[test]) ** 2)),
    variance=float(np.var(losses[test])),
    rank_correlation=float(np.corrcoef(rank(predicted), rank(losses[test]))[0, 1]),
    trained_on=len(train),
    tested_on=len(test),
  )


def _forward(layers, x, xp):
  for weight, bias in layers[:-1]:
    x = xp.maximum(x @ weight + bias, 0)
  weight, bias = layers[-1]
  return (x @ weight + bias)[:, 0]


def _train(x: np.ndarray, y: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Weights of the MLP, by AdamW on all pairs at a time."""
  widths = (x.shape[1], *_HIDDEN, 1)
  init = jax.nn.initializers.he_normal()
  keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
  shapes = itertools.pairwise(widths)
  layers = [(init(key, (n, m)), jnp.zeros(m)) for key, (n, m) in zip(keys, shapes, strict=True)]
  optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, _STEPS), weight_decay=0.01)
  loss = lambda layers: jnp.mean((_forward(layers, x, jnp) - y) ** 2)

  def step(carry, _):
    layers, state = carry
    updates, state = optimizer.update(jax.grad(loss)(layers), state, layers)
    return (optax.apply_updates(layers, updates), state), None

  run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=_STEPS)[0][0])
  return jax.tree.map(np.asarray, run((layers, optimizer.init(layers))))


def evolve(
  predict: Callable[[Sequence[Sequence[int]]], np.ndarray],
  fits: Callable[[Sequence[int]], bool],
  start: Sequence[tuple[int, ...]],
  tops: Sequence[int],
  rng: np.random.Generator,
) -> tuple[tuple[int, ...], int]:
  """The best architecture found by regularised evolution (Real et al. 2019, Algorithm 1).

  A child is the best of a random sample of the population with one layer of another size,
  and takes the place of the oldest. Where it does not fit, other layers are made smaller.

  Args:
    predict: losses of architectures.
    fits: whether an architecture is within the budget.
    start: architectures that fit, the first of the population.
    tops: [L] the largest size of each layer.

  Returns:
    (the architecture, how many losses were predicted).
  """
  first = [start[i % len(start)] for i in range(POPULATION)]
  population = list(zip(predict(first), first))
  best = min(population)
  for _ in range(_CYCLES):
    contestants = rng.choice(len(population), _TOURNAMENT, replace=False)
    _, parent = min(population[i] for i in contestants)
    child = _mutate(parent, fits, tops, rng)
    population.append((predict([child])[0], child))
    best = min(best, population[-1])
    del population[0]
  return best[1], POPULATION + _CYCLES


def _mutate(parent, fits, tops, rng) -> tuple[int, ...]:
  child = list(parent)
  open_layers = [i for i, top in enumerate(tops) if top]
  layer = open_layers[rng.integers(len(open_layers))]
  others = [size for size in range(tops[layer] + 1) if size != child[layer]]
  child[layer] = others[rng.integers(len(others))]
  while not fits(child):
    wide = [i for i, size in enumerate(child) if size and i != layer]
    if not wide:
      return parent
    child[wide[rng.integers(len(wide))]] -= 1
  return tuple(child)
