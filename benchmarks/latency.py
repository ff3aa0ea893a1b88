"""How well a profile predicts: predicted against measured latency of random mixes.

  make quickstart
  python benchmarks/latency.py --workdir=runs/quickstart

Profiles the model, then compiles and times random mixes that were not profiled, in the
same process. The last line is one JSON object.
"""

from __future__ import annotations

import json

from absl import app, flags, logging
import numpy as np

import matformer_jax
from matformer_jax import granularity as gran
from matformer_jax import profile, runtime, tables
from matformer_jax.decode import Decoder

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "A trained model.")
_MIXES = flags.DEFINE_integer("mixes", 24, "Random mixes per workload.")
_ROUNDS = flags.DEFINE_integer("rounds", 60, "Calls of each program; the fastest counts.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences at a time.")


def main(argv) -> None:
  runtime.keep_freed_memory()
  logging.set_verbosity(logging.ERROR)
  runtime.enable_compilation_cache()
  model = matformer_jax.load(_WORKDIR.value)
  config, execution = model.config, model.execution
  rng = np.random.default_rng(0)
  mixes = [gran.parse(rng.integers(0, config.num_granularities, config.num_layers), config)
           for _ in range(_MIXES.value)]
  result = {}
  for workload in profile.WORKLOADS:
    shape = (workload, _BATCH.value, config.seq_len)
    costs = profile.measure(config, execution, model.params, *shape, _ROUNDS.value)
    predict = profile.Profile(profile.device_name(), {workload: costs}).predict
    weights = Decoder(config, execution, gran.full(config)).lay_out(model.params)
    programs = [profile.make_program(Decoder(config, execution, g), weights, *shape) for g in mixes]
    measured = profile.fastest(programs, _ROUNDS.value, f"timing {len(mixes)} mixes")
    errors = [predict(g, workload) / m - 1 for g, m in zip(mixes, measured)]
    rows = [(gran.to_text(g, config), f"{1e3 * predict(g, workload):.3f}", f"{1e3 * m:.3f}",
             f"{100 * e:+.1f}%") for g, m, e in zip(mixes, measured, errors)]
    print(f"\n{workload}, {gran.LATENCIES[workload]}\n")
    print(tables.table(("mix", "predicted ms", "measured ms", "error"), rows), flush=True)
    result[workload] = {"mixes": len(mixes), "worst_error": max(map(abs, errors)),
                        "median_error": float(np.median(np.abs(errors))),
                        "within_10_percent": sum(abs(e) <= 0.1 for e in errors)}
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
