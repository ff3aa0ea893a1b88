"""How long a checkpoint holds up training, and how long it takes to be written.

  python benchmarks/save.py --config=matlm:850M --workdir=/tmp/save

Saves a state of random numbers with the size of the config's parameters and AdamW's two moments,
on the devices of this machine, and times what the train loop waits for (checksums and the copy
that is written from) apart from the writing, which goes on beside the steps. Needs three times
the state's size in memory.
"""

import json
import os
import time

from absl import flags
import jax
import jax.numpy as jnp
import optax

from matformer_jax import cli, models, storage, tables
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import model_config
from matformer_jax.errors import UserError


def random_like(shapes):
  """Numbers that do not compress, as trained weights do not."""
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  make = jax.jit(lambda key, s: jax.random.normal(key, s.shape, s.dtype), static_argnums=1)
  return jax.tree.unflatten(tree, [make(key, s) for key, s in zip(keys, leaves)])


def main(argv) -> None:
  cli.check(argv)
  config = cli.read_config(_CONFIG)
  workdir = storage.path(cli.required(_WORKDIR))
  if workdir.exists() and any(workdir.iterdir()):
    raise UserError(f"--workdir={workdir} is not empty, and would be removed; give a new one")
  model = model_config(config)
  shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
  print("making the state", flush=True)
  params = random_like(shapes)
  moments = optax.ScaleByAdamState(
    jnp.zeros([], jnp.int32), random_like(shapes), random_like(shapes)
  )
  size = sum(x.nbytes for x in jax.tree.leaves((params, moments)))
  card = {"task": config.task, "model": model.to_dict()}
  writer = checkpoint.Writer(workdir, keep_last=1, keep_best=0, card=card)
  rows = []
  for step in range(1, _ROUNDS.value + 1):
    started = time.perf_counter()
    writer.save(step, params, moments, {"step": step})
    returned = time.perf_counter()
    writer.wait()
    rows.append((returned - started, time.perf_counter() - returned))
    print(f"save {step} of {_ROUNDS.value}: {sum(rows[-1]):.1f} s", flush=True)
  writer.close()
  storage.remove(workdir)
  best = [min(column) for column in zip(*rows)]
  names = ("training waits", "writing goes on")
  rate = lambda s: f"{size / s / 2**30:,.2f}"
  print(f"\n{size / 2**30:,.1f} GiB of state, {os.cpu_count()} CPUs, best of {len(rows)}")
  print(tables.table(["", "s", "GiB/s"], [[n, f"{s:.1f}", rate(s)] for n, s in zip(names, best)]))
  keys = ("blocked_s", "write_s")
  print(json.dumps({"bytes": size, **{key: round(s, 3) for key, s in zip(keys, best)}}))


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _WORKDIR = flags.DEFINE_string("workdir", None, "New directory to save in; removed at the end.")
  _ROUNDS = flags.DEFINE_integer("rounds", 3, "Saves.", lower_bound=1)
  cli.run(main)
