"""Muon's updates are those of the plain 2-D weights, on any mesh and after a resume."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_matvit import CONFIG as VIT
from test_train import MODEL, assert_same_parameters, make_trainer, run

from matformer_jax import UserError, models, sharding
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import Span
from matformer_jax.models import slicing
from matformer_jax.training import optim

# Two query heads to each of keys and values, gated FFNs; two groups of heads and of neurons; and
# the same as extracted, with layers of two widths.
GROUPED = dataclasses.replace(MODEL, ffn_groups=2, head_groups=2, spans=(), **helpers.GROUPED)
EXTRACTED = dataclasses.replace(GROUPED, num_layers=3, spans=(Span(2, 3, 3), Span(1, 0, 3)))


def plain(params, ratio: int) -> dict[str, np.ndarray]:
  """The blocks' matrices, cut out by hand: fan-in x fan-out."""
  found = {}
  for span, layers in params["blocks"].items():
    ffn, attention = layers["ffn"], layers["attention"]
    width = ffn["in"].shape[-1]
    for i in range(len(ffn["in"])):
      rows = lambda leaf: np.asarray(leaf).reshape(-1, width)
      where = f"{span}/{i}"
      found[f"{where}/q"] = rows(attention["qkv"][i, :ratio]).T
      found[f"{where}/k"] = rows(attention["qkv"][i, ratio]).T
      found[f"{where}/v"] = rows(attention["qkv"][i, ratio + 1]).T
      found[f"{where}/attention_out"] = rows(attention["out"][i])
      found[f"{where}/ffn_in"] = rows(ffn["in"][i]).T
      found[f"{where}/ffn_out"] = rows(ffn["out"][i])
      if "gate" in ffn:
        found[f"{where}/gate"] = rows(ffn["gate"][i]).T
  return found


def make_optimizer(model=None, **changes) -> optax.GradientTransformation:
  config = helpers.get_config("tiny").optim
  config.update(dict(name="muon", peak_lr=1e-2, warmup_steps=2, weight_decay=0.1) | changes)
  return optim.make_optimizer(config, 10, model)


@pytest.mark.parametrize(
  "model,rms",
  [(GROUPED, 0.2), (GROUPED, None), (EXTRACTED, 0.2), (VIT, 0.2)],
  ids=["grouped", "scaled by fan-out / fan-in", "extracted", "MatViT"],
)
def test_equals_muon_on_plain_matrices_and_adamw_elsewhere(model, rms):
  optimizer = make_optimizer(muon_rms=rms or 0.0, muon_momentum=0.9)
  config = helpers.get_config("tiny").optim
  config.update(peak_lr=1e-2, warmup_steps=2)
  rate = optim.make_schedule(config, 10)
  muon = optax.contrib.muon(rate, beta=0.9, weight_decay=0.1, consistent_rms=rms)
  adamw = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=optim.is_matrix)
  clip = optax.clip_by_global_norm(1.0)

  params = models.init_params(model, jax.random.key(0))
  cut = lambda tree: plain(tree, model.queries_per_kv)
  matrices, others = cut(params), params
  states = optimizer.init(params), muon.init(matrices), adamw.init(others)
  updates = [jax.jit(o.update) for o in (optimizer, muon, adamw)]
  rng = np.random.default_rng(0)
  for step in range(1, 4):
    # Of several norms, so that it matters when they are clipped.
    grads = jax.tree.map(lambda x: np.float32(10**-step * rng.normal(size=x.shape)), params)
    clipped, _ = clip.update(grads, clip.init(params))
    args = (grads, params), (cut(clipped), matrices), (clipped, others)
    new = [u(g, s, p) for u, s, (g, p) in zip(updates, states, args)]
    states = [state for _, state in new]
    params, matrices, others = (
      optax.apply_updates(p, update) for (_, p), (update, _) in zip(args, new)
    )

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, cut(params), matrices)
  labels = optim.muon_or_adamw(params)
  jax.tree.map(lambda kind, a, b: close(a, b) if kind == "adamw" else None, labels, params, others)
  found = [kind for kind in jax.tree.leaves(labels) if kind == "muon"]
  assert len(found) == len(model.spans) * (5 if model.gated else 4)
  outside = {k: v for k, v in labels.items() if k != "blocks"}
  assert set(jax.tree.leaves(outside)) == {"adamw"}


@pytest.mark.parametrize("heads", [False, True], ids=["FFN", "FFN and heads"])
def test_a_size_of_nested_blocks_is_moved_as_if_it_were_alone(heads):
  """Whatever momentum there is beyond it; whole matrices are not."""
  model = dataclasses.replace(GROUPED, num_heads=16, num_kv_heads=8, nested_heads=heads)
  small = gran.trained(model)[0]
  cut = lambda tree: slicing.slice_params(tree, model, small)
  params = models.init_params(model, jax.random.key(0))
  grads = [
    jax.tree.map(lambda x, key=key: jax.random.normal(key, x.shape), params)
    for key in jax.random.split(jax.random.key(1), 2)
  ]

  def moved(grads, params, **blocks):
    optimizer = make_optimizer(model, warmup_steps=1, weight_decay=0.0, clip_norm=0.0, **blocks)
    state = optimizer.init(params)
    for grad in grads:
      updates, state = jax.jit(optimizer.update)(grad, state, params)
    (layers,) = updates["blocks"].values()
    ffn, attention = layers["ffn"], layers["attention"]
    return {**ffn, "qkv": attention["qkv"], "attention out": attention["out"]}

  whole_of_small = moved(list(map(cut, grads)), cut(params))
  of_small = lambda tree: {
    k: v[tuple(map(slice, whole_of_small[k].shape))] for k, v in tree.items()
  }
  nested, whole = (of_small(moved(grads, params, muon_blocks=b)) for b in ("nested", "whole"))
  close = lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-6)
  assert all(close(whole_of_small[name], nested[name]) for name in nested)
  assert not close(whole_of_small["in"], whole["in"])


@pytest.fixture(scope="module")
def on_a_mesh():
  trainer = make_trainer(dict(data=2, fsdp=2, tensor=2), GROUPED, **{"optim.name": "muon"})
  return trainer, *run(trainer, 3)


def test_a_mesh_gives_the_same_and_shards_the_momentum(on_a_mesh):
  trainer, losses, state = on_a_mesh
  plain_losses, plain_state = run(make_trainer(None, GROUPED, **{"optim.name": "muon"}), 3)
  np.testing.assert_allclose(losses, plain_losses, rtol=2e-5)
  assert_same_parameters(state, plain_state)
  places = {
    sharding.path_names(path): place.sharding
    for path, place in jax.tree_util.tree_leaves_with_path(trainer.abstract_state.params)
  }
  moments = state.opt_state[1].inner_states["muon"].inner_state[0].mu
  leaves = jax.tree_util.tree_leaves_with_path(moments)
  assert len(leaves) == 5
  for path, leaf in leaves:
    assert leaf.sharding == places[sharding.path_names(path)]
    assert leaf.addressable_shards[0].data.size == leaf.size // 4  # fsdp x tensor


def test_a_resumed_run_is_the_same_bit_for_bit(on_a_mesh, tmp_path):
  trainer, _, state = on_a_mesh
  card = {"task": "matlm", "model": GROUPED.to_dict(), "identity": {}, "config": {}}
  writer = checkpoint.Writer(tmp_path, keep_last=1, keep_best=0, card=card)
  writer.save(3, state.params, state.opt_state, {}, {"skipped": 0})
  writer.close()
  abstract = trainer.abstract_state
  items = {"params": abstract.params, "opt_state": abstract.opt_state}
  restored, _, _ = checkpoint.restore(tmp_path, 3, items)
  restored = dataclasses.replace(state, **restored)
  step = trainer.lower(trainer.granularities[0]).compile()
  ends = [step(s, trainer.batch(4))[0] for s in (restored, jax.tree.map(jnp.copy, state))]
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), *ends)
  assert all(jax.tree.leaves(same))
  assert jax.tree.structure(restored) == jax.tree.structure(state)


@pytest.mark.parametrize(
  "key,value,words",
  [
    ("muon_momentum", 1.0, "below 1"),
    ("muon_momentum", -0.1, "at least 0"),
    ("muon_rms", -0.2, "positive"),
    ("muon_rms", float("nan"), "positive"),
    ("muon_blocks", "nestd", "did you mean 'nested'"),
    ("name", "moun", "did you mean 'muon'"),
    ("name", "lbfgs", "known keys: adafactor, adamw, muon, sgd"),
  ],
)
def test_errors(key, value, words):
  with pytest.raises(UserError, match=f"^optim.{key}={value!r} .*{words}"):
    make_optimizer(**{key: value})
