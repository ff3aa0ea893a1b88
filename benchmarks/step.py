"""What a step costs: each granularity against a dense model of its width, and its FLOPs.

  python benchmarks/step.py

Everything is measured in one run, programs taken in turn, medians over repetitions,
so that ratios hold on a noisy machine. The dense model is defined here, in plain JAX
with per-layer weights of exactly its own width and an optimizer state of its own; it
shares only the kernels (attention, normalisation, loss). The last line is one JSON
object. Takes about 6 minutes on 2 cores.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
import jax
import jax.numpy as jnp
from timing import Program, Tokens, get_config, measure, paired

from matformer_jax import granularity as gran
from matformer_jax import runtime, sharding, tables, train
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.models import attention, losses, ops, slicing
from matformer_jax.tasks import make_task
from matformer_jax.training import metrics
from matformer_jax.training.trainer import Trainer, TrainState

_REPS = flags.DEFINE_integer("reps", 15, "Repetitions of every program.")
_LOOP_STEPS = flags.DEFINE_integer("loop_steps", 120, "Steps of the loop measurement.")
_ONE_THREAD = flags.DEFINE_bool("one_thread", False, "Internal: the one-thread measurement.")

ONE_THREAD_SHAPE = MatLMConfig(
  vocab_size=8192, num_layers=16, d_model=256, num_heads=16, seq_len=512
)


def make_trainer(model_config: MatLMConfig, batch_size: int) -> Trainer:
  config = get_config("matlm", "quickstart")
  config.batch_size = batch_size
  return Trainer(Tokens(model_config, batch_size), config, sharding.make_mesh({}))


# ------------------------------------------------------- an independent dense model


def dense_params(config: MatLMConfig, width: int):
  """A list of per-layer weights of FFN width `width`."""
  d, keys = config.d_model, iter(jax.random.split(jax.random.key(0), 4 * config.num_layers + 1))
  normal = lambda *shape: jax.random.normal(next(keys), shape) * shape[-1] ** -0.5
  return {
    "embedding": normal(config.vocab_size, d),
    "final": {"scale": jnp.ones(d)},
    "layers": [
      {
        "qkv": normal(3 * d, d),
        "out": normal(d, d),
        "up": normal(width, d),
        "down": normal(width, d),
        "norm1": {"scale": jnp.ones(d)},
        "norm2": {"scale": jnp.ones(d)},
      }
      for _ in range(config.num_layers)
    ],
  }


def dense_hidden(params, tokens, config: MatLMConfig, execution: Execution):
  b, t, d, n, h = *tokens.shape, config.d_model, config.num_heads, config.head_dim
  table = ops.rope_table(t, h, config.rope_base)
  norm = lambda x, p: ops.rms_norm(x, p["scale"], config.norm_eps)
  x = params["embedding"][tokens] * d**0.5
  for p in params["layers"]:
    y = norm(x, p["norm1"]).reshape(b * t, d)
    qkv = ops.flat_matmul_transposed(y, p["qkv"]).reshape(b, t, 3, 1, n, h)
    q, k, v = (
      jnp.squeeze(z, 2).transpose(0, 2, 3, 1, 4) for z in jax.lax.split(qkv, (1, 1, 1), axis=2)
    )
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    q = ops.apply_rope(q, *table) * h**-0.5
    o = attention.blocked_attention(
      q, ops.apply_rope(k, *table), v, True, execution.attention_block
    )
    o = o.transpose(0, 3, 1, 2, 4).reshape(b * t, d)
    x = x + ops.flat_matmul(o, p["out"]).reshape(b, t, d)
    y = norm(x, p["norm2"]).reshape(b * t, d)
    hidden = jax.nn.gelu(ops.flat_matmul_transposed(y, p["up"]))
    x = x + ops.flat_matmul(hidden, p["down"]).reshape(b, t, d)
  return norm(x, params["final"])


def dense_programs(config: MatLMConfig, width: int, trainer: Trainer):
  """(train step, forward) of a dense model, in the form `nested_programs` has."""
  optimizer, execution = trainer.optimizer, trainer.execution
  params = dense_params(config, width)

  def loss(params, batch):
    hidden = dense_hidden(params, batch[:, :-1], config, execution)
    return losses.cross_entropy(hidden, params["embedding"], batch[:, 1:], execution)[0]

  def step(state, batch):
    value, grads = jax.value_and_grad(loss)(state.params, batch)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = TrainState(jax.tree.map(jnp.add, state.params, updates), opt_state)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), value

  state = TrainState(params, optimizer.init(params))
  return jax.jit(step, donate_argnums=0), state, jax.jit(loss)


def nested_programs(trainer: Trainer, index: int):
  task, g = trainer.task, trainer.granularities[index]
  step = trainer.lower(g).compile()
  sub_config = gran.submodel_config(task.model_config, g)

  def forward(params, batch):
    sub = slicing.slice_params(params, task.model_config, g)
    return task.loss(sub_config, trainer.execution, sub, task.preprocess(batch))[0]

  return step, trainer.init(0), jax.jit(forward)


# ----------------------------------------------------------------- measurement


def against_dense(reps: int):
  """Rows of the main table, and the two ratios that have targets."""
  config = get_config("matlm", "quickstart")
  model = MatLMConfig.from_dict(config.model)
  trainer = make_trainer(model, config.batch_size)
  batch = trainer.batch(0)
  names = gran.names(model)
  program = lambda step, state, forward: Program(step, state, batch, forward)
  nested = [program(*nested_programs(trainer, i)) for i in range(len(names))]
  dense = [program(*dense_programs(model, w, trainer)) for w in model.ffn_widths]
  measure([p for pair in zip(nested, dense) for p in pair], reps)
  flops = [gran.count(model, n).flops for n in names]
  rows, ratios = [], []
  for i, name in enumerate(names):
    a, b = nested[i], dense[i]
    ratios.append(paired(a.step_times, b.step_times))
    time_share = paired(a.step_times, nested[-1].step_times)
    rows.append(
      (
        name,
        f"{1e3 * statistics.median(a.step_times):.1f}",
        f"{1e3 * statistics.median(b.step_times):.1f}",
        f"{ratios[-1]:.3f}",
        f"{1e3 * statistics.median(a.forward_times):.1f}",
        f"{1e3 * statistics.median(b.forward_times):.1f}",
        f"{paired(a.forward_times, b.forward_times):.3f}",
        f"{100 * time_share:.1f}%",
        f"{100 * flops[i] / flops[-1]:.1f}%",
        f"{time_share / (flops[i] / flops[-1]):.3f}",
        f"{trainer.task.examples_per_step / statistics.median(a.step_times):,.0f}",
      )
    )
  header = (
    "size",
    "step ms",
    "dense ms",
    "ratio",
    "forward ms",
    "dense ms",
    "ratio",
    "of XL time",
    "of XL FLOPs",
    "time/FLOPs",
    "tokens/s",
  )
  print(
    f"\nQuickstart shape: {model.num_layers} layers, d_model {model.d_model}, vocabulary "
    f"{model.vocab_size}, {config.batch_size} x {model.seq_len} tokens\n"
  )
  print(tables.table(header, rows), flush=True)
  share = paired(nested[0].step_times, nested[-1].step_times) / (flops[0] / flops[-1])
  return max(ratios), share


def one_thread(reps: int) -> dict:
  """Tokens per second of every granularity at the reference shape, one thread."""
  trainer = make_trainer(ONE_THREAD_SHAPE, 1)
  batch = trainer.batch(0)
  rates = {}
  for i, name in enumerate(gran.names(ONE_THREAD_SHAPE)):
    step, state, _ = nested_programs(trainer, i)
    times = []
    for rep in range(reps + 5):  # the first calls still touch new memory
      started = time.perf_counter()
      state, out = step(state, batch)
      jax.block_until_ready((state, out))
      times.append(time.perf_counter() - started)
    rates[name] = ONE_THREAD_SHAPE.seq_len / statistics.median(times[5:])
  return rates


def one_thread_in_a_process_of_its_own(reps: int) -> dict:
  """`one_thread`, pinned to one core with XLA's thread pools switched off."""
  env = {
    **os.environ,
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  }
  out = subprocess.run(
    [sys.executable, __file__, "--one_thread", f"--reps={reps}"],
    env=env,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  ).stdout
  return json.loads(out.splitlines()[-1])


def loop_overhead(steps: int) -> float:
  """Time per step of the real loop over that of its compiled steps alone, minus 1.

  Both run the same granularities on real text; the bare programs get their batches
  ready-made. Alternates the two, three times, and takes the median ratio.
  """
  ratios = []
  config = get_config("matlm", "quickstart")
  config.steps = steps
  config.eval.every = config.checkpoint.every = 0
  config.eval.batches = 1
  config.optim.warmup_steps = 10
  with tempfile.TemporaryDirectory() as directory:
    for attempt in range(3):
      workdir = pathlib.Path(directory) / str(attempt)
      train.train(config, workdir)
      rows = metrics.read_jsonl(workdir / "metrics.jsonl")[steps // 4 :]
      in_loop = sum(r["step_time_s"] for r in rows)
      trainer = Trainer(make_task(config), config, sharding.make_mesh({}))
      programs, state = trainer.compile(), trainer.init(0)
      names = gran.names(trainer.task.model_config)
      batch = trainer.batch(0)
      for program in programs.values():
        state, out = program(state, batch)
      jax.block_until_ready((state, out))
      started = time.perf_counter()
      for row in rows:
        state, out = programs[names.index(row["granularity"])](state, batch)
        jax.block_until_ready(out)
      ratios.append(in_loop / (time.perf_counter() - started) - 1)
  return statistics.median(ratios)


def loss_memory() -> list[tuple]:
  """Temporary memory of loss and gradient, plain and chunked, as XLA plans it."""

  def plain(x, e, y):
    logits = jnp.einsum("btd,vd->btv", x, e)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1)
    return -jnp.mean(picked)

  rows = []
  for vocab in (32_000, 256_000):
    x, e = jnp.zeros((2, 1024, 256)), jax.ShapeDtypeStruct((vocab, 256), jnp.float32)
    y = jnp.zeros((2, 1024), jnp.int32)
    chunks = losses.num_chunks(y.shape, vocab)
    chunked = lambda x, e, y: losses.chunked_cross_entropy(x, e, y, chunks)[0]
    temp = [
      jax.jit(jax.grad(f, (0, 1))).lower(x, e, y).compile().memory_analysis().temp_size_in_bytes
      for f in (plain, chunked)
    ]
    rows.append(
      (
        f"{vocab:,}",
        tables.si(temp[0], "B"),
        tables.si(temp[1], "B"),
        str(chunks),
        f"{temp[0] / temp[1]:.1f}x",
      )
    )
  return rows


def main(argv) -> None:
  runtime.keep_freed_memory()
  logging.set_verbosity(logging.ERROR)
  if _ONE_THREAD.value:
    if hasattr(os, "sched_setaffinity"):
      os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(json.dumps(one_thread(_REPS.value)))
    return
  worst, share = against_dense(_REPS.value)
  print("\nLoss and gradient of 2,048 tokens, d_model 256, temporary memory\n")
  print(
    tables.table(("vocabulary", "plain", "chunked", "chunks", "saves"), loss_memory()), flush=True
  )
  rates = one_thread_in_a_process_of_its_own(_REPS.value)
  s = ONE_THREAD_SHAPE
  print(
    f"\nOne thread, {s.num_layers} layers, d_model {s.d_model}, vocabulary {s.vocab_size}, "
    f"1 x {s.seq_len} tokens: tokens/s " + "  ".join(f"{n} {r:,.0f}" for n, r in rates.items()),
    flush=True,
  )
  overhead = loop_overhead(_LOOP_STEPS.value)
  print(
    json.dumps(
      {
        "worst_ratio_to_dense": worst,
        "s_ratio_to_flop_share": share,
        "tokens_per_s_mean": statistics.mean(rates.values()),
        "loop_overhead": overhead,
        "tokens_per_s": rates,
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
