"""Architecture search: the predictor, evolution, and what `search --nas` writes."""

import itertools
import json

from helpers import run_program
import numpy as np
import pytest

from matformer_jax import granularity as gran
from matformer_jax.checkpoints import card as cards
from matformer_jax.config import model_config
from matformer_jax.evals import nas

LAYERS, SIZES = 6, 4
EVERY = list(itertools.product(range(SIZES), repeat=LAYERS))


def true_loss(architectures) -> np.ndarray:
  """Deeper layers matter more, wider gains less, and neighbours should be alike."""
  a = np.asarray(architectures, float)
  gain = (1 - 0.5**a) @ np.linspace(0.05, 0.3, LAYERS)
  return 3 - gain + 0.01 * np.abs(np.diff(a)).sum(1)


def cost(architecture) -> int:
  return sum((1, 2, 4, 8)[size] for size in architecture)


def test_evolution_finds_the_best_there_is():
  """Against all 4,096 architectures, at three budgets."""
  losses = true_loss(EVERY)
  for budget in (10, 20, 34):
    fits = lambda a, budget=budget: cost(a) <= budget
    allowed = [(loss, a) for loss, a in zip(losses, EVERY) if fits(a)]
    rng = np.random.default_rng(0)
    found, asked = nas.evolve(true_loss, fits, [(0,) * LAYERS], (SIZES - 1,) * LAYERS, rng)
    assert fits(found) and asked == 2064
    best, worst = min(allowed)[0], max(allowed)[0]
    assert true_loss([found])[0] - best < 0.02 * (worst - best)


def test_mutation_stays_within_what_is_stored():
  tops, rng = (3, 0, 1, 2), np.random.default_rng(0)
  for _ in range(200):
    child = nas._mutate((2, 0, 1, 1), lambda a: sum(a) <= 4, tops, rng)
    assert sum(child) <= 4 and all(0 <= size <= top for size, top in zip(child, tops))


def test_a_predictor_learns_what_can_be_learned():
  rng = np.random.default_rng(1)
  some = nas.sample_architectures((SIZES - 1,) * LAYERS, 300, rng)
  losses = true_loss(some)
  learned = nas.fit(some, losses, SIZES, seed=0)
  assert learned.trained_on == 180 and learned.tested_on == 120
  assert learned.mse < 0.05 * learned.variance and learned.rank_correlation > 0.97
  rest = [a for a in EVERY if a not in set(some)]
  error = np.mean((learned(rest) - true_loss(rest)) ** 2)  # the error it states is its error
  assert error < 3 * learned.mse
  noise = nas.fit(some, rng.normal(3, 0.1, len(some)), SIZES, seed=0)
  assert noise.mse > 0.7 * noise.variance and abs(noise.rank_correlation) < 0.4


def test_architectures_of_all_sizes_are_sampled():
  tops = (3,) * 15 + (1,)
  some = nas.sample_architectures(tops, 500, np.random.default_rng(0))
  assert len(set(some)) == 500 and max(a[-1] for a in some) == 1
  means = np.array([np.mean(a[:-1]) for a in some])
  # Layers drawn evenly would leave both ends empty: 3.5 standard deviations away.
  assert (means < 0.5).mean() > 0.05 and (means > 2.5).mean() > 0.05
  few = nas.sample_architectures((1, 1), 100, np.random.default_rng(0))
  assert sorted(few) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("budget", ["0.95x"])
def test_search_compares_it_with_mix_n_match(tiny_run, tmp_path, budget):
  result = run_program(
    *("search", f"--workdir={tiny_run}", f"--out={tmp_path}", f"--budgets={budget}", "--nas=20"),
    *("--random=2", "--rungs=2", "--batches=1", "--nas_batches=1"),
  )
  assert result.returncode == 0, result.stderr
  assert "NAS: 16 architectures measured on 8 other windows each" in result.stdout  # 4^2 in all
  told = json.loads((tmp_path / "search.json").read_text())
  assert told["nas"]["architectures_measured"] == 16 and told["nas"]["windows_each"] == 8
  assert told["nas"]["predictor_trained_on"] == 10 and told["nas"]["losses_predicted"] == 2064
  rows = {row["kind"]: row for row in told["rows"] if row["budget"] == budget}
  for kind in ("nas", "best measured"):
    assert rows[kind]["params"] <= rows["mix_n_match"]["params"]
    gran.parse(rows[kind]["granularity"], model_config(cards.read(tiny_run)))  # for `extract`
  assert "NAS  " in result.stdout


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--nas=20"], "give --budgets"),
    (["--nas=5", "--budgets=0.9x"], "at least 20"),
    (["--nas=20", "--budgets=0.9x", "--batches=0"], "lower --batches"),
  ],
)
def test_mistakes(tiny_run, tmp_path, args, words):
  result = run_program("search", f"--workdir={tiny_run}", f"--out={tmp_path}", *args)
  assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr
