"""The search of `pod_plan --tune`, on a made-up cost of each candidate; nothing is compiled."""

import dataclasses

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


@dataclasses.dataclass
class Machine:
  """What steps cost; memory in GiB on one core.

  Attributes:
    cost: as COST, by remat policy.
    seen: settings of every candidate that was compiled.
    logits: of all logits at once.
    split: of what the fsdp axis splits.
    tensor_s: seconds that each further device of the tensor axis costs.
  """

  cost: dict[str, tuple[float, float]] = dataclasses.field(default_factory=lambda: dict(COST))
  seen: list[dict] = dataclasses.field(default_factory=list)
  logits: float = 0.0
  split: float = 0.0
  tensor_s: float = 0.1

  def need(self, size: float) -> None:
    """Lets every remat policy take as much memory."""
    self.cost = {remat: (seconds, size) for remat, (seconds, _) in COST.items()}


@pytest.fixture
def compiled(monkeypatch) -> Machine:
  """Replaces the compiler by a made-up machine."""
  machine = Machine()

  def open_trainer(config, topology, mesh_sizes=""):
    mesh = sharding.make_mesh(dict(config.mesh))
    sharding.check_batch(config.batch_size, config.grad_accum, mesh)
    task = NextToken(MatLMConfig.from_dict(config.model), config.batch_size)
    return Trainer(task, config, mesh), chips.TPUS["v5e"]

  def plan_step(trainer, granularity, tpu, top=0):
    s = tune.describe(trainer)
    machine.seen.append(s)
    seconds, size = machine.cost[s["remat"]]
    seconds += 0.05 * abs(s["fsdp"] - 4) + machine.tensor_s * (s["tensor"] - 1)
    seconds += 0.1 * (s["layers"] == "scanned") + 0.1 * (s["grad_accum"] - 1)
    seconds += 0.01 * (s["chunks"] - 1)
    size = size / s["grad_accum"] + machine.logits / s["chunks"] + machine.split / s["fsdp"]
    return {
      "hbm_capacity": 16 * GIB,
      "hbm_bytes_per_core": size * GIB,
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
  return machine


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
  assert len(compiled.seen) < 40
  once = {tuple(settings.values()) for settings in compiled.seen}
  assert len(once) == len(compiled.seen) - tune.FINALISTS
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
  assert all(settings["remat"] != "none" for settings in compiled.seen)


def test_micro_batches_until_it_fits(compiled):
  compiled.need(40)
  config = tiny_config()
  config.mesh.update(dict(data=1, fsdp=8))
  assert tune.tune(config, "v5e:2x4")["settings"]["grad_accum"] == 4


def test_fewer_logits_at_a_time_until_it_fits(compiled):
  """Of 8 GiB, though the memory that logits may take is far above what they take."""
  compiled.logits = 8.0
  compiled.need(13)
  config = tiny_config(remat="none")
  won = tune.tune(config, "v5e:2x4")["settings"]
  assert won["chunks"] == 4 and won["grad_accum"] == 1


def test_fsdp_until_it_fits(compiled):
  """Only over all 8 devices do 40 GiB fit; one micro-batch is faster than two."""
  compiled.need(10)
  compiled.split = 40.0
  config = tiny_config(remat="none", batch_size=8)
  won = tune.tune(config, "v5e:2x4")["settings"]
  assert (won["remat"], won["data"], won["fsdp"], won["grad_accum"]) == ("none", 1, 8, 1)


def test_a_tensor_axis_where_it_helps(compiled):
  compiled.tensor_s = -0.1
  won = tune.tune(tiny_config(remat="full"), "v5e:2x4")["settings"]
  assert (won["fsdp"], won["tensor"]) == (4, 2)


def test_a_config_whose_first_mesh_is_no_good(compiled):
  """Fewer micro-batches once a larger fsdp axis makes room."""
  compiled.need(10)
  compiled.split = 24.0
  config = tiny_config(remat="none", grad_accum=4)
  won = tune.tune(config, "v5e:2x4")["settings"]
  assert (won["fsdp"], won["grad_accum"]) == (4, 2)


def test_a_policy_that_is_tried_already_does_not_count_as_slower(compiled):
  """What recomputes more is faster here, as where it makes XLA copy less."""
  compiled.cost = {remat: (2.0 - 0.1 * i, 8) for i, remat in enumerate(COST)}
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


def test_nothing_fits(compiled):
  compiled.need(500)
  with pytest.raises(UserError, match="larger slice"):
    tune.tune(tiny_config(), "v5e:2x4")


def test_keys_that_older_configs_lack():
  config = tiny_config()
  del config.logits_gib
  config.lock()  # as a program's is
  assert tune.changed(config, {"logits_gib": 2.0, "mesh.fsdp": 2}).logits_gib == 2.0
  assert jax.device_count() == 8  # what the meshes above divide
