"""What training will need and cost on a TPU slice, from the real TPU compiler, with no TPU.

  python -m matformer_jax.pod_plan --config=configs/matlm.py:850M --topology=v3:16x16
  python -m matformer_jax.pod_plan --config=configs/matlm.py:78M --topology=v5e:4x4 \\
      --mesh=fsdp:4,tensor:2
  python -m matformer_jax.pod_plan --config=configs/matlm.py:850M --topology=v5p:4x4x4 --tune
  python -m matformer_jax.pod_plan --topology=list

Compiles the train step of every granularity ahead of time for the slice, on this CPU,
and reads memory, collectives and estimated cycles out of the result. Needs the extra
`tpu`. Figures are per JAX device: a core of a v3, a chip of later TPUs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from absl import flags

from matformer_jax import cli
from matformer_jax.errors import UserError
from matformer_jax.planning import failures, tune
from matformer_jax.planning.plan import make_plan
from matformer_jax.planning.report import plan_tables
from matformer_jax.planning.slices import list_topologies


def main(argv) -> None:
  cli.check(argv)
  if _TOPOLOGY.value == "list":
    print(list_topologies())
    return
  config = cli.read_config(_CONFIG)
  if not _TOPOLOGY.value:
    raise UserError("--topology is missing; give e.g. --topology=v3:16x16, or list")
  say = lambda message: print(message, file=sys.stderr, flush=True)
  if _TUNE.value:
    _tune(config, _TOPOLOGY.value, say)
    return
  plan = make_plan(
    config,
    _TOPOLOGY.value,
    _MESH.value,
    _GRANULARITIES.value,
    _DECODE_BATCH.value,
    say,
    _TOP.value,
    _SLICES.value,
  )
  text = plan_tables(plan)
  if _GOODPUT.value:
    job, plan["goodput"] = _goodput(plan, config)
    text += "\n\n" + failures.table(plan["goodput"], job)
  print(json.dumps(plan, indent=1) if _JSON.value else "\n" + text)


def _goodput(plan, config) -> tuple[failures.Job, list[dict[str, Any]]]:
  """What failures leave of the planned job's time."""
  if plan["mean"] is None:
    raise UserError("--goodput needs the step of every size that is sampled, and that they fit")
  job = failures.Job(
    chips=plan["chips"],
    slices=_SLICES.value,
    chip_hours=_CHIP_HOURS.value,
    save_s=_SAVE_S.value,
    write_s=_WRITE_S.value,
    restart_s=_RESTART_S.value,
    replace_s=_REPLACE_S.value,
  )
  return job, failures.rows(job, config.checkpoint.every * plan["mean"]["step_time_s"])


def _tune(config, topology: str, say) -> None:
  for flag in (_MESH, _DECODE_BATCH, _TOP, _SLICES, _GOODPUT):
    if flag.value != flag.default:
      raise UserError(
        f"--{flag.name}={flag.value} is not for --tune, which searches from the config as it is"
      )
  if len(_GRANULARITIES.value) > 1:
    raise UserError(
      f"--granularities={','.join(_GRANULARITIES.value)}: --tune compares candidates for one size"
    )
  result = tune.tune(config, topology, "".join(_GRANULARITIES.value), say)
  print(json.dumps(result, indent=1) if _JSON.value else "\n" + tune.tune_tables(result))


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _TOPOLOGY = flags.DEFINE_string(
    "topology", None, "CHIP:SHAPE, e.g. v3:16x16, v5e:4x4, v5p:4x4x4; or list."
  )
  _MESH = flags.DEFINE_string(
    "mesh",
    "",
    "Sizes of mesh axes instead of the config's, e.g. fsdp:16,tensor:2; data takes what remains.",
  )
  _SLICES = flags.DEFINE_integer(
    "slices",
    1,
    "Slices of that shape that train together, over the data-center network.",
    lower_bound=1,
  )
  _GRANULARITIES = flags.DEFINE_list(
    "granularities", [], "What to plan, e.g. S,XL; default all trained sizes."
  )
  _DECODE_BATCH = flags.DEFINE_integer(
    "decode_batch", 0, "Also plan decoding of this many sequences with a full cache.", lower_bound=0
  )
  _TOP = flags.DEFINE_integer(
    "top", 0, "Also name this many of each step's dearest operations.", lower_bound=0
  )
  _TUNE = flags.DEFINE_bool(
    "tune",
    False,
    "Search for the fastest mesh, remat, layers, micro-batches and logits memory that fit; prints "
    "what was tried, and the winner as flags. About 10 minutes.",
  )
  _GOODPUT = flags.DEFINE_bool(
    "goodput",
    False,
    "Also simulate a month of this job, and of larger and smaller ones, in which machines fail.",
  )
  _CHIP_HOURS = flags.DEFINE_float(
    "chip_hours",
    round(failures.CHIP_HOURS, -2),
    "For --goodput: mean time between failures of one chip; the default is that of Llama 3's GPUs.",
    lower_bound=1.0,
  )
  _SAVE_S = flags.DEFINE_float(
    "save_s", 5.0, "For --goodput: how long a checkpoint stops the steps.", lower_bound=0.1
  )
  _WRITE_S = flags.DEFINE_float(
    "write_s", 60.0, "For --goodput: how long after that it is whole.", lower_bound=0.0
  )
  _RESTART_S = flags.DEFINE_float(
    "restart_s", 300.0, "For --goodput: from a start of the job to its first step.", lower_bound=0.0
  )
  _REPLACE_S = flags.DEFINE_float(
    "replace_s", 600.0, "For --goodput: until a failed machine is there again.", lower_bound=0.0
  )
  _JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")
  flags.adopt_module_key_flags(cli)
  cli.run(main)
