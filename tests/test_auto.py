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


def chosen(row: str, rows: int, chip: str, scanned: bool = False) -> str:
  config = MatLMConfig.from_dict(helpers.get_config(row).model)
  tpu = chips.TPUS[chip]
  logits = Execution.for_platform("tpu", device_kind=tpu.device_kind).logits_bytes
  return auto.remat_for(config, rows, 2**30, logits, tpu, scanned)


def test_more_is_recomputed_where_memory_is_scarce():
  assert chosen("850M", 16, "v5p") == "none"
  assert chosen("850M", 16, "v5p", scanned=True) == "products"
  assert chosen("2.6B", 4, "v5e") == "attn_out"
  assert chosen("2.6B", 64, "v5e") == "full"
  order = [*POLICIES, "full"]
  ranks = [order.index(chosen("850M", rows, "v5e")) for rows in (1, 4, 8, 16, 64, 256)]
  assert ranks == sorted(ranks) and ranks[0] < ranks[-1]


def test_a_policy_that_recomputes_less_saves_more():
  config = MatLMConfig.from_dict(helpers.get_config("850M").model)
  for changed in (config, dataclasses.replace(config, gated=True)):
    sizes = [auto.saved_bytes(changed, 4, p) for p in (*POLICIES, "full")]
    assert sizes == sorted(sizes, reverse=True)


def test_memory_for_logits():
  make = Execution.for_platform
  assert make("tpu", logits_gib=1.5).logits_bytes == 3 * 2**29
  with pytest.raises(UserError, match="logits_gib=-1"):
    make("tpu", logits_gib=-1)


def executed(chip: str = "TPU v5", seq_len: int = 1024, **changes) -> Execution:
  """How 850M is run on one device with 4 GiB of parameters, and so of gradients."""
  config = helpers.get_config("850M")
  config.model.seq_len = seq_len
  config.batch_size = 16
  config.update(changes)
  device = types.SimpleNamespace(platform="tpu", device_kind=chip)
  mesh: Any = types.SimpleNamespace(
    devices=np.array([device], object), shape=dict(data=1, fsdp=1, tensor=1), size=1
  )
  state: Any = types.SimpleNamespace(params={})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(auto, "tree_bytes", lambda tree: 4 * 2**30 if tree == {} else 0)
    return auto.choose_execution(config, MatLMConfig.from_dict(config.model), mesh, state)


def test_how_a_step_is_run():
  run = executed()
  assert run.kernels is chips.TPUS["v5p"] and (run.remat, run.scan_layers) == ("none", False)
  run = executed(layers="scanned")
  assert (run.remat, run.scan_layers) == ("products", True)
  run = executed(remat="full")
  assert (run.remat, run.scan_layers) == ("full", False)
  # Where the attention kernel does not run, what it saves is not what is counted.
  for run in (executed(kernels="none"), executed("TPU v3"), executed(seq_len=1000)):
    assert (run.remat, run.scan_layers) == ("attn_out", True)
  assert executed(kernels="none").kernels is None and executed("TPU v3").kernels is None


def test_gradients_of_micro_batches_are_counted():
  """On a v5e, a second gradient of 4 GiB leaves less for what layers save."""
  device = dict(chip="TPU v5 lite", logits_gib=0.5)
  assert executed(batch_size=4, **device).remat == "none"
  assert executed(batch_size=8, grad_accum=2, **device).remat == "products"


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
