"""What the operations of a train step belong to: layers, head or optimizer; products or not."""

from __future__ import annotations

import dataclasses
import re

from matformer_jax.tpu import hlo

KINDS = (
  "layers' products",
  "layers' rest",
  "head's products",
  "head's rest",
  "optimizer",
  "else",
  "attention kernel",
  "loss kernels",
  "exposed collectives",
)
_CALLS = re.compile(r" fusion\(.* calls=%?([\w.\-]+)")
_PRODUCT = re.compile(r" (?:convolution|dot)\(")


@dataclasses.dataclass(frozen=True)
class Names:
  """How the operations of a program tell what they belong to.

  Attributes:
    layers: part of the JAX names of all that is in a layer.
    head: source files of the output head and the loss, outside the layers.
    lookup: those of `head` that also look up the input, by anything but a product.
  """

  layers: str
  head: tuple[str, ...]
  lookup: tuple[str, ...] = ()


OURS = Names("/blocks", ("losses.py", "loss_kernel.py"))
# With scanned layers, the only loop there is.
MAXTEXT = Names(
  "/while", ("embeddings.py", "nnx_decoders.py", "max_utils.py", "train.py"), ("embeddings.py",)
)


def kind(operation: hlo.Operation, is_product: bool, names: Names) -> str:
  """Which of KINDS an operation is: by where the last JAX operation fused into it comes from."""
  what = "products" if is_product else "rest"
  if names.layers in operation.op:
    return f"layers' {what}"
  file = operation.source.partition(":")[0]
  differentiated = "jvp(" in operation.op
  if differentiated and file in names.head and (is_product or file not in names.lookup):
    return f"head's {what}"
  updates = not differentiated and operation.op.startswith("jit(") and file not in names.lookup
  return "optimizer" if updates and "shard_map" not in operation.op else "else"


def products(text: str) -> set[str]:
  """Instructions of a TPU program that multiply matrices: `convolution`s, alone or in fusions."""
  calls, computations, found = {}, set(), set()
  for current, lines in hlo.computations(text)[0].items():
    for line in lines:
      called = _CALLS.search(line)
      if called:
        calls[hlo.instruction(line)] = (current, called.group(1))
      elif _PRODUCT.search(line):
        found.add(hlo.instruction(line))
        computations.add(current)
  while True:  # fusions lie in fusions
    fused = {name for name, (_, callee) in calls.items() if callee in computations}
    if fused <= found:
      return found
    found |= fused
    computations |= {calls[name][0] for name in fused}
