"""Goodput when machines fail, against what is known in closed form."""

import dataclasses
import math

import pytest

from matformer_jax.planning import failures
from matformer_jax.planning.failures import Job, goodput


def test_without_failures_only_saving_costs():
  job = Job(chips=256, chip_hours=1e9, save_s=10)
  assert goodput(job, 90.0) == pytest.approx(0.9, abs=2e-3)


@pytest.mark.parametrize("interval_s", [300.0, 3600.0])
def test_an_exponential_job_in_closed_form(interval_s):
  """A renewal: the checkpoints before a failure, over the time until the next start."""
  job = Job(chips=8192, save_s=20, write_s=0, restart_s=200, replace_s=400)
  cycle, mean = interval_s + job.save_s, job.failure_s
  checkpoints = 1 / math.expm1(cycle / mean)
  expected = checkpoints * interval_s / (mean + job.restart_s + job.replace_s)
  assert goodput(job, interval_s) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("chips", [256, 8192])
def test_the_best_interval_is_young_and_dalys(chips):
  job = Job(chips=chips)
  best = failures.best_interval(job)
  assert 1 / 1.5 < best / job.daly_s() < 1.5
  assert goodput(job, best) - goodput(job, job.daly_s()) < 2e-3


def test_an_elastic_job_does_not_wait():
  """It loses the slice, not the time until that is replaced."""
  job = Job(chips=8192, slices=32, replace_s=3600)
  assert goodput(job, 600, elastic=True) > goodput(job, 600) + 0.05
  alone = dataclasses.replace(job, slices=1)
  assert goodput(alone, 600, elastic=True) == goodput(alone, 600)


def test_rows_are_of_jobs_with_slices_of_one_size():
  job = Job(chips=512, slices=2)
  found = failures.rows(job, 0)
  assert [(row["chips"], row["slices"]) for row in found][:3] == [(256, 1), (512, 2), (1024, 4)]
  assert found[0]["elastic"] is None and all(row["as_configured"] is None for row in found)
  shares = [row["goodput"] for row in found]
  assert shares == sorted(shares, reverse=True)
  assert "8,192" in failures.table(found, job)
