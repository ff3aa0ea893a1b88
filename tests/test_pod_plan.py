"""Plans from the real TPU compiler, and how its programs are read."""

import dataclasses
import json

import helpers
from helpers import run_program
import jax
import jax.numpy as jnp
import pytest

from matformer_jax import UserError, sharding
from matformer_jax import granularity as gran
from matformer_jax.config import MatLMConfig
from matformer_jax.models import loss_kernel, matlm
from matformer_jax.planning import estimate, report, slices
from matformer_jax.tasks.language import NextToken
from matformer_jax.tpu import chips, hlo
from matformer_jax.training.trainer import Trainer

TPU_TEXT = """HloModule jit_step

FileNames
1 "/a/layers.py"
2 "/b/ops.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=12 end_line=13 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%fused_computation.7 (p: bf16[8,16]) -> bf16[8,64] {
  ROOT %all-gather.9 = bf16[8,64]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={1}
}

%async_collective_fusion.1 (p: bf16[8,16]) -> bf16[8,64] {
  ROOT %all-gather.10 = bf16[8,64]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={1}
}

%all-reduce-scatter (p: bf16[64,8]) -> bf16[16,8] {
  %all-reduce.1 = bf16[64,8]{1,0} all-reduce(%p), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %async-collective-start = (bf16[8,16], bf16[8,64]) fusion(%x), kind=kCustom, calls=%fused_computation.7
  %fusion.1 = bf16[8,64] fusion(%y), kind=kCustom, calls=%async_collective_fusion.1, backend_config={"estimated_cycles":"100"}
  %fusion.2 = bf16[16,8] fusion(%z), kind=kCustom, calls=%all-reduce-scatter, backend_config={"estimated_cycles":"10"}
}

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

ENTRY %main (a: f32[]) -> f32[] {
  %while.1 = (s32[], bf16[8,16]) while(%t), condition=%condition, body=%body
  %fusion.3 = f32[] fusion(%a), kind=kLoop, calls=%none, metadata={op_name="jit(f)/mul" stack_frame_id=2}, backend_config={"estimated_cycles":"7"}
  %odd = f32[] fusion(%a), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %all-reduce.2 = (f32[], f32[4]) all-reduce(%a, %b), replica_groups=[2,8]<=[16], to_apply=%add
}
"""


def test_reading_a_tpu_program():
  """Loops count, pieces of one asynchronous collective do not, fused reduce-scatters are seen."""
  assert hlo.totals(TPU_TEXT) == {
    "all-gather": (12, 12 * 1024),
    "reduce-scatter": (12, 12 * 256),
    "all-reduce": (2, 20),
  }
  found = {c.kind: c for c in hlo.collectives(TPU_TEXT)}
  assert found["all-gather"].hidden and not found["all-reduce"].hidden
  assert [found[k].group for k in ("all-gather", "reduce-scatter", "all-reduce")] == [4, 4, 8]
  assert found["all-gather"].wire_bytes == 12 * 1024 * 3 / 4
  assert found["reduce-scatter"].wire_bytes == 12 * 256 * 3
  assert found["all-reduce"].wire_bytes == 2 * 20 * 7 / 8
  assert hlo.estimated_cycles(TPU_TEXT) == 12 * 110 + 7
  operations = hlo.operations(TPU_TEXT)
  assert [(o.cycles, o.times) for o in operations] == [(1200, 12), (120, 12), (7, 1)]
  last = operations[-1]
  assert (last.name, last.shape) == ("fusion.3", "f32[]")
  assert (last.op, last.source) == ("jit(f)/mul", "ops.py:12")
  assert {o.source for o in operations[:-1]} == {""}


def test_scores_that_the_attention_kernel_computes():
  """Of a causal mask in 4 x 4 blocks, 10 are not skipped."""
  assert estimate.product_area(2048, 512, causal=True) == 10 * 512**2
  assert estimate.product_area(1024, 1024, causal=True) == 1024**2
  assert estimate.product_area(2048, 512, causal=False) == 2048**2


@pytest.mark.parametrize("remat,attention_products", [("none", 2 + 5), ("attn_out", 2 * 2 + 5)])
def test_flops_of_a_steps_kernels(remat, attention_products, monkeypatch):
  """One block of attention, heads padded to 128; two products of the loss, with logits kept."""
  tiles = loss_kernel.Tiles(rows=128, vocab=256, keep_logits=True, vmem_bytes=0, interpret=True)
  monkeypatch.setattr(loss_kernel, "choose_tiles", lambda *sizes: tiles)
  config = helpers.get_config("tiny")
  config.model.update(dict(seq_len=256, vocab_size=512))
  config.update(dict(batch_size=8, dtype="bfloat16", remat=remat))
  model = MatLMConfig.from_dict(config.model)
  mesh = sharding.make_mesh(dict(fsdp=2, tensor=1), jax.devices()[:2])
  trainer = Trainer(NextToken(model, 8), config, mesh)
  v5p = chips.TPUS["v5p"]
  trainer.__dict__["execution"] = dataclasses.replace(trainer.execution, kernels=v5p)
  granularity = trainer.granularities[0]
  jaxpr = trainer.trace(granularity).jaxpr.jaxpr
  kernels = estimate.kernels(trainer, granularity, jaxpr)
  tokens, heads = 4 * 256, model.num_layers * model.num_heads
  product = 2 * tokens * 512 * model.d_model
  assert [flops for flops, _ in kernels.loss] == [product, product]
  assert kernels.attention == attention_products * heads * 4 * 2 * 256**2 * 128
  slowest = kernels.attention / v5p.core_flops + 2 * product / (0.85 * v5p.core_flops)
  assert kernels.seconds(v5p) >= slowest


def test_flops_through_loops():
  def f(w, x):
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return jnp.sum(jax.lax.scan(step, x, w)[0])

  w, x = jnp.ones((5, 8, 8)), jnp.ones((3, 8))
  product = 2 * 3 * 8 * 8
  count = lambda f: estimate.matmul_flops(jax.jit(f).trace(w, x).jaxpr.jaxpr)
  assert count(f) == 5 * product
  assert count(jax.grad(f, (0, 1))) == 5 * 4 * product  # forward, again, and two gradients


@pytest.mark.parametrize(
  "text,sizes",
  [
    ("fsdp:16", {"data": -1, "fsdp": 16, "tensor": 1}),
    ("fsdp:8,tensor:2,data:1", {"data": 1, "fsdp": 8, "tensor": 2}),
    ("", {"fsdp": 3}),
  ],
)
def test_mesh_flag(text, sizes):
  assert slices.parse_mesh(text, {"fsdp": 3}) == sizes


@pytest.mark.parametrize("text", ["fsdp=16", "rows:3", "fsdp:x"])
def test_mesh_mistakes(text):
  with pytest.raises(UserError, match="is not AXIS:SIZE"):
    slices.parse_mesh(text, {})


@pytest.mark.parametrize(
  "args,words",
  [
    ([], "--topology is missing"),
    (["--topology=v9:2x2"], "is not CHIP:SHAPE"),
    (["--topology=v5e:3x7"], "no such slice"),
    (["--topology=v5e:4x4", "--mesh=fsdp:5"], "does not use the 16 devices"),
    (
      ["--topology=v5e:4x4", "--mesh=fsdp:16", "--config.batch_size=8"],
      "batch_size=8 is not divisible",
    ),
    (["--topology=v5e:4x4", "--mesh=fsdp:0"], "does not use the 16 devices"),
    (["--topology=v5e:4x4", "--config.grad_accum=0"], "grad_accum=0 must be at least 1"),
    (["--topology=v5e:4x4", "--decode_batch=3"], "--decode_batch=3 is not divisible"),
  ],
)
def test_mistakes(args, words):
  result = run_program("pod_plan", "--config=configs/matlm.py:78M", *args)
  assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


def test_without_the_compiler(monkeypatch):
  monkeypatch.setattr(slices.importlib.util, "find_spec", lambda name: None)
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  with pytest.raises(UserError, match=r"pip install 'matformer_jax\[tpu\]'"):
    slices.topology_devices("v5e:4x4")


def test_list_of_chips():
  result = run_program("pod_plan", "--topology=list")
  assert result.returncode == 0
  for name in ("v3", "v4", "v5e", "v5p", "v6e"):
    assert f"\n{name} " in result.stdout


# A third of the time to compile; which collectives there are does not depend on it.
QUICKLY = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"}


def plan(*args, env=None) -> dict:
  result = run_program(
    "pod_plan", "--config=configs/matlm.py:78M", "--topology=v5e:4x4", "--json", *args, env=env
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)


@pytest.mark.slow
def test_a_plan_of_78m_on_a_small_slice():
  """Tensor degrees 1 and 4: nesting costs no collective, and a small size gathers less."""
  config = MatLMConfig.from_dict(helpers.get_config("78M").model)
  ffn = [2 * 2 * config.num_layers * width * config.d_model for width in config.ffn_widths]  # bf16
  for tensor in (1, 4):
    # AdamW, which works element by element: Adafactor's moments of the full tree are factored
    # along other axes than a narrow model's.
    args = (
      f"--mesh=fsdp:4,tensor:{tensor}",
      "--config.optim.name=adamw",
      "--config.model.vocab_size=8192",  # half the time to compile
      "--config.layers=scanned",
    )
    sizes = "--granularities=S,XL" if tensor == 1 else "--granularities=S"
    told = plan(*args, sizes, env=QUICKLY)
    # The loss's kernels compile for the chip; they need the whole vocabulary on a device.
    assert told["loss"].endswith("kernels" if tensor == 1 else "XLA")
    nested = told["granularities"]
    dense = plan(*args, "--config.model.ffn_ratios=(0.5,)", env=QUICKLY)["granularities"]["G1"]
    for kind in ("all-gather", "reduce-scatter"):
      assert nested["S"]["collective_count"][kind] == dense["collective_count"][kind]
      assert nested["S"]["collective_bytes"][kind] == dense["collective_bytes"][kind]
    for kind in ("all-to-all", "collective-permute"):
      assert nested["S"]["collective_count"].get(kind, 0) <= dense["collective_count"].get(kind, 0)
    if tensor == 1:
      row = nested["XL"]
      saved = row["collective_bytes"]["all-gather"] - nested["S"]["collective_bytes"]["all-gather"]
      # Gathered twice a step, forward and backward: S takes less than half of XL's FFN bytes.
      assert saved == 2 * (ffn[3] - ffn[0]) > 0.5 * 2 * ffn[3]
      assert row["fits"] and 0 < row["hbm_bytes_per_core"] < row["hbm_capacity"] == 16 * 2**30
      assert row["estimated_cycles"] > 0 and 0 < row["mfu"] < 1
      assert row["step_time_s"] >= max(row["bounds"].values())


def test_a_plan_of_two_slices():
  """Each sends the gradients of its own shards, of the sampled size, once a step."""
  args = (
    *("--topology=v5e:2x2", "--mesh=fsdp:4", "--granularities=S", "--config.optim.name=adamw"),
    *("--config.model.num_layers=2", "--config.model.vocab_size=8192"),
    "--config.batch_size=32",
  )
  config = helpers.get_config("78M")
  config.model.update(num_layers=2, vocab_size=8192)
  model = MatLMConfig.from_dict(config.model)
  small = gran.submodel_config(model, gran.parse("S", model))
  shapes = jax.eval_shape(lambda: matlm.init_params(small, jax.random.key(0)))
  gradients = sum(
    4 * leaf.size / (4 if "embed" in sharding.logical_axes(sharding.path_names(path)) else 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  )
  told = plan(*args, "--slices=2", "--config.slice_grad_dtype=bfloat16", env=QUICKLY)
  assert told["mesh"] == {"slices": 2, "data": 1, "fsdp": 4, "tensor": 1} and told["chips"] == 8
  row = told["granularities"]["S"]
  assert row["slice_wire_bytes"] == pytest.approx(gradients / 2, rel=3e-3)  # and losses
  assert row["slice_s"] == pytest.approx(row["slice_wire_bytes"] / 3.125e9)  # of one chip
  assert "2 slices of v5e:2x2" in report.plan_tables(told)


def test_a_plan_of_decoding():
  """By a model whose steps are unrolled: it decodes in a loop, as a loaded one."""
  args = ("--config.model.num_layers=2", "--config.model.vocab_size=8192", "--granularities=S")
  told = plan(*args, "--decode_batch=16", env=QUICKLY)
  assert told["layers"] == "unrolled"
  row = told["granularities"]["S"]["decode"]
  assert row["fits"] and row["tokens_per_s"] == pytest.approx(16 / row["token_time_s"])


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_a_way_out():
  args = (
    "--granularities=XL",
    "--config.remat=none",
    "--config.model.num_layers=64",
    "--config.model.ffn_groups=1",
    "--config.model.d_model=1024",
  )
  told = plan(*args)
  assert not told["fits"] and not told["granularities"]["XL"]["fits"]
  assert told["granularities"]["XL"]["hbm_bytes_per_core"] > 16 * 2**30
  assert "more than there is" in told["advice"][0] and "--config.remat=full" in told["advice"][0]


def test_a_plan_of_images():
  args = (
    "--config=configs/matvit.py:digits",
    "--topology=v3:2x2",
    "--granularities=S",
    "--config.model.dropout=0.1",
    "--config.mixup=0.5",
  )
  # Not QUICKLY: at low effort libtpu 0.0.42 crashes on a mesh of data alone.
  result = run_program("pod_plan", *args, "--json")
  assert result.returncode == 0, result.stderr
  told = json.loads(result.stdout)
  assert told["unit"] == "img" and told["fits"] and told["mesh"]["data"] == 8
  row = told["granularities"]["S"]
  assert row["tokens_per_s"] == pytest.approx(64 / row["step_time_s"])
  # Mixup takes the row before from the neighbour, and gathers nothing.
  assert set(row["collective_count"]) <= {"all-reduce", "collective-permute"}
  result = run_program("pod_plan", *args, "--decode_batch=8")
  assert result.returncode == 1 and "does not decode" in result.stderr


def test_the_dearest_operations_are_named():
  tpu = chips.TPUS["v5p"]
  row = {"top": estimate.dearest(TPU_TEXT, tpu, 2)}
  assert [o["ms"] for o in row["top"]["operations"]] == [
    pytest.approx(1e3 * cycles / tpu.clock_hz) for cycles in (1200, 120)
  ]
  kinds = [c["kind"] for c in row["top"]["exposed"]]
  assert kinds == ["reduce-scatter", "all-reduce"]  # the all-gather runs beside computation
  text = "\n".join(report._dearest_tables("XL", row["top"]))
  assert "bf16[8,64]" in text and "reduce-scatter" in text
