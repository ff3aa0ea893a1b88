"""Reads collectives out of compiled HLO text."""

import collections
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
_OP = re.compile(r" = (.*?) (" + "|".join(KINDS) + r")(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """{kind: (arrays communicated, bytes of their results)}; a loop body counts once.

  Counts arrays, not instructions: XLA may combine several into one instruction.
  """
  found = collections.defaultdict(lambda: (0, 0))
  for line in text.splitlines():
    match = _OP.search(line)
    if not match:
      continue
    for dtype, dims in _SHAPE.findall(match.group(1)):
      size = int(np.prod([int(d) for d in dims.split(",") if d])) * _BYTES[dtype]
      count, total = found[match.group(2)]
      found[match.group(2)] = (count + 1, total + size)
  return dict(found)
