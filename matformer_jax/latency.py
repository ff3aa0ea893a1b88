"""Measures what each granularity's parts cost on this device, to plan for a latency.

  python -m matformer_jax.latency --workdir=runs/quickstart
  python -m matformer_jax.describe --workdir=runs/quickstart --budget=latency:15ms

The profile, profile.json beside the model, predicts any mix; see evals/latency.py.
"""

from __future__ import annotations

import json

from absl import flags

from matformer_jax import cli, runtime
from matformer_jax import granularity as gran
from matformer_jax.evals import latency
from matformer_jax.loading import LanguageModel, load


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  runtime.enable_compilation_cache()
  model = load(workdir, kind=LanguageModel)
  tokens = _TOKENS.value or model.config.seq_len
  costs = {
    w: latency.measure(
      model.config, model.execution, model.params, w, _BATCH.value, tokens, _ROUNDS.value
    )
    for w in latency.WORKLOADS
  }
  profile = latency.Profile(latency.device_name(), costs)
  path = model.workdir / latency.PROFILE_FILE
  path.write_text(json.dumps(profile.to_json(), indent=1))
  print(latency.table(model.config, profile))
  print(
    f"\nwrote {path}; plan with: python -m matformer_jax.describe --workdir={model.workdir} "
    f"--budget=latency:{1.02e3 * profile.predict(gran.trained(model.config)[:2][-1]):.3g}ms"
  )


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained or extracted model.")
  _BATCH = flags.DEFINE_integer("batch", 1, "Sequences at a time.", lower_bound=1)
  _TOKENS = flags.DEFINE_integer(
    "tokens",
    0,
    "Tokens of the forward pass, and of the cache when decoding; default the training context.",
    lower_bound=0,
  )
  _ROUNDS = flags.DEFINE_integer(
    "rounds", 60, "Calls of each program; the fastest counts.", lower_bound=1
  )
  cli.run(main)
