"""MatViT: sizes, slices, gradients, what is dropped in training, and the command line."""

import dataclasses
import json
import signal

import helpers
from helpers import digits_args, run_program, train_until_signal
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import matformer_jax
from matformer_jax import UserError, models, sharding
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import Execution, MatViTConfig, model_config
from matformer_jax.evals import classification
from matformer_jax.models import attention, layers, matvit, ops, slicing
from matformer_jax.tasks.classification import Classification
from matformer_jax.tpu import hlo
from matformer_jax.training import optim
from matformer_jax.training.trainer import Trainer

CONFIG = MatViTConfig(
  image_size=8,
  patch_size=2,
  num_classes=10,
  num_layers=3,
  d_model=32,
  num_heads=4,
  ffn_groups=2,
  head_groups=2,
)


def vit_config(row: str):
  return helpers.get_config(row, "matvit")


@pytest.fixture(scope="module")
def params():
  """Lively ones: at the start the head and all biases are zero."""
  leaves, treedef = jax.tree.flatten(models.init_params(CONFIG, jax.random.key(0)))
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return treedef.unflatten([x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module")
def images():
  return jax.random.uniform(jax.random.key(2), (4, 8, 8, 3), minval=-1)


# ------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
  "row,encoder",
  [
    # Table 8, in millions. The paper rounds L/16 to 300/200/150/125 and S of B/16 up.
    ("B16_i1k_augreg", (36, 43, 57, 85)),
    ("L16_i21k", (125, 150, 200, 300)),
  ],
)
def test_parameter_counts_of_the_paper(row, encoder):
  config = model_config(vit_config(row))
  for g, millions in zip(gran.trained(config), encoder):
    assert gran.count(config, g).non_embedding_params == pytest.approx(1e6 * millions, rel=0.015)


@pytest.mark.parametrize(
  "row",
  [
    "B16_i1k_augreg",
    "L16_i21k",
    "L16_i1k_finetune",
    "Ti4_i1k_augreg",
    "S8_i21k",
    "H14_i1k_augreg",
    "B32_i1k_augreg",
    "fashion",
    "digits",
  ],
)
@pytest.mark.parametrize("change", [{}, {"pooling": "mean", "representation_size": 24}])
def test_counts_are_exact(row, change):
  config = dataclasses.replace(model_config(vit_config(row)), **change)
  for g in gran.trained(config):
    sub = gran.submodel_config(config, g)
    shapes = jax.eval_shape(lambda: models.init_params(sub, jax.random.key(0)))
    assert gran.count(config, g).params == sum(x.size for x in jax.tree.leaves(shapes))


def test_table_7_with_the_head():
  """L/16 with an ImageNet-1K head: the paper's 306/206/156/131M are its rounded encoders + 6M."""
  config = model_config(vit_config("L16_i1k_finetune"))
  for g, millions in zip(gran.trained(config), (131, 156, 206, 306)):
    assert gran.count(config, g).params == pytest.approx(1e6 * millions, rel=0.02)


# -------------------------------------------------------------------- model


def reference(config, params, images, widths):
  """The textbook ViT, layer by layer, with dense matrices cut to `widths`."""

  def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p["scale"] + p["bias"]

  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  size, grid, d = config.patch_size, config.grid, config.d_model
  patches = np.stack(
    [
      np.asarray(images)[:, y * size : (y + 1) * size, x * size : (x + 1) * size].reshape(
        len(images), -1
      )
      for y in range(grid)
      for x in range(grid)
    ],
    1,
  )
  x = patches @ p["patches"]["kernel"].T + p["patches"]["bias"]
  x = np.concatenate([np.broadcast_to(p["cls"], (len(x), 1, d)), x], 1) + p["positions"]
  for layer, width in enumerate(widths):
    block = jax.tree.map(lambda leaf: leaf[layer], p["blocks"]["0"])
    y = norm(block["attention_norm"], x)
    a = block["attention"]
    flat = lambda w: w.reshape(-1, w.shape[-1])
    q, k, v = (y @ flat(a["qkv"][i]).T + a["qkv_bias"][i].reshape(-1) for i in range(3))
    heads = lambda z: z.reshape(*z.shape[:2], config.num_heads, -1).swapaxes(1, 2)
    scores = heads(q) @ heads(k).swapaxes(2, 3) / np.sqrt(config.head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ heads(v)
    x = x + out.swapaxes(1, 2).reshape(y.shape) @ flat(a["out"]) + a["out_bias"]
    f = jax.tree.map(
      lambda w: w[:, : width // config.ffn_groups],
      {k: block["ffn"][k] for k in ("in", "in_bias", "out")},
    )
    y = norm(block["ffn_norm"], x) @ flat(f["in"]).T + f["in_bias"].reshape(-1)
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + y @ flat(f["out"]) + block["ffn"]["out_bias"]
  return norm(p["final_norm"], x)[:, 0] @ p["head"]["kernel"].T + p["head"]["bias"]


@pytest.mark.parametrize("name", ["S", "L", "XL", "M*1+L*2"])
def test_computes_what_a_vit_of_these_widths_does(params, images, name):
  g = gran.parse(name, CONFIG)
  want = reference(CONFIG, params, images, [CONFIG.ffn_widths[i] for i in g.ffn])
  have = matvit.MatViT(CONFIG).apply({"params": params}, images, granularity=g)
  np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-4)


def test_a_submodel_is_a_model(params, images):
  """And its gradient is the universal one's slice; what it leaves out gets exactly zero."""
  g = gran.parse("M*1+L*2", CONFIG)
  config, sub = gran.submodel_config(CONFIG, g), slicing.slice_params(params, CONFIG, g)
  loss = lambda c: (
    lambda p: jnp.sum(
      matvit.MatViT(c).apply({"params": p}, images, **({"granularity": g} if c is CONFIG else {}))
      ** 2
    )
  )
  want, grads = jax.value_and_grad(loss(config))(sub)
  have, whole = jax.value_and_grad(loss(CONFIG))(params)
  np.testing.assert_allclose(have, want, rtol=1e-6)
  cut = slicing.slice_params(whole, CONFIG, g)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), cut, grads)
  for name in ("in", "in_bias", "out"):
    assert not np.any(whole["blocks"]["0"]["ffn"][name][0, :, CONFIG.ffn_widths[1] // 2 :])


@pytest.mark.parametrize(
  "execution",
  [
    Execution(scan_layers=True),
    Execution(flat_weights=False),
    Execution(attention_block=5),
    Execution(remat="attn_out", scan_layers=True),
  ],
)
def test_execution_changes_nothing_but_speed(params, images, execution):
  def run(execution):
    loss = lambda p: jnp.sum(matvit.MatViT(CONFIG, execution).apply({"params": p}, images) ** 2)
    return jax.value_and_grad(loss)(params)

  for a, b in zip(jax.tree.leaves(run(execution)), jax.tree.leaves(run(Execution()))):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3)


def test_every_token_sees_every_other():
  q, k, v, g = (
    jax.random.normal(key, (2, 2, 3, 17, 8)) for key in jax.random.split(jax.random.key(0), 4)
  )
  plain = lambda q, k, v: jnp.einsum(
    "bants,bansh->banth", jax.nn.softmax(jnp.einsum("banth,bansh->bants", q, k)), v
  )
  want, back = jax.vjp(plain, q, k, v)
  have, ours = jax.vjp(lambda *a: attention.blocked_attention(*a, False, 6), q, k, v)
  np.testing.assert_allclose(have, want, atol=1e-5)
  for a, b in zip(ours(g), back(g)):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_pooling_representation_and_uint8(params, images):
  config = dataclasses.replace(CONFIG, pooling="mean", representation_size=24)
  own = models.init_params(config, jax.random.key(0))
  assert "cls" not in own and own["representation"]["kernel"].shape == (24, 32)
  features = matvit.MatViT(config).apply({"params": own}, images, return_features=True)
  assert features.shape == (4, 24) and np.all(np.abs(features) < 1)
  raw = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
  scaled = raw.astype(np.float32) / 127.5 - 1
  run = lambda x: matvit.MatViT(CONFIG).apply({"params": params}, x)
  np.testing.assert_allclose(run(jnp.asarray(raw)), run(scaled), atol=1e-4)


def test_positions_follow_the_resolution(params, images):
  big = dataclasses.replace(CONFIG, image_size=16, num_classes=3)
  fresh = models.init_params(big, jax.random.key(7))
  adapted = matvit.adapt_params(params, fresh, CONFIG, big, keep_head=False)
  assert jax.tree.map(jnp.shape, adapted) == jax.tree.map(jnp.shape, fresh)
  assert adapted["head"] is fresh["head"] and adapted["blocks"] is params["blocks"]
  np.testing.assert_array_equal(adapted["positions"][0], params["positions"][0])  # [CLS]
  # Bilinear: a plane stays one.
  plane = jnp.concatenate(
    [jnp.zeros((1, 32)), jnp.repeat(jnp.arange(4.0), 4)[:, None] + jnp.zeros((16, 32))]
  )
  rows = matvit.resize_positions(plane, CONFIG, big)[1:, 0].reshape(8, 8)
  np.testing.assert_allclose(rows[1:-1], np.tile(np.arange(0.25, 3, 0.5)[:, None], 8), atol=1e-5)
  same = matvit.adapt_params(
    params, models.init_params(CONFIG, jax.random.key(7)), CONFIG, CONFIG, True
  )
  jax.tree.map(np.testing.assert_array_equal, same, params)


# ------------------------------------------------------------------ dropping


def test_dropout_keeps_the_mean_and_follows_the_row():
  x = jnp.ones((64, 50, 8))
  seeds = jnp.arange(64, dtype=jnp.uint32)  # as alike as seeds can be
  y = ops.drop(x, 0.25, seeds)
  assert set(np.unique(y)) == {0, np.float32(4 / 3)} and abs(float(y.mean()) - 1) < 0.02
  np.testing.assert_array_equal(ops.drop(x[5:9], 0.25, seeds[5:9]), y[5:9])
  rows = ops.drop(x, 0.25, seeds, whole_rows=True)
  assert all(len(np.unique(row)) == 1 for row in rows) and 0 < float((rows == 0).mean()) < 0.5


def test_what_is_dropped_is_as_good_as_random():
  """Counts per row and per place, and pairs of neighbours and of rows, as for independent draws."""
  rows, places, rate = 512, 1024, 0.3
  seeds = jnp.arange(rows, dtype=jnp.uint32)
  masks = [
    np.asarray(ops.drop(jnp.ones((rows, places)), rate, s) == 0, float)
    for s in (seeds, ops.fold_seeds(seeds, 0), ops.fold_seeds(seeds, 1))
  ]
  for mask in masks:
    for axis, count in ((0, rows), (1, places)):
      z = (mask.mean(axis) - rate) / np.sqrt(rate * (1 - rate) / count)
      assert np.abs(z).max() < 5 and 0.85 < z.std() < 1.15
  centred = [(m - rate) / np.sqrt(rate * (1 - rate)) for m in masks]
  first = centred[0]
  pairs = [
    first[:, 1:] * first[:, :-1],
    first[1:] * first[:-1],
    first[:, ::2] * first[:, 1::2],
    first[:256] * first[256:],
    first * centred[1],
    centred[1] * centred[2],
  ]
  for product in pairs:
    assert abs(product.mean()) < 5 / np.sqrt(product.size)


def test_stochastic_depth_grows_with_the_layer(params, images):
  """The first layer is never dropped, the last at the whole rate."""
  config = dataclasses.replace(CONFIG, stochastic_depth=0.999)
  seeds = jnp.arange(4, dtype=jnp.uint32)
  x = jax.random.normal(jax.random.key(0), (4, 17, 32))
  block = layers.Block(config, Execution(), config.spans[0], parent=None)
  layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["0"])
  run = lambda index: block.apply({"params": layer}, x, layer=index, seeds_B=seeds)[0]
  np.testing.assert_allclose(run(0), block.apply({"params": layer}, x)[0], rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(run(2), x)
  unrolled = matvit.MatViT(config, Execution()).apply({"params": params}, images, seeds_B=seeds)
  scanned = matvit.MatViT(config, Execution(scan_layers=True)).apply(
    {"params": params}, images, seeds_B=seeds
  )
  np.testing.assert_allclose(unrolled, scanned, rtol=1e-4, atol=1e-4)


def test_evaluation_drops_nothing(params, images):
  config = dataclasses.replace(CONFIG, dropout=0.5, stochastic_depth=0.5)
  g = gran.parse("M", config)
  batch = {"image": images, "labels": jnp.array([[0], [1], [2], [-1]])}
  found = [
    classification.evaluate(c, Execution(), params, [g], [batch], consistency=False)
    for c in (config, CONFIG)
  ]
  assert found[0] == found[1] and found[0][0].examples == 3


# ------------------------------------------------------------------ training


class StubTask(Classification):
  """Classes of random images, with everything that draws numbers on the device."""

  def __init__(self, config=None):
    config = config or dataclasses.replace(CONFIG, dropout=0.1, stochastic_depth=0.2)
    super().__init__(config, 16, "sigmoid", mixup=0.5)

  def batch(self, step, rows):
    rng = np.random.default_rng(step)
    batch = {
      "image": rng.integers(0, 256, (16, 8, 8, 3), np.uint8),
      "label": rng.integers(0, 10, 16).astype(np.int32),
      "seed": rng.integers(0, 2**32, 16).astype(np.uint32),
      "mix": np.full(16, rng.beta(0.5, 0.5), np.float32),
    }
    return jax.tree.map(lambda x: x[rows], batch)


def make_trainer(mesh=None, model=None, **changes) -> Trainer:
  config = vit_config("digits")
  config.batch_size = 16
  config.update_from_flattened_dict(changes)
  devices = jax.devices() if mesh else jax.devices()[:1]
  return Trainer(StubTask(model), config, sharding.make_mesh(mesh or {}, devices))


def run(trainer, steps=4):
  state, found = trainer.init(0), []
  programs = [trainer.lower(trainer.granularities[i]).compile() for i in (0, 3)]
  for step in range(steps):
    state, out = programs[step % 2](state, trainer.batch(step))
    found.append(float(out["loss"]))
  return found, state


@pytest.fixture(scope="module")
def single_device():
  return run(make_trainer())


@pytest.mark.parametrize(
  "mesh,changes",
  [(dict(fsdp=8), {}), (dict(data=2, fsdp=2, tensor=2), {}), (None, {"grad_accum": 2})],
)
def test_meshes_and_micro_batches_agree(single_device, mesh, changes):
  """Dropout, stochastic depth and mixup included: they follow the row, not the device."""
  found, state = run(make_trainer(mesh, **changes))
  np.testing.assert_allclose(found, single_device[0], rtol=5e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=2e-3),
    state.params,
    single_device[1].params,
  )


@pytest.mark.parametrize("index", [0, 3])
def test_nesting_causes_no_collective(index):
  mesh = dict(data=2, fsdp=2, tensor=2)
  nested = make_trainer(mesh)
  plain = make_trainer(
    mesh,
    dataclasses.replace(
      nested.task.model_config,
      ffn_ratios=CONFIG.ffn_ratios[index : index + 1],
      ffn_widths=(),
      spans=None,
    ),
  )
  ours, theirs = (
    hlo.totals(t.lower(t.granularities[i]).compile().as_text())
    for t, i in ((nested, index), (plain, 0))
  )
  assert ours == theirs and ours


def test_losses_by_hand():
  task = Classification(CONFIG, 4, "sigmoid")
  batch = task.preprocess(
    {
      "image": np.zeros((4, 8, 8, 3), np.uint8),
      "label": np.arange(4),
      "seed": np.zeros(4, np.uint32),
    }
  )
  config = dataclasses.replace(CONFIG, head_bias=-6.9)
  fresh = models.init_params(config, jax.random.key(0))
  # The head starts at its bias: softplus(-6.9) for nine classes and softplus(6.9) for one.
  want = 9 * np.log1p(np.exp(-6.9)) + np.log1p(np.exp(6.9))
  loss = lambda task: float(task.loss(config, Execution(), fresh, batch)[1]["loss"])
  assert loss(task) == pytest.approx(want, rel=1e-5)
  assert loss(Classification(CONFIG, 4, "softmax")) == pytest.approx(np.log(10), rel=1e-5)


def test_mixup_mixes_images_and_classes():
  task = Classification(CONFIG, 3, "softmax", mixup=0.5)
  images = np.zeros((3, 8, 8, 3), np.uint8)
  images[1] = 255
  out = task.preprocess(
    {
      "image": images,
      "label": np.array([4, 7, 7]),
      "seed": np.zeros(3, np.uint32),
      "mix": np.full(3, 0.75, np.float32),
    }
  )
  np.testing.assert_allclose(out["image"][:, 0, 0, 0], [-1, 0.5, -0.5], atol=1e-6)
  np.testing.assert_allclose(out["target"][1, [4, 7]], [0.25, 0.75])
  np.testing.assert_allclose(out["target"].sum(1), 1)


def test_decay_and_sgd():
  params = models.init_params(CONFIG, jax.random.key(0))
  marks = optim.is_matrix(params)
  assert marks["head"] == {"kernel": True, "bias": False} and not marks["positions"]
  assert marks["blocks"]["0"]["ffn"] == {
    "in": True,
    "in_bias": False,
    "out": True,
    "out_bias": False,
  }
  config = vit_config("digits").optim
  config.update(
    dict(
      name="sgd", schedule="constant", peak_lr=0.1, warmup_steps=1, weight_decay=0.5, clip_norm=0.0
    )
  )
  optimizer = optim.make_optimizer(config, 10)
  grads, state = jax.tree.map(jnp.ones_like, params), optimizer.init(params)
  for _ in range(2):  # the first step's learning rate is 0
    updates, state = optimizer.update(grads, state, params)
  np.testing.assert_allclose(updates["head"]["bias"], -0.1 * 1.9, rtol=1e-5)  # momentum 0.9
  np.testing.assert_allclose(
    updates["patches"]["kernel"], -0.19 * (1 + 0.5 * params["patches"]["kernel"]), rtol=1e-4
  )


@pytest.mark.parametrize(
  "change,words",
  [
    ({"image_size": 9}, "not a multiple"),
    ({"pooling": "max"}, "pooling='max'"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"num_classes": 0}, "num_classes=0"),
  ],
)
def test_config_mistakes(change, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(CONFIG, **change)


# -------------------------------------------------------------- command line


def losses_of(workdir) -> list[float]:
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_learns_every_size(digits_run):
  evals = [json.loads(line) for line in (digits_run / "eval.jsonl").read_text().splitlines()]
  for name in ("S", "M", "L", "XL"):
    share, error = (evals[-1][m][name] for m in ("accuracy", "accuracy_stderr"))
    assert share > 0.8
    assert error == pytest.approx((share * (1 - share) / (evals[-1]["examples"] - 1)) ** 0.5)


def test_stopped_and_resumed_is_the_same_run(digits_run, tmp_path):
  """Augmentation, order and mixup too: all follow the step."""
  result = train_until_signal(33, signal.SIGTERM, *digits_args(tmp_path))
  assert result.returncode == 143, result.stderr
  assert 33 <= checkpoint.steps(tmp_path)[-1] <= 35 < len(losses_of(digits_run))
  again = run_program("train", *digits_args(tmp_path))
  assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
  assert losses_of(tmp_path) == losses_of(digits_run)


def test_evaluate_and_describe(digits_run, tmp_path):
  out = tmp_path / "out.json"
  result = run_program(
    "evaluate",
    f"--workdir={digits_run}",
    "--granularities=S,M+L,XL",
    f"--json={out}",
    f"--plot={tmp_path / 'p.png'}",
    "--batch_size=100",
  )
  assert result.returncode == 0, result.stderr
  rows = json.loads(out.read_text())["granularities"]
  assert rows["XL"]["agreement"] == 1.0 and abs(rows["XL"]["kl"]) < 1e-5
  assert (
    f"{rows['S']['accuracy']:.2%}" in result.stdout and "359 validation images" in result.stdout
  )
  # By hand, through the loaded model.
  from sklearn import datasets

  digits = datasets.load_digits()
  held_out = np.random.default_rng(0).permutation(len(digits.target))[1438:]
  model = matformer_jax.load(digits_run)
  pixels = np.minimum(digits.images[held_out] * 16, 255).astype(np.uint8)[..., None]
  right = np.argmax(model.logits(pixels, "M+L"), 1) == digits.target[held_out]
  assert rows["M*1+L*1"]["accuracy"] == pytest.approx(float(right.mean()), abs=1e-6)
  assert "26,538" in run_program("describe", f"--workdir={digits_run}").stdout
  result = run_program("evaluate", f"--workdir={digits_run}", "--bigram")
  assert result.returncode == 1 and "--bigram is a baseline of language models" in result.stderr


def test_extract_then_fine_tune_on_other_classes(digits_run, tmp_path):
  """A submodel, at another resolution and with another head."""
  result = run_program(
    "extract", f"--workdir={digits_run}", "--granularity=M", f"--out={tmp_path / 'm'}"
  )
  assert result.returncode == 0, result.stderr
  model, whole = (matformer_jax.load(d) for d in (tmp_path / "m", digits_run))
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
  np.testing.assert_allclose(model.logits(images), whole.logits(images, "M"), rtol=1e-4, atol=1e-5)
  result = run_program(
    "train",
    *digits_args(
      tmp_path / "tuned",
      init_from=tmp_path / "m",
      data__classes="(0,1,2)",
      model__num_classes=3,
      model__image_size=12,
      data__train_transform="resize(12)",
      data__eval_transform="resize(12)",
      steps=40,
      sampling="0/0/0/1",
      optim__name="sgd",
      optim__peak_lr=0.05,
      eval__every=40,
    ),
  )
  assert result.returncode == 0, result.stderr
  tuned = matformer_jax.load(tmp_path / "tuned")
  assert tuned.config.num_classes == 3 and tuned.config.grid == 6
  assert gran.to_text(gran.full(tuned.config), tuned.config) == "M"
  evals = json.loads((tmp_path / "tuned" / "eval.jsonl").read_text().splitlines()[-1])
  assert evals["accuracy"]["M"] > 0.9
  result = run_program(
    "train",
    *digits_args(
      tmp_path / "no",
      init_from=tmp_path / "m",
      init_head=True,
      data__classes="(0,1,2)",
      model__num_classes=3,
    ),
  )
  assert result.returncode == 1 and "set --config.init_head=False" in result.stderr


@pytest.mark.parametrize(
  "changes,words",
  [
    ({"model__num_classes": 7}, "has 10 classes; set --config.model.num_classes=10"),
    ({"data__source": "digits"}, "not a source of images"),
    ({"data__train_transform": "spin"}, "data.train_transform='spin'"),
    ({"data__eval_transform": "resize(9)"}, "gives images of 9 x 9 pixels"),
    ({"data__corrupt": "ignore"}, "data.corrupt='ignore'"),
    ({"loss": "hinge"}, "loss='hinge'"),
    ({"model__patch_size": 3}, "patch_size=3"),
    ({"optim__name": "sdg"}, "did you mean 'sgd'"),
  ],
)
def test_command_line_mistakes(tmp_path, changes, words):
  result = run_program(
    "train", *digits_args(tmp_path / "run", **{"steps": 1, "sampling": "0/0/0/1", **changes})
  )
  assert result.returncode == 1 and words in result.stderr, result.stderr
  assert "Traceback" not in result.stderr


def test_a_run_of_another_task(tiny_run, tmp_path):
  result = run_program("train", *digits_args(tmp_path, init_from=tiny_run))
  assert result.returncode == 1 and "is of task 'matlm'" in result.stderr
  result = run_program("describe", "--config=configs/matvit.py:XX16_i21k")
  assert result.returncode == 1 and "no row 'XX16_i21k'" in result.stderr
