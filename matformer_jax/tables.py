"""Plain-text tables and human-readable numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import csv
import os
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Columns aligned under `header`: the first to the left, the others to the right."""
  cells = [list(header), *map(list, rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  lines = [
    "  ".join(
      c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))
    ).rstrip()
    for row in cells
  ]
  return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def si(value: float, unit: str = "") -> str:
  """1_234_567 -> '1.23M'; three significant digits."""
  for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= scale:
      scaled = value / scale
      digits = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
      return f"{scaled:.{digits}f}{letter}{unit}"
  return f"{value:g}{unit}"


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
  """A file of rows, which may lack some of the columns."""
  columns = dict.fromkeys(key for row in rows for key in row)
  with open(path, "w", newline="") as f:
    writer = csv.DictWriter(f, list(columns))
    writer.writeheader()
    writer.writerows(rows)
