"""What a request calls a model: `name`, `name:M`, `name:M*2+L*2`, `name:0.6x`, `name:15ms`."""

from __future__ import annotations

import re

from matformer_jax import granularity as gran
from matformer_jax.config import MatLMConfig
from matformer_jax.errors import UserError
from matformer_jax.evals import latency

_SECONDS = re.compile(r"[0-9.eE+-]+(s|ms|us)")


def check(name: str) -> str:
  """A name that a model can be served under.

  Raises:
    UserError: if it is empty, or has a colon, which begins a size.
  """
  if not name or not name.isprintable() or ":" in name or not name.isascii():
    raise UserError(f"--name={name!r} must be printable ASCII without ':', e.g. --name=mine")
  return name


def resolve(
  model: str, name: str, config: MatLMConfig, profile: latency.Profile | None = None
) -> gran.Granularity | None:
  """The granularity that a request's `model` asks for; None leaves it to the load policy.

  After the colon comes a granularity or a budget of `gran.mix_n_match`. A time alone is that of
  one token: `15ms` is `decode:15ms`.

  Args:
    model: as the request has it.
    name: what the model is served as.
    profile: of this device, for budgets of time.

  Raises:
    UserError: for another model, or a size that does not parse or is out of reach.
  """
  base, colon, size = model.partition(":")
  if base != name:
    raise UserError(f"the model {base!r} is not here, only {name!r}")
  if not colon:
    return None
  size = size.strip()
  if _SECONDS.fullmatch(size):
    size = f"decode:{size}"
  if ":" in size or size[:1].isdigit() or size.startswith("."):
    return gran.mix_n_match(config, size, profile=profile)
  return gran.parse(size, config)


def full_name(name: str, granularity: gran.Granularity, config: MatLMConfig) -> str:
  """`name:M`, which `resolve` inverts."""
  return f"{name}:{gran.to_text(granularity, config)}"


def sizes(name: str, config: MatLMConfig) -> list[str]:
  """The names to choose from: the load policy's, and the trained sizes, narrowest first."""
  return [name, *(full_name(name, g, config) for g in gran.trained(config))]
