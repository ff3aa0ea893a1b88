"""What `auto` in a training config stands for, by chip and model."""

import dataclasses

import helpers
import jax
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
