"""The search of `pod_plan --tune`, on a made-up cost of each candidate; nothing is compiled."""

import helpers
import jax
import pytest

from matformer_jax import UserError, sharding
from matformer_jax.config import MatLMConfig
from matformer_jax.planning import estimate, plan, tune
from matformer_jax.tasks.language import NextToken
from matformer_jax.tpu import chips
from matformer_jax.training.trainer import Trainer

GIB = 2**30
# remat: (seconds, GiB with one micro-batch); 16 GiB are there, of which 5% are kept free.
COST = {
  "none": (1.0, 20),
  "products": (1.2, 18),
  "dots_no_batch": (1.3, 17),
  "attn_out_ffn_pre": (1.4, 15),
  "attn_out": (1.5, 12),
  "full": (1.6, 10),
}


@pytest.fixture
def compiled(monkeypatch):
  """Replaces the compiler; collects (remat, fsdp, micro-batches, layers) of what it was given."""
  seen = []

  def open_trainer(config, topology, mesh_sizes=""):
    mesh = sharding.make_mesh(dict(config.mesh))
    sharding.check_batch(config.batch_size, config.grad_accum, mesh)
    task = NextToken(MatLMConfig.from_dict(config.model), config.batch_size)
    return Trainer(task, config, mesh), chips.TPUS["v5e"]

  def plan_step(trainer, granularity, tpu, top=0):
    remat, fsdp = trainer.execution.remat, trainer.mesh.shape["fsdp"]
    layers = "scanned" if trainer.execution.scan_layers else "unrolled"
    seen.append((remat, fsdp, trainer.config.grad_accum, layers))
    seconds, size = COST[remat]
    seconds += 0.05 * abs(fsdp - 4) + 0.1 * (layers == "scanned")
    seconds += 0.1 * (trainer.config.grad_accum - 1)
    return {
      "hbm_capacity": 16 * GIB,
      "hbm_bytes_per_core": size * GIB / trainer.config.grad_accum,
      "step_time_s": seconds,
      "mfu": 0.1 / seconds,
    }

  def make_plan(config, topology, say):
    trainer, tpu = open_trainer(config, topology)
    row = plan_step(trainer, trainer.granularities[-1], tpu)
    mean = {"step_time_s": row["step_time_s"], "mfu": row["mfu"], "tokens_per_s": 1.0}
    return {"granularities": {"XL": row}, "mean": mean, "unit": "tok"}

  monkeypatch.setattr(plan, "open_trainer", open_trainer)
  monkeypatch.setattr(plan, "make_plan", make_plan)
  monkeypatch.setattr(estimate, "plan_step", plan_step)
  monkeypatch.setattr(estimate, "least_seconds", lambda *step: 0.9)
  return seen


def tiny_config(**changes):
  config = helpers.get_config("tiny")
  config.mesh.update(dict(data=-1, fsdp=1))
  config.batch_size, config.remat = 32, "attn_out"
  config.update(changes)
  return config


def test_it_finds_the_fastest_that_fits(compiled):
  config = tiny_config()
  before = config.to_json()
  result = tune.tune(config, "v5e:2x4")
  won = result["settings"]
  assert (won["remat"], won["fsdp"], won["grad_accum"], won["layers"]) == ("none", 4, 2, "unrolled")
  assert config.to_json() == before
  assert len(compiled) < 30 and len(set(compiled)) == len(compiled) - tune.FINALISTS
  verdicts = [rung["verdict"] for rung in result["ladder"]]
  assert "does not fit" in verdicts and verdicts.count("best so far") > 2
  again = tune.changed(config, result["overrides"])
  assert (again.remat, again.mesh.fsdp, again.grad_accum) == ("none", 4, 2)


def test_the_winner_is_told_as_flags(compiled):
  text = tune.tune_tables(tune.tune(tiny_config(), "v5e:2x4"))
  flags = text.splitlines()[-1].split()
  assert {"--config.remat=none", "--config.mesh.fsdp=4", "--config.grad_accum=2"} <= set(flags)
  assert "does not fit" in text and "best so far" in text


def test_what_cannot_be_faster_is_not_compiled(compiled, monkeypatch):
  slow = lambda trainer, *_: 9.0 if trainer.execution.remat == "none" else 0.9
  monkeypatch.setattr(estimate, "least_seconds", slow)
  result = tune.tune(tiny_config(), "v5e:2x4")
  skipped = [r for r in result["ladder"] if r["settings"]["remat"] == "none"]
  assert skipped and all(r["verdict"] == "skipped: takes 9,000 ms or more" for r in skipped)
  assert all(remat != "none" for remat, *_ in compiled)


def test_micro_batches_until_it_fits(compiled, monkeypatch):
  for remat, (seconds, _) in COST.items():
    monkeypatch.setitem(COST, remat, (seconds, 40))
  config = tiny_config()
  config.mesh.update(dict(data=1, fsdp=8))
  assert tune.tune(config, "v5e:2x4")["settings"]["grad_accum"] == 4


def test_a_policy_that_is_tried_already_does_not_count_as_slower(compiled, monkeypatch):
  """What recomputes more is faster here, as where it makes XLA copy less."""
  for i, remat in enumerate(COST):
    monkeypatch.setitem(COST, remat, (2.0 - 0.1 * i, 8))
  assert tune.tune(tiny_config(remat="products"), "v5e:2x4")["settings"]["remat"] == "full"


def test_the_winner_fits_for_every_size(compiled, monkeypatch):
  make_plan = plan.make_plan

  def too_large_for_some(config, topology, say):
    whole = make_plan(config, topology, say=say)
    return whole if config.remat == "full" else whole | {"mean": None}

  monkeypatch.setattr(plan, "make_plan", too_large_for_some)
  assert tune.tune(tiny_config(), "v5e:2x4")["settings"]["remat"] == "full"
  monkeypatch.setattr(plan, "make_plan", lambda *args, say: {"mean": None, "granularities": {}})
  with pytest.raises(UserError, match="for all sizes"):
    tune.tune(tiny_config(), "v5e:2x4")


def test_nothing_fits(compiled, monkeypatch):
  for remat, (seconds, _) in COST.items():
    monkeypatch.setitem(COST, remat, (seconds, 500))
  with pytest.raises(UserError, match="larger slice"):
    tune.tune(tiny_config(), "v5e:2x4")


def test_keys_that_older_configs_lack():
  config = tiny_config()
  del config.logits_gib
  config.lock()  # as a program's is
  assert tune.changed(config, {"logits_gib": 2.0, "mesh.fsdp": 2}).logits_gib == 2.0
  assert jax.device_count() == 8  # what the meshes above divide
