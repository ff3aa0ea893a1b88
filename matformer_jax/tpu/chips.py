"""What accelerators can do, from their vendors' published figures."""

from __future__ import annotations

import dataclasses

MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Tpu:
  """One generation of TPU. A JAX device is a core of v2 and v3, a chip of later ones.

  Attributes:
    name: as topologies name it, `v5e:16x16`.
    device_kind: as JAX names a device.
    cores_per_chip: JAX devices per chip.
    hbm_bytes: per chip.
    peak_flops: bf16 FLOP/s per chip.
    hbm_bytes_per_s: per chip.
    links, link_bytes_per_s: inter-chip links of a chip, and one link's rate one way.
    dcn_bytes_per_s: a chip's share of the data-center network between slices; 0: not published.
    vmem_bytes: on-chip vector memory of a core, of those that run Pallas kernels; else 0.
    multiplies: bf16 multiply-accumulates per cycle and chip; with peak_flops, the clock.
    accelerator_type, chip_config: how the machine is described to the compiler library.
    example: a topology.
  """

  name: str
  device_kind: str
  cores_per_chip: int
  hbm_bytes: int
  peak_flops: float
  hbm_bytes_per_s: float
  links: int
  link_bytes_per_s: float
  dcn_bytes_per_s: float
  vmem_bytes: int
  multiplies: int
  accelerator_type: str
  chip_config: str
  example: str

  # Of one JAX device, which may be one of a chip's cores.

  @property
  def core_hbm_bytes(self) -> int:
    """Memory."""
    return self.hbm_bytes // self.cores_per_chip

  @property
  def core_flops(self) -> float:
    """bf16 FLOP/s at peak."""
    return self.peak_flops / self.cores_per_chip

  @property
  def core_hbm_bytes_per_s(self) -> float:
    """Memory's rate."""
    return self.hbm_bytes_per_s / self.cores_per_chip

  @property
  def core_ring_bytes_per_s(self) -> float:
    """Around one ring of chips, both ways."""
    return 2 * self.link_bytes_per_s / self.cores_per_chip

  @property
  def core_dcn_bytes_per_s(self) -> float:
    """Between slices; 0 where it is not published."""
    return self.dcn_bytes_per_s / self.cores_per_chip

  @property
  def runs_kernels(self) -> bool:
    """Whether Pallas kernels compile for it."""
    return self.vmem_bytes > 0

  @property
  def clock_hz(self) -> float:
    """Cycles per second of the matrix units at peak."""
    return self.peak_flops / (2 * self.multiplies)


# Vector memory: JAX's table of chips (jax._src.pallas.mosaic.tpu_info).
# Sources: Google Cloud's TPU system architecture pages. Links: v3 656 Gbit/s each; of later
# generations the pages give a chip's total, both ways counted once (v4 2400, v5e 1600,
# v5p 4800, v6e 3584 Gbit/s). Matrix units: 128 x 128, and 256 x 256 from v6e.
TPUS = {
  tpu.name: tpu
  for tpu in (
    Tpu(
      "v3",
      "TPU v3",
      2,
      32 * GIB,
      123e12,
      900e9,
      4,
      82e9,
      0,
      0,
      4 * 128**2,
      "v3-32",
      "default",
      "v3:16x16",
    ),
    Tpu(
      "v4",
      "TPU v4",
      1,
      32 * GIB,
      275e12,
      1228e9,
      6,
      50e9,
      0,
      16 * MIB,
      8 * 128**2,
      "v4-128",
      "megacore",
      "v4:4x4x4",
    ),
    Tpu(
      "v5e",
      "TPU v5 lite",
      1,
      16 * GIB,
      197e12,
      819e9,
      4,
      50e9,
      3.125e9,
      128 * MIB,
      4 * 128**2,
      "v5litepod-256",
      "default",
      "v5e:16x16",
    ),
    Tpu(
      "v5p",
      "TPU v5",
      1,
      95 * GIB,
      459e12,
      2765e9,
      6,
      100e9,
      6.25e9,
      64 * MIB,
      8 * 128**2,
      "v5p-128",
      "default",
      "v5p:4x4x4",
    ),
    Tpu(
      "v6e",
      "TPU v6 lite",
      1,
      32 * GIB,
      918e12,
      1640e9,
      4,
      112e9,
      12.5e9,
      128 * MIB,
      4 * 256**2,
      "v6e-256",
      "default",
      "v6e:16x16",
    ),
  )
}

_OTHER_KINDS = {"TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e"}


def find(device_kind: str) -> Tpu | None:
  """The TPU that JAX names so."""
  kinds = {tpu.device_kind: tpu for tpu in TPUS.values()}
  kinds |= {kind: TPUS[name] for kind, name in _OTHER_KINDS.items()}
  return kinds.get(device_kind)


# Peak dense bf16 FLOP/s of one JAX device.
PEAK_FLOPS = {
  **{tpu.device_kind: tpu.core_flops for tpu in TPUS.values()},
  **{kind: TPUS[name].peak_flops for kind, name in _OTHER_KINDS.items()},
  "TPU v2": 22.5e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}
