"""What tests run in several processes instead of the train program: train's flags, plus a mode.

flip         trains; process 1 flips a bit of one replica after step 7
dump DIR     restores the newest checkpoint, writes this process's shards to DIR/<process>.npz
"""

import pathlib
import sys

from absl import flags
import jax
import numpy as np

from matformer_jax import cli, sharding
from matformer_jax import train as train_program
from matformer_jax.checkpoints import checkpoint
from matformer_jax.hosts import multihost
from matformer_jax.tasks import make_task
from matformer_jax.training import loop, trainer

mode = sys.argv.pop(1)
out = pathlib.Path(sys.argv.pop(1)) if mode == "dump" else None
CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "")
COORDINATOR = flags.DEFINE_string("coordinator", None, "")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "")


def with_a_flipped_bit(leaf: jax.Array) -> jax.Array:
  """The same global array, but this process's first device holds another value."""
  shards = [np.array(s.data) for s in leaf.addressable_shards]
  shards[0].view(np.uint32).flat[3] ^= 1 << 9
  return jax.make_array_from_single_device_arrays(
    leaf.shape,
    leaf.sharding,
    [jax.device_put(x, s.device) for x, s in zip(shards, leaf.addressable_shards)],
  )


class FlippingLoop(loop.Loop):
  def _report(self):
    if self._pending and self._pending.step == 7 and self.hosts.index == 1:
      ffn = self.state.params["blocks"]["0"]["ffn"]
      ffn["in"] = with_a_flipped_bit(ffn["in"])
    super()._report()


def dump(config, workdir, hosts):
  mesh = sharding.make_mesh(config.mesh)
  maker = trainer.Trainer(make_task(config, pathlib.Path(workdir)), config, mesh)
  state = maker.abstract_state
  restored, _, _ = checkpoint.restore_newest(
    workdir, {"params": state.params, "opt_state": state.opt_state}, False, hosts
  )
  shards = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
    for shard in leaf.addressable_shards:
      place = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape)]
      shards[f"{'.'.join(sharding.path_names(path))}@{place}"] = np.asarray(shard.data)
  np.savez(out / f"{hosts.index}.npz", **shards)
  return 0


def main(argv):
  config = cli.read_config(CONFIG)
  hosts = multihost.join(
    COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, config.peer_timeout_s
  )
  with hosts.together():
    if mode == "dump":
      code = dump(config, WORKDIR.value, hosts)
    else:
      train_program.Loop = FlippingLoop
      code = train_program.train(config, WORKDIR.value, hosts)
  return hosts.finish(code)


cli.run(main)
