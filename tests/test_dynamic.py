"""A granularity that is traced, not static."""

import dataclasses

from helpers import GROUPED, HEADS_ONLY
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matformer_jax import granularity as gran
from matformer_jax.config import Execution
from matformer_jax.models import dynamic, matlm, slicing

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))


def static(params, config, g, execution=Execution()):
  return matlm.MatLM(config, execution).apply({"params": params}, TOKENS, granularity=g)


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"gated": True, "ffn_groups": 2},
    {"nested_heads": True},
    HEADS_ONLY,
    GROUPED | {"nested_heads": True},
  ],
)
def test_dynamic_equals_static_in_value_and_gradient(small, change):
  config = dataclasses.replace(small, **change)
  params = matlm.init_params(config, jax.random.key(0))
  apply = lambda p, i: dynamic.apply_dynamic(p, TOKENS, i, config=config)
  loss = lambda out: jnp.mean(jax.nn.log_softmax(out)[..., 0])
  value_and_grad = jax.jit(jax.value_and_grad(lambda p, i: loss(apply(p, i))))
  rng = np.random.default_rng(1)
  mixes = [(3,) * 4] + [tuple(rng.integers(0, 4, 4)) for _ in range(2)]
  for mix in mixes:
    g = gran.parse(mix, config)
    indices = dynamic.layer_indices(g)
    have = value_and_grad(params, indices)
    want = jax.jit(jax.value_and_grad(lambda p: loss(static(p, config, g))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), have, want)
  np.testing.assert_allclose(apply(params, indices), static(params, config, g), atol=1e-5)
  assert value_and_grad._cache_size() == 1  # one program for all of them


def test_dynamic_runs_an_extracted_model(small, small_params):
  """Indices above what a layer stores are cut to it."""
  g = gran.parse("S*1+M*3", small)
  config, params = gran.submodel_config(small, g), slicing.slice_params(small_params, small, g)
  have = dynamic.apply_dynamic(params, TOKENS, jnp.full(4, 3), config=config)
  np.testing.assert_allclose(have, static(small_params, small, g), atol=1e-5)


def test_dynamic_gradient_keeps_no_branch(small):
  """The gradient of a switch over all sizes needs little more memory than XL's alone."""
  config = dataclasses.replace(small, num_layers=6, spans=None)
  params = matlm.init_params(config, jax.random.key(0))
  tokens = np.zeros((8, 128), np.int32)
  execution = Execution(scan_layers=True, remat="full")
  xl = gran.full(config)
  losses = [
    lambda p: jnp.sum(dynamic.apply_dynamic(p, tokens, jnp.full(6, 3), config=config)),
    lambda p: jnp.sum(matlm.MatLM(config, execution).apply({"params": p}, tokens, granularity=xl)),
  ]
  traced, static_ = (
    jax.jit(jax.grad(f)).lower(params).compile().memory_analysis().temp_size_in_bytes
    for f in losses
  )
  assert traced < 1.3 * static_
