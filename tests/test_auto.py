"""What `auto` in a training config stands for, by chip and model."""

import dataclasses
import types
from typing import Any

import helpers
import jax
import numpy as np
import pytest

from matformer_jax import UserError, sharding
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.tpu import chips
from matformer_jax.training import auto

POLICIES = ("none", "products", "attn_out")


def run_on(tpu: chips.Tpu, **options) -> Execution:
  return Execution.for_platform("tpu", device_kind=tpu.device_kind, **options)


def chosen(row: str, rows: int, chip: str, scanned: bool = False, **options) -> str:
  config = MatLMConfig.from_dict(helpers.get_config(row).model)
  tpu = chips.TPUS[chip]
  execution = run_on(tpu, layers="scanned" if scanned else "unrolled", **options)
  return auto.remat_for(config, rows, 2**30, execution, tpu)


def test_more_is_recomputed_where_memory_is_scarce():
  assert chosen("850M", 16, "v5p") == "none"
  assert chosen("850M", 16, "v5p", scanned=True) == "products"
  assert chosen("2.6B", 4, "v5e") == "attn_out"
  assert chosen("2.6B", 64, "v5e") == "full"
  order = [*POLICIES, "full"]
  ranks = [order.index(chosen("850M", rows, "v5e")) for rows in (1, 4, 8, 16, 64, 256)]
  assert ranks == sorted(ranks) and ranks[0] < ranks[-1]


def test_float32_takes_twice_the_memory_and_a_tensor_axis_divides_it():
  assert chosen("2.6B", 32, "v5p", dtype="float32") == "attn_out"
  assert chosen("2.6B", 32, "v5p") == "none"
  assert chosen("850M", 8, "v5e") == "products"
  tensor = sharding.make_mesh(dict(data=2, tensor=4))
  assert chosen("850M", 8, "v5e", mesh=tensor) == "none"


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}])
def test_a_policy_that_recomputes_less_saves_more(options):
  config = MatLMConfig.from_dict(helpers.get_config("850M").model)
  execution = run_on(chips.TPUS["v5p"], **options)
  for changed in (config, dataclasses.replace(config, gated=True)):
    sizes = [auto.saved_bytes(changed, 4, p, execution) for p in (*POLICIES, "full")]
    assert sizes == sorted(sizes, reverse=True)


def test_memory_for_logits():
  make = Execution.for_platform
  assert make("tpu", logits_gib=1.5).logits_bytes == 3 * 2**29
  with pytest.raises(UserError, match="logits_gib=-1"):
    make("tpu", logits_gib=-1)


def executed(
  chip: str = "TPU v5", seq_len: int = 1024, num_layers: int = 16, parent=None, **changes
) -> Execution:
  """How 850M is run on one device with 4 GiB of parameters, and so of gradients; and of a parent,
  if {}."""
  config = helpers.get_config("850M")
  config.model.update(dict(seq_len=seq_len, num_layers=num_layers))
  config.batch_size = 16
  config.update(changes)
  device = types.SimpleNamespace(platform="tpu", device_kind=chip)
  mesh: Any = types.SimpleNamespace(
    devices=np.array([device], object), shape=dict(slices=1, data=1, fsdp=1, tensor=1), size=1
  )
  state: Any = types.SimpleNamespace(params={})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(auto, "tree_bytes", lambda tree: 4 * 2**30 if tree == {} else 0)
    return auto.choose_execution(config, MatLMConfig.from_dict(config.model), mesh, state, parent)


def test_how_a_step_is_run():
  run = executed()
  assert run.kernels is chips.TPUS["v5p"] and (run.remat, run.scan_layers) == ("none", False)
  run = executed(layers="scanned")
  assert (run.remat, run.scan_layers) == ("products", True)
  run = executed(remat="full")
  assert (run.remat, run.scan_layers) == ("full", False)
  # More layers take long to compile: they are a loop.
  assert not executed(num_layers=auto.UNROLLED).scan_layers
  assert executed(num_layers=auto.UNROLLED + 1).scan_layers
  # Where the attention kernel does not run, what it saves is not what is counted.
  for run in (executed(kernels="none"), executed("TPU v3"), executed(seq_len=1000)):
    assert (run.remat, run.scan_layers) == ("attn_out", True)
  assert executed(kernels="none").kernels is None and executed("TPU v3").kernels is None


def test_gradients_of_micro_batches_are_counted():
  """On a v5e, a second gradient of 4 GiB leaves less for what layers save."""
  device = dict(chip="TPU v5 lite", logits_gib=0.5)
  assert executed(batch_size=4, **device).remat == "none"
  assert executed(batch_size=8, grad_accum=2, **device).remat == "products"


def test_a_parent_is_counted():
  """4 GiB in float32, of which the compute dtype takes 2."""
  device = dict(chip="TPU v5 lite", logits_gib=0.5, batch_size=6)
  assert executed(**device).remat == "none"
  assert executed(**device, parent={}).remat == "products"


@pytest.mark.parametrize(
  "changes,words",
  [({"kernels": "some"}, "kernels='some'"), ({"logits_gib": -2.0}, "logits_gib=-2.0")],
)
def test_mistakes(changes, words):
  config = helpers.get_config("tiny")
  config.update(changes)
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  with pytest.raises(UserError, match=words):
    auto.choose_execution(config, MatLMConfig.from_dict(config.model), mesh, {})
