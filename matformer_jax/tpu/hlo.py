"""Reads optimized HLO text: collectives and estimated cycles.

What is in a loop is counted as often as it runs.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
  "f32": 4,
  "s32": 4,
  "u32": 4,
  "bf16": 2,
  "f16": 2,
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(r" = (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|branch_computations|called_computations)="
  r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN_CYCLES = 2**62
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_FILE = re.compile(r'(\d+) ".*?([^/"]+)"')
_LOCATION = re.compile(r"(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)")
_FRAME_AT = re.compile(r"(\d+) \{file_location_id=(\d+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CROSSING = re.compile(r' = \((\S+), .* recv\(.*_xla_megascale_transfer_type="(\w+)"')
_GROUPS = re.compile(r"replica_groups=(\{\{[\d,]*\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\]\s*\{([^}]*)\})")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of KINDS.
    arrays: how many arrays it moves (XLA combines several into one instruction).
    bytes: of its results on one device.
    group: devices that take part in it together; 0 where the text does not say.
    times: how often it runs in one call of the program.
    hidden: whether XLA runs it beside computation.
  """

  kind: str
  arrays: int
  bytes: int
  group: int
  times: int
  hidden: bool

  @property
  def wire_bytes(self) -> float:
    """Bytes that a device sends, in the ring algorithm, in one call of the program."""
    others = max(self.group - 1, 0) / max(self.group, 1) if self.group else 1.0
    once = {
      "all-gather": self.bytes * others,
      "all-reduce": 2 * self.bytes * others,
      "reduce-scatter": self.bytes * (self.group - 1),
      "all-to-all": self.bytes * others,
      "collective-permute": self.bytes,
    }[self.kind]
    return once * self.times


def crossings(text: str, slices: int) -> list[Collective]:
  """Every collective between slices of a TPU program: what it receives from the hosts."""
  found = []
  for _, lines, times, _ in _executed(text, into_fusions=True):
    for line in lines:
      match = _CROSSING.search(line)
      if match:
        kind = match.group(2).lower().replace("_", "-")
        kind = kind if kind in KINDS else "collective-permute"
        received = _arrays(match.group(1), kind, started=False)
        found.append(Collective(kind, len(received), sum(received), slices, times, hidden=False))
  return found


def collectives(text: str) -> list[Collective]:
  """Every collective of an optimized module.

  On TPU an asynchronous collective is spread over several fusions, of which the first
  counts, and a reduce-scatter may be a fusion named after the two operations it merges.
  """
  found = []
  for name, lines, times, hidden in _executed(text, into_fusions=True):
    for line in lines:
      match = _COLLECTIVE.search(line)
      if match:
        kind, arrays = match.group(2), _arrays(match.group(1), match.group(2), bool(match.group(3)))
        group = _group(line)
        if name.startswith("all-reduce-scatter"):
          kind, arrays = "reduce-scatter", [size // max(group, 1) for size in arrays]
        found.append(
          Collective(kind, len(arrays), sum(arrays), group, times, hidden or bool(match.group(3)))
        )
  return found


@dataclasses.dataclass(frozen=True)
class Operation:
  """What XLA runs at once: a fusion, or an instruction that is in none.

  Attributes:
    name: its instruction's.
    cycles: XLA's own estimate, of all runs in one call of the program.
    times: how often it runs in one call.
    shape: of its result, the first of several.
    op: the JAX operations that it comes from, outermost first.
    source: file and line of the last of them; empty where the text does not say.
  """

  name: str
  cycles: int
  times: int
  shape: str
  op: str
  source: str


def operations(text: str) -> list[Operation]:
  """What has an estimate in a TPU program, dearest first: no collectives or Pallas kernels."""
  found, places = [], _places(text)
  for _, lines, times, _ in _executed(text, into_fusions=False):
    for line in lines:
      cycles = _CYCLES.search(line)
      if cycles and int(cycles.group(1)) < _UNKNOWN_CYCLES:
        rest = line.partition(" = ")[2]
        shape, op, frame = _SHAPE.search(rest), _OP_NAME.search(line), _FRAME.search(line)
        found.append(
          Operation(
            name=instruction(line),
            cycles=times * int(cycles.group(1)),
            times=times,
            shape=shape.group(0) if shape else "",
            op=op.group(1) if op else "",
            source=places.get(frame.group(1), "") if frame else "",
          )
        )
  return sorted(found, key=lambda o: -o.cycles)


def instruction(line: str) -> str:
  """Its name, without `ROOT` and `%`."""
  return line.strip().removeprefix("ROOT ").partition(" = ")[0].lstrip("%")


def _places(text: str) -> dict[str, str]:
  """{stack frame: "file:line"}, from the tables that head a module's text."""
  sections: dict[str, list[str]] = {}
  current: list[str] = []
  for line in text.splitlines():
    if _COMPUTATION.match(line):
      break
    if line[:1].isalpha():
      current = sections.setdefault(line.strip(), [])
    current.append(line)
  match = lambda pattern, name: filter(None, map(pattern.match, sections.get(name, [])))
  files = {m.group(1): m.group(2) for m in match(_FILE, "FileNames")}
  lines = {
    m.group(1): f"{files.get(m.group(2), '?')}:{m.group(3)}"
    for m in match(_LOCATION, "FileLocations")
  }
  return {m.group(1): lines.get(m.group(2), "") for m in match(_FRAME_AT, "StackFrames")}


def estimated_cycles(text: str) -> int:
  """XLA's own estimate of a TPU program's cycles, without collectives and Pallas kernels."""
  return sum(operation.cycles for operation in operations(text))


def _executed(text: str, into_fusions: bool) -> list[tuple[str, list[str], int, bool]]:
  """(name, instructions, how often it runs, whether beside others) of each computation."""
  found, entry = computations(text)
  times: dict[str, int] = {}
  beside = set()

  def visit(name: str, factor: int) -> None:
    if name not in found or name.startswith("async_collective_fusion"):
      return
    times[name] = max(times.get(name, 0), factor)
    for line in found[name]:
      loop = _WHILE.search(line)
      if loop:
        visit(loop.group(2), factor * _trip_count(line, found.get(loop.group(1), [])))
        continue
      if not into_fusions and " fusion(" in line:
        continue
      result = line.split(" = ")[0]
      if "%async-collective-done" not in result:
        for several, one in _CALLED.findall(line):
          for callee in several.split(",") if several else [one]:
            callee = callee.strip().lstrip("%")
            if "%async-collective-start" in result:
              beside.add(callee)
            visit(callee, factor)

  visit(entry, 1)
  return [(name, found[name], n, name in beside) for name, n in times.items()]


def totals(text: str) -> dict[str, tuple[int, int]]:
  """{kind: (arrays communicated, bytes of their results)} in one call of the program."""
  result: dict[str, tuple[int, int]] = {}
  for c in collectives(text):
    count, size = result.get(c.kind, (0, 0))
    result[c.kind] = (count + c.arrays * c.times, size + c.bytes * c.times)
  return result


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """({name: instructions}, the one that is called first)."""
  found: dict[str, list[str]] = {}
  entry, current = "", []
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      current = found[header.group(2)] = []
      if header.group(1):
        entry = header.group(2)
    else:
      current.append(line)
  return found, entry


def _trip_count(line: str, condition: list[str]) -> int:
  known = _TRIPS.search(line)
  if known:
    return int(known.group(1))
  constants = {}
  for instruction in condition:
    constant = _CONSTANT.search(instruction)
    if constant:
      constants[constant.group(1)] = int(constant.group(2))
  for instruction in condition:
    if "ROOT" in instruction:
      for name in re.findall(r"%?([\w.\-]+)", instruction.split("(", 1)[1]):
        if name in constants:
          return constants[name]
  # A comparison fused away leaves one constant, the bound.
  return max(constants.values(), default=1)


def _arrays(shapes: str, kind: str, started: bool) -> list[int]:
  """Bytes of each result; a -start's tuple lists its operands first, and counters last."""
  sizes = [
    int(np.prod([int(d) for d in dims.split(",") if d])) * _BYTES[dtype]
    for dtype, dims in _SHAPE.findall(shapes)
    if dtype in _BYTES
  ]
  if started and kind in ("all-gather", "collective-permute"):
    whole = [
      (dtype, dims) for dtype, dims in _SHAPE.findall(shapes) if not (dtype == "u32" and not dims)
    ]
    sizes = sizes[len(whole) // 2 : len(whole)]
  return sizes


def _group(line: str) -> int:
  match = _GROUPS.search(line)
  if not match:
    return 0
  if match.group(2):
    return int(match.group(2))
  if match.group(3):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(3)))
    return int(
      np.prod([int(sizes[a]) for a in re.findall(r"'(\w+)'", match.group(4)) if a in sizes])
    )
  return match.group(1).count(",") + 1
