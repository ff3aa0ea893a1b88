"""The model against an independent reference, and the properties nesting promises."""

import dataclasses
import functools
import math

from helpers import GROUPED, HEADS_ONLY
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matformer_jax import UserError, sharding
from matformer_jax import granularity as gran
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.models import attention, layers, matlm, ops, slicing

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 13)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _apply(params, tokens, config, execution, granularity):
  return matlm.MatLM(config, execution).apply({"params": params}, tokens, granularity=granularity)


def logits(config, params, granularity, execution=Execution(), tokens=TOKENS):
  return _apply(params, tokens, config, execution, gran.parse(granularity, config))


# ------------------------------------------------- a reference, written in NumPy


def reference_logits(config: MatLMConfig, params, ffn_indices, head_indices, tokens):
  """MatLM for one sequence in float64 NumPy: loops over heads, no slicing tricks."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  blocks, d, h = p["blocks"]["0"], config.d_model, config.head_dim
  norm = lambda x, s: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * s
  length = len(tokens)

  def frequency(j):
    """Llama 3 stretches wavelengths by how often they turn in the original length."""
    f = config.rope_base ** (-2 * j / h)
    if config.rope_scaling:
      factor, low, high, original = config.rope_scaling
      wavelength = 2 * math.pi / f
      if wavelength > original / low:
        return f / factor
      if wavelength > original / high:
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * f / factor + smooth * f
    return f

  def rope(x):
    out = np.empty_like(x)
    for t in range(length):
      for j in range(h // 2):
        angle = t * frequency(j)
        a, b = x[t, j], x[t, j + h // 2]
        out[t, j] = a * math.cos(angle) - b * math.sin(angle)
        out[t, j + h // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out

  def activation(x):
    if config.activation == "relu2":
      return np.maximum(x, 0) ** 2
    if config.activation == "silu":
      return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

  x = p["embedding"][tokens] * (config.embedding_scale or math.sqrt(d))
  ratio = config.num_heads // config.num_kv_heads  # of queries to keys
  for layer in range(config.num_layers):
    y = norm(x, blocks["attention_norm"]["scale"][layer])
    attention = {name: leaf[layer] for name, leaf in blocks["attention"].items()}
    w_qkv = attention["qkv"].reshape(ratio + 2, config.num_kv_heads, h, d)
    w_out = attention["out"].reshape(config.num_heads, h, d)
    bias = attention.get("qkv_bias", np.zeros(w_qkv.shape[:-1])).reshape(w_qkv.shape[:-1])
    for n in range(config.head_counts[head_indices[layer]]):
      of_head = ((n % ratio, n // ratio), (ratio, n // ratio), (ratio + 1, n // ratio))
      q, k, v = (y @ w_qkv[i].T + bias[i] for i in of_head)
      if config.qk_norm:
        q, k = norm(q, attention["q_norm"]), norm(k, attention["k_norm"])
      scores = rope(q) @ rope(k).T / math.sqrt(h)
      scores[np.triu_indices(length, 1)] = -np.inf
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      x = x + (weights / weights.sum(-1, keepdims=True)) @ v @ w_out[n]
    y = norm(x, blocks["ffn_norm"]["scale"][layer])
    m = config.ffn_widths[ffn_indices[layer]]
    w_in, w_out = (blocks["ffn"][k][layer].reshape(-1, d)[:m] for k in ("in", "out"))  # Eq. 1
    if config.gated:
      w_gate = blocks["ffn"]["gate"][layer].reshape(-1, d)[:m]
      x = x + (activation(y @ w_gate.T) * (y @ w_in.T)) @ w_out
    else:
      x = x + activation(y @ w_in.T) @ w_out
  return norm(x, p["final_norm"]["scale"]) @ p.get("head", p["embedding"]).T


def random_params(config: MatLMConfig, seed: int):
  """Initial ones, with scales and biases that are not all the same."""
  params = matlm.init_params(config, jax.random.key(seed))
  rng = np.random.default_rng(seed)

  def stir(path, leaf):
    matrix = "embed" in sharding.logical_axes(sharding.path_names(path))
    return leaf if matrix else leaf + rng.normal(size=leaf.shape).astype(np.float32) / 4

  return jax.tree_util.tree_map_with_path(stir, params)


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"activation": "relu2"},
    {"activation": "silu", "gated": True},
    {"nested_heads": True},
    HEADS_ONLY,
    GROUPED,
    GROUPED | {"nested_heads": True},
  ],
)
@pytest.mark.parametrize("granularity", ["S", "XL", "S*1+M*1+L*1+XL*1"])
def test_equals_the_reference(small, change, granularity):
  config = dataclasses.replace(small, **change)
  params = random_params(config, 1)
  g = gran.parse(granularity, config)
  ours = logits(config, params, granularity)
  for row in range(2):
    want = reference_logits(config, params, g.ffn, g.heads, TOKENS[row])
    np.testing.assert_allclose(ours[row], want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- nesting


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"ffn_groups": 4, "head_groups": 1},
    {"nested_heads": True, "gated": True},
    HEADS_ONLY,
    GROUPED | {"head_groups": 2},
    GROUPED | {"nested_heads": True},
  ],
)
@pytest.mark.parametrize("granularity", ["S", "L", "M*2+L*2", "XL"])
def test_a_submodel_is_a_model(small, change, granularity):
  """Slicing the tree and running it on its own gives bitwise the same logits."""
  config = dataclasses.replace(small, **change)
  params = matlm.init_params(config, jax.random.key(0))
  g = gran.parse(granularity, config)
  sub_params = slicing.slice_params(params, config, g)
  sub_config = gran.submodel_config(config, g)
  assert gran.count(sub_config, gran.full(sub_config)) == gran.count(config, g)
  own = logits(sub_config, sub_params, gran.full(sub_config))
  np.testing.assert_array_equal(own, logits(config, params, g))
  shapes = jax.eval_shape(lambda: matlm.init_params(sub_config, jax.random.key(0)))
  assert jax.tree.map(lambda x: x.shape, sub_params) == jax.tree.map(lambda x: x.shape, shapes)


def test_gradient_outside_the_slice_is_exactly_zero(small, small_params):
  config = dataclasses.replace(small, nested_heads=True)
  g = gran.parse("S*2+M*2", config)
  grads = jax.grad(lambda p: jnp.sum(logits(config, p, g) ** 2))(small_params)["blocks"]["0"]
  for layer in range(4):
    m, n = (16, 1) if layer < 2 else (32, 2)
    for name in ("in", "out"):
      leaf = grads["ffn"][name][layer, 0]
      assert not np.any(leaf[m:]) and np.all(np.any(leaf[:m], -1))
    assert not np.any(grads["attention"]["qkv"][layer, :, 0, n:])
    assert not np.any(grads["attention"]["out"][layer, 0, n:])
    assert np.any(grads["attention"]["out"][layer, 0, n - 1])


def test_every_granularity_differs(small, small_params):
  outs = [np.asarray(logits(small, small_params, g)) for g in ("S", "M", "L", "XL", "M*2+L*2")]
  for i, a in enumerate(outs):
    for b in outs[i + 1 :]:
      assert np.abs(a - b).max() > 1e-3


def test_causal(small, small_params):
  """No logit depends on a later token."""
  embedded = lambda params: logits(small, params, "M")
  base = embedded(small_params)
  changed = TOKENS.copy()
  changed[:, 7] = (changed[:, 7] + 1) % 64
  after = logits(small, small_params, "M", tokens=changed)
  np.testing.assert_array_equal(base[:, :7], after[:, :7])
  assert np.abs(np.asarray(base[:, 7:] - after[:, 7:])).max() > 1e-3


# -------------------------------------------------- ways to run the same model

EXECUTIONS = {
  "scan": Execution(scan_layers=True),
  "grouped": Execution(flat_weights=False),
  "small blocks": Execution(attention_block=5),
  **{f"remat {r}": Execution(remat=r) for r in layers.REMAT},
  "scan remat": Execution(remat="attn_out", scan_layers=True),
}


@pytest.mark.parametrize("change", [{}, GROUPED])
@pytest.mark.parametrize("name", EXECUTIONS)
def test_execution_changes_nothing_but_speed(small, name, change):
  config = dataclasses.replace(small, ffn_groups=2, head_groups=2, **change)
  params = random_params(config, 2)
  loss = lambda p, e: jnp.mean(jax.nn.log_softmax(logits(config, p, "M*1+L*3", e))[..., 0])
  want = jax.value_and_grad(loss)(params, Execution())
  have = jax.value_and_grad(loss)(params, EXECUTIONS[name])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), have, want)


def test_remat_saves_memory(small):
  config = dataclasses.replace(small, num_layers=8, spans=None)
  params = matlm.init_params(config, jax.random.key(0))
  tokens = np.zeros((8, 128), np.int32)

  def temp(remat):
    execution = Execution(remat=remat, scan_layers=True)
    grad = jax.grad(lambda p: jnp.sum(logits(config, p, "XL", execution, tokens)))
    return jax.jit(grad).lower(params).compile().memory_analysis().temp_size_in_bytes

  assert temp("full") < temp("attn_out") < temp("none")


def test_bfloat16_compute_keeps_float32_parameters(small, small_params):
  execution = Execution(dtype="bfloat16")
  f = lambda p: jnp.sum(logits(small, p, "M", execution))
  grads = jax.grad(f)(small_params)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  low, high = logits(small, small_params, "M", execution), logits(small, small_params, "M")
  error = np.abs(np.asarray(low - high))
  assert 0 < error.max() < 0.1


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("block", [4, 5, 16])
def test_attention_gradient(block, queries):
  """Of several heads, or of groups of queries that share a key."""
  q, k, v, g = (
    jax.random.normal(key, (2, 2, 3 * r, 16, 8))
    for key, r in zip(jax.random.split(jax.random.key(0), 4), (queries, 1, 1, queries))
  )

  def plain(q, k, v):
    k, v = (jnp.repeat(x, queries, axis=2) for x in (k, v))
    scores = jnp.einsum("banth,bansh->bants", q, k)
    scores = jnp.where(np.tri(16, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bants,bansh->banth", jax.nn.softmax(scores), v)

  want, back = jax.vjp(plain, q, k, v)
  have, ours = jax.vjp(lambda *a: attention.blocked_attention(*a, True, block), q, k, v)
  np.testing.assert_allclose(have, want, atol=1e-5)
  for a, b in zip(ours(g), back(g)):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_rms_norm_gradient():
  x, g = (
    jax.random.normal(jax.random.key(0), (2, 5, 16)),
    jax.random.normal(jax.random.key(1), (2, 5, 16)),
  )
  scale = jnp.linspace(0.5, 2, 16)
  plain = lambda x, s: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * s
  want, have = (jax.vjp(f, x, scale)[1](g) for f in (plain, lambda x, s: ops.rms_norm(x, s, 1e-6)))
  for a, b in zip(have, want):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "mesh,length,queries",
  [
    (None, 256, 1),
    (dict(fsdp=2, tensor=2, data=2), 256, 1),
    (None, 384, 1),
    (None, 256, 3),
    (dict(fsdp=2, tensor=2, data=2), 256, 3),
  ],
)
def test_the_tpu_kernel_computes_the_same_attention(mesh, length, queries):
  """Interpreted on CPU, alone and split over a mesh; in one block, and in three; of groups."""
  execution = Execution(mesh=mesh and sharding.make_mesh(mesh))
  q, k, v = (
    jax.random.normal(key, (4, 2, 2 * r, length, 16))
    for key, r in zip(jax.random.split(jax.random.key(0), 3), (queries, 1, 1))
  )
  weights = jnp.arange(16.0)

  def run(f):
    return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(f(*qkv) * weights), (0, 1, 2)))(q, k, v)

  ours = run(lambda q, k, v: attention.flash_attention(q, k, v, True, execution, interpret=True))
  plain = run(lambda q, k, v: attention.blocked_attention(q, k, v, True, 128))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_rope_by_product_is_the_rotation(dtype, tolerance):
  rng = np.random.default_rng(0)
  x, g = (jnp.asarray(rng.normal(size=(2, 1, 3, 8, 6)), dtype) for _ in range(2))
  table = ops.rope_table(8, 6, 10_000.0)
  want, want_back = jax.vjp(lambda x: ops.apply_rope(x, *table), x)
  have, have_back = jax.vjp(lambda x: ops.apply_rope_by_product(x, *table), x)
  as_float = lambda y: np.asarray(y, np.float32)
  np.testing.assert_allclose(as_float(have), as_float(want), atol=tolerance)
  np.testing.assert_allclose(as_float(have_back(g)[0]), as_float(want_back(g)[0]), atol=tolerance)


def test_blocks_of_the_attention_kernel():
  assert attention.kernel_block(1024, 96) == (1024, True)
  assert attention.kernel_block(2048, 128) == (1024, False)
  assert attention.kernel_block(1024, 192) == (512, False)  # wide heads need the room
  assert attention.kernel_block(384, 64) == (128, False)


def test_how_an_accelerator_runs_a_model():
  make = functools.partial(Execution.for_platform, "tpu")
  assert make().scan_layers and not make(layers="unrolled").scan_layers
  assert Execution.for_platform("cpu", layers="scanned").scan_layers
  # One chunk of the logits of 16 x 1024 tokens on a v5p; less where there is less memory.
  assert make(device_kind="TPU v5").logits_bytes > 16 * 1024 * 256_000 * 4
  assert make(device_kind="TPU v5 lite").logits_bytes == 16 * 2**30 // 6
  with pytest.raises(UserError, match="layers='folded'"):
    make(layers="folded")


def test_norms_for_accelerators_are_the_same():
  rng = np.random.default_rng(0)
  x, g = (jnp.asarray(rng.normal(size=(2, 8, 6)), jnp.float32) for _ in range(2))
  scale, bias = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  for norm, args in ((ops.rms_norm, (x, scale)), (ops.layer_norm, (x, scale, bias))):
    outs = [jax.vjp(lambda *a, fuse=fuse: norm(*a, 1e-6, fuse), *args) for fuse in (False, True)]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      *((value, back(g)) for value, back in outs),
    )
