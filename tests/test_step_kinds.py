"""How the benchmark against MaxText tells what a train step's operations belong to."""

import importlib
import pathlib

import pytest

from matformer_jax.tpu import hlo

TEXT = """HloModule jit_train_step

%inner (p: bf16[8,16]) -> bf16[8,64] {
  ROOT %convolution.1 = bf16[8,64]{1,0} convolution(%p, %w), dim_labels=bf_io->bf
}

%outer (p: bf16[8,16]) -> f32[8] {
  %fusion.9 = bf16[8,64]{1,0} fusion(%p), kind=kOutput, calls=%inner
  ROOT %reduce.1 = f32[8]{0} reduce(%fusion.9, %zero), dimensions={1}, to_apply=%add
}

%elementwise (p: bf16[8,16]) -> bf16[8,16] {
  ROOT %multiply.1 = bf16[8,16]{1,0} multiply(%p, %p)
}

ENTRY %main (a: bf16[8,16]) -> f32[8] {
  %fusion.1 = bf16[8,16]{1,0} fusion(%a), kind=kLoop, calls=%elementwise
  %convolution.2 = bf16[8,64]{1,0} convolution(%a, %w), dim_labels=bf_io->bf
  ROOT %fusion.2 = f32[8]{0} fusion(%fusion.1), kind=kOutput, calls=%outer
}
"""


@pytest.fixture(scope="module")
def step_kinds():
  directory = pathlib.Path(__file__).parent.parent / "benchmarks"
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(directory)
    return importlib.import_module("step_kinds")


def test_products_are_found_alone_and_in_fusions(step_kinds):
  found = step_kinds.products(TEXT)
  assert {"convolution.2", "fusion.2", "fusion.9"} <= found
  assert not {"fusion.1", "multiply.1", "reduce.1"} & found


@pytest.mark.parametrize(
  "side, op, source, is_product, expected",
  [
    ("OURS", "jit(f)/shard_map/jvp(M)/blocks/dot", "ops.py:1", True, "layers' products"),
    ("OURS", "jit(f)/shard_map/jvp(M)/blocks/add", "layers.py:1", False, "layers' rest"),
    ("OURS", "jit(f)/shard_map/jvp()/btd,btv->dv/dot", "losses.py:1", True, "head's products"),
    ("OURS", "jit(f)/shard_map/jvp(M)/all_gather", "sharding.py:1", False, "else"),
    ("OURS", "jit(f)/reduce_sum", "factorized.py:1", False, "optimizer"),
    ("OURS", "", "", False, "else"),
    ("MAXTEXT", "jit(f)/jvp()/while/body/dot", "linears.py:1", True, "layers' products"),
    ("MAXTEXT", "jit(f)/jvp()/dot_general", "embeddings.py:1", True, "head's products"),
    ("MAXTEXT", "jit(f)/jvp()/gather", "embeddings.py:1", False, "else"),
    ("MAXTEXT", "jit(f)/jvp()/reduce_sum", "max_utils.py:1", False, "head's rest"),
    ("MAXTEXT", "jit(f)/reduce_sum", "max_utils.py:1", False, "optimizer"),
    ("MAXTEXT", "jit(f)/pow", "embeddings.py:1", False, "else"),
  ],
)
def test_kinds(step_kinds, side, op, source, is_product, expected):
  operation = hlo.Operation(name="x", cycles=1, times=1, shape="", op=op, source=source)
  assert step_kinds.kind(operation, is_product, getattr(step_kinds, side)) == expected
