"""What a MatViT step costs: against dense ViTs of each width, and against masking.

  python benchmarks/vit_step.py

The other way to train nested sizes, as a public JAX implementation does it, runs every size
at full width in one step, with the neurons it lacks masked, and sums the losses. Here
each step runs one size, sliced. Both ways train every size on as many images when four
sampled steps stand against one joint step: that ratio is printed below the table.

Everything is measured in one run, programs taken in turn, medians of ratios within a round, so
that they hold on a noisy machine. The reference model is defined here, in plain JAX with an
optimizer state of its own. The last line is one JSON object. Takes about 3 minutes on 2 cores.
The model is the fashion row as wide as a ViT-Ti: at the row's own width, which --d_model=64
measures, most of a step on a CPU is not matrix products, and little is saved by doing fewer.
"""

from __future__ import annotations

import json
import statistics

from absl import app, flags, logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import Program, get_config, measure, paired

from matformer_jax import granularity as gran
from matformer_jax import runtime, sharding, tables
from matformer_jax.config import Execution, MatViTConfig
from matformer_jax.models import attention, matvit, ops
from matformer_jax.tasks.classification import Classification
from matformer_jax.training.trainer import Trainer, TrainState

_REPS = flags.DEFINE_integer("reps", 15, "Repetitions of every program.")
_WIDTH = flags.DEFINE_integer("d_model", 192, "Width of the model.")


class RandomImages(Classification):
  """Classification of random images."""

  def batch(self, step, rows):
    rng, c, n = np.random.default_rng(step), self.model_config, self.examples_per_step
    batch = {
      "image": rng.integers(0, 256, (n, c.image_size, c.image_size, c.channels), np.uint8),
      "label": rng.integers(0, c.num_classes, n).astype(np.int32),
      "seed": rng.integers(0, 2**32, n).astype(np.uint32),
    }
    return jax.tree.map(lambda x: x[rows], batch)


# -------------------------------------------------------- an independent plain ViT


def plain_params(config: MatViTConfig, width: int):
  """Per-layer weights of FFN width `width`."""
  d, keys = config.d_model, iter(jax.random.split(jax.random.key(0), 4 * config.num_layers + 3))
  normal = lambda *shape: jax.random.normal(next(keys), shape) * shape[-1] ** -0.5
  linear = lambda out, size: {"w": normal(out, size), "b": jnp.zeros(out)}
  norm = lambda: {"scale": jnp.ones(d), "bias": jnp.zeros(d)}
  return {
    "patches": linear(d, config.patch_pixels),
    "cls": jnp.zeros(d),
    "positions": normal(config.num_tokens, d),
    "head": linear(config.num_classes, d),
    "norm": norm(),
    "layers": [
      {
        "norm1": norm(),
        "qkv": linear(3 * d, d),
        "out": linear(d, d),
        "norm2": norm(),
        "up": linear(width, d),
        "down": {"w": normal(width, d), "b": jnp.zeros(d)},
      }
      for _ in range(config.num_layers)
    ],
  }


def plain_logits(
  params, images, config: MatViTConfig, execution: Execution, kept: int | None = None
):
  """Logits; with `kept`, of the model whose FFNs have only so many neurons, by masking."""
  n, h, eps = config.num_heads, config.head_dim, config.norm_eps
  norm = lambda p, x: ops.layer_norm(x, p["scale"], p["bias"], eps)
  linear = lambda p, x: ops.flat_matmul_transposed(x, p["w"]) + p["b"]
  rows = lambda x: x.reshape(-1, x.shape[-1])
  patches = matvit.patchify(images, config.patch_size)
  b, t, d = len(patches), config.num_tokens, config.d_model
  x = linear(params["patches"], rows(patches)).reshape(b, t - 1, d)
  x = jnp.concatenate([jnp.broadcast_to(params["cls"], (b, 1, d)), x], 1) + params["positions"]
  for p in params["layers"]:
    qkv = linear(p["qkv"], rows(norm(p["norm1"], x))).reshape(b, t, 3, 1, n, h)
    q, k, v = (
      jnp.squeeze(z, 2).transpose(0, 2, 3, 1, 4) for z in jax.lax.split(qkv, (1, 1, 1), axis=2)
    )
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    o = attention.blocked_attention(q * h**-0.5, k, v, False, execution.attention_block)
    x = x + linear(p["out"], rows(o.transpose(0, 3, 1, 2, 4).reshape(b, t, d))).reshape(b, t, d)
    hidden = jax.nn.gelu(linear(p["up"], rows(norm(p["norm2"], x))))
    if kept is not None:
      hidden = hidden * (jnp.arange(hidden.shape[1]) < kept)
    y = ops.flat_matmul(hidden, p["down"]["w"]) + p["down"]["b"]
    x = x + y.reshape(b, t, d)
  return norm(params["norm"], x)[:, 0] @ params["head"]["w"].T + params["head"]["b"]


def plain_program(
  trainer: Trainer, width: int, batch, masks: tuple[int | None, ...] = (None,)
) -> Program:
  """A train step that sums the losses of all `masks`."""
  config, execution, optimizer = trainer.task.model_config, trainer.execution, trainer.optimizer

  def loss(params, batch):
    batch = trainer.task.preprocess(batch)
    return sum(
      jnp.mean(
        optax.softmax_cross_entropy(
          plain_logits(params, batch["image"], config, execution, kept), batch["target"]
        )
      )
      for kept in masks
    )

  def step(state, batch):
    value, grads = jax.value_and_grad(loss)(state.params, batch)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = TrainState(optax.apply_updates(state.params, updates), opt_state)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), value

  params = plain_params(config, width)
  return Program(jax.jit(step, donate_argnums=0), TrainState(params, optimizer.init(params)), batch)


# ----------------------------------------------------------------- measurement


def main(argv) -> None:
  runtime.keep_freed_memory()
  logging.set_verbosity(logging.ERROR)
  config = get_config("matvit", "fashion")
  config.model.d_model = _WIDTH.value
  trainer = Trainer(RandomImages.from_config(config), config, sharding.make_mesh({}))
  model, batch = trainer.task.model_config, trainer.batch(0)
  nested = [
    Program(trainer.lower(g).compile(), trainer.init(0), batch) for g in trainer.granularities
  ]
  dense = [plain_program(trainer, width, batch) for width in model.ffn_widths]
  joint = plain_program(trainer, model.ffn_widths[-1], batch, model.ffn_widths)
  measure([*(p for pair in zip(nested, dense) for p in pair), joint], _REPS.value)
  flops = [gran.count(model, g).flops for g in trainer.granularities]
  ms = lambda program: 1e3 * statistics.median(program.step_times)
  rows, ratios = [], {}
  for name, a, b, f in zip(trainer.names, nested, dense, flops):
    ratios[name] = paired(a.step_times, b.step_times)
    rows.append(
      (
        name,
        f"{ms(a):.1f}",
        f"{ms(b):.1f}",
        f"{ratios[name]:.3f}",
        f"{paired(a.step_times, nested[-1].step_times):.1%}",
        f"{f / flops[-1]:.1%}",
      )
    )
  print(f"\n{model.summary}, {config.batch_size} images a step\n")
  print(tables.table(("size", "step ms", "dense ms", "ratio", "of XL time", "of XL FLOPs"), rows))
  sampled = [sum(times) for times in zip(*(p.step_times for p in nested))]
  saved = paired(joint.step_times, sampled)
  images = len(nested) * config.batch_size
  rate = lambda times: images * model.num_tokens / statistics.median(times)
  print(
    f"\nJoint masked step of all {len(nested)} sizes: {ms(joint):.1f} ms, "
    f"{rate(joint.step_times):,.0f} tokens/s\n"
    f"{len(nested)} sampled steps: {1e3 * statistics.median(sampled):.1f} ms, "
    f"{rate(sampled):,.0f} tokens/s, {saved:.2f}x\n"
  )
  print(
    json.dumps(
      {
        "ratio_to_dense": ratios,
        "worst_ratio_to_dense": max(ratios.values()),
        "sampled_over_joint_tokens_per_s": saved,
        "tokens_per_s": {"sampled": rate(sampled), "joint": rate(joint.step_times)},
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
