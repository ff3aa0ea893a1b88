"""A TPU slice to compile for, and the mesh on it."""

from __future__ import annotations

import importlib.util
import os
import re

import jax

from matformer_jax import sharding, tables
from matformer_jax.errors import UserError
from matformer_jax.tpu import chips


def topology_devices(topology: str, slices: int = 1) -> tuple[chips.Tpu, list]:
  """The devices of a slice such as `v5e:4x4`, or of several, to compile for.

  Raises:
    UserError: for an unknown chip or shape, or without the compiler library.
  """
  name, _, shape = topology.partition(":")
  tpu = chips.TPUS.get(name)
  if tpu is None or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
    raise UserError(
      f"--topology={topology!r} is not CHIP:SHAPE, e.g. v3:16x16; chips are "
      f"{', '.join(chips.TPUS)} (--topology=list)"
    )
  if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
    raise UserError("the TPU compiler is not installed; pip install 'matformer_jax[tpu]'")
  # These describe a machine that does not exist and stop the library from looking for one.
  os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE=tpu.accelerator_type,
  )
  jax.config.update("jax_platforms", "cpu")
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(
      platform="tpu",
      topology_name=topology,
      chip_config_name=tpu.chip_config,
      **({"num_slices": slices} if slices > 1 else {}),
    ).devices
  except Exception as e:
    raise UserError(
      f"--topology={topology!r}: the TPU compiler knows no such slice "
      f"({' '.join(str(e).split())[:200]}); try {tpu.example}"
    ) from e
  return tpu, devices


def parse_mesh(text: str, default) -> dict[str, int]:
  """`fsdp:16,tensor:2` as sizes; axes not named are 1, and data takes what remains."""
  if not text:
    return dict(default)
  sizes = {axis: 1 for axis in sharding.INNER_AXES} | {sharding.DATA: -1}
  for part in text.split(","):
    axis, _, size = part.partition(":")
    if axis not in sizes or not re.fullmatch(r"-1|\d+", size):
      raise UserError(
        f"--mesh={text!r}: {part!r} is not AXIS:SIZE with an axis of "
        f"{', '.join(sharding.INNER_AXES)}, e.g. fsdp:16,tensor:2"
      )
    sizes[axis] = int(size)
  return sizes


def list_topologies() -> str:
  """A table of the known chips."""
  rows = [
    [
      tpu.name,
      str(tpu.cores_per_chip),
      f"{tpu.hbm_bytes / chips.GIB:.0f}",
      f"{tpu.peak_flops / 1e12:.0f}",
      f"{tpu.hbm_bytes_per_s / 1e9:,.0f}",
      str(tpu.links),
      f"{tpu.link_bytes_per_s / 1e9:.0f}",
      tpu.example,
    ]
    for tpu in chips.TPUS.values()
  ]
  return tables.table(
    [
      "chip",
      "JAX devices",
      "HBM GiB",
      "bf16 TFLOP/s",
      "HBM GB/s",
      "links",
      "GB/s each way",
      "example",
    ],
    rows,
  )
