"""A plan as tables that a person reads."""

from __future__ import annotations

from typing import Any

from matformer_jax import tables
from matformer_jax.tpu import hlo
from matformer_jax.tpu.chips import GIB


def _dearest_tables(name: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
  ms = lambda row: f"{row['ms']:,.2f}"
  return [
    f"{name}: the dearest operations of a step, without Pallas kernels",
    tables.table(
      ["ms", "times", "result", "source", "operation"],
      [
        [ms(r), str(r["times"]), r["shape"][:32], r["source"], r["op"][-60:]]
        for r in found["operations"]
      ],
    ),
    f"{name}: the dearest collectives that are not hidden behind computation, around one ring",
    tables.table(
      ["ms", "times", "MiB of results", "kind"],
      [[ms(r), str(r["times"]), f"{r['bytes'] / 2**20:,.1f}", r["kind"]] for r in found["exposed"]],
    ),
  ]


def _slices(plan: dict[str, Any]) -> str:
  slices = plan["mesh"].get("slices", 1)
  return f"{slices} slices of " if slices > 1 else ""


def plan_tables(plan: dict[str, Any]) -> str:
  """Tables a person reads."""
  head = (
    f"{_slices(plan)}{plan['topology']}: {plan['chips']} chips, {plan['cores']} cores, "
    f"mesh {plan['mesh']}, "
    f"{plan['tokens_per_step']:,} {plan['unit']}/step, {plan['dtype']}, remat {plan['remat']}, "
    f"{plan['layers']} layers, {plan['attention']} attention, loss in {plan['loss']}, "
    f"{plan['optimizer']}"
  )
  gib = lambda value: f"{value / GIB:.2f}"
  mib = lambda value: f"{value / 2**20:,.0f}"
  ms = lambda value: f"{1e3 * value:,.1f}"
  rows = plan["granularities"]
  purposes = list(dict.fromkeys(k for row in rows.values() for k in row["hbm"]))
  tables_ = [
    head,
    "HBM per core, GiB",
    tables.table(
      ["size", *purposes, "all", "of", "fits"],
      [
        [
          name,
          *(gib(row["hbm"].get(k, 0)) for k in purposes),
          gib(row["hbm_bytes_per_core"]),
          gib(row["hbm_capacity"]),
          "yes" if row["fits"] else "NO",
        ]
        for name, row in rows.items()
      ],
    ),
  ]
  timed = {name: row for name, row in rows.items() if "step_time_s" in row}
  for name, row in timed.items():
    if "top" in row:
      tables_ += _dearest_tables(name, row["top"])
  if timed:
    kinds = [k for k in hlo.KINDS if any(k in row["collective_bytes"] for row in timed.values())]
    tables_ += [
      "Collectives per step and core: arrays, MiB of results",
      tables.table(
        ["size", *kinds, "on the wire", "not hidden"],
        [
          [
            name,
            *(
              f"{row['collective_count'].get(k, 0)}, {mib(row['collective_bytes'].get(k, 0))}"
              for k in kinds
            ),
            mib(row["wire_bytes"]),
            mib(row["exposed_wire_bytes"]),
          ]
          for name, row in timed.items()
        ],
      ),
    ]
    if _slices(plan):
      tables_ += [
        "Between slices, per step and core, over the data-center network",
        tables.table(
          ["size", "MiB sent", "ms"],
          [
            [
              name,
              f"{row['slice_wire_bytes'] / 2**20:,.1f}",
              ms(row["slice_s"]) if row["slice_s"] else "rate not published",
            ]
            for name, row in timed.items()
          ],
        ),
      ]
    mean = {"mean": plan["mean"]} if plan["mean"] else {}
    tables_ += [
      "Time: lower bounds and estimate, ms",
      tables.table(
        [
          "size",
          "TFLOP/core",
          "compute",
          "memory",
          "network",
          "estimate",
          "MFU",
          f"{plan['unit']}/s",
          "days",
          "chip-hours",
        ],
        [
          [
            name,
            f"{row['flops_per_core'] / 1e12:.2f}" if "bounds" in row else "",
            *(
              ms(row["bounds"][k]) if "bounds" in row else ""
              for k in ("compute_s", "memory_s", "network_s")
            ),
            ms(row["step_time_s"]),
            f"{100 * row['mfu']:.1f}%",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['days']:,.2f}",
            f"{row['chip_hours']:,.0f}",
          ]
          for name, row in (timed | mean).items()
        ],
      ),
    ]
  decoding = {name: row["decode"] for name, row in rows.items() if "decode" in row}
  if decoding:
    tables_ += [
      "Decoding",
      tables.table(
        ["size", "GiB/core", "ms/token", "tokens/s", "fits"],
        [
          [
            name,
            gib(d["hbm_bytes_per_core"]),
            ms(d["token_time_s"]) if "token_time_s" in d else "",
            f"{d['tokens_per_s']:,.0f}" if "token_time_s" in d else "",
            "yes" if d["fits"] else "NO",
          ]
          for name, d in decoding.items()
        ],
      ),
    ]
  note = (
    "Compute counts executed products, recomputation included, at peak; memory every live "
    "byte written and read once; network all links at once. The estimate adds XLA's cycle "
    "counts, Pallas kernels (attention at peak, the loss at 70 or 85% of it), and what XLA does "
    "not hide of the communication, around one ring, and between slices all of it. MFU counts "
    "model FLOPs only. Days and chip-hours are for all steps of the config."
  )
  return "\n\n".join([*tables_, *plan["advice"], note])
