"""How well a profile predicts: predicted against measured latency of random mixes.

  make quickstart
  python benchmarks/latency.py --workdir=runs/quickstart

Times the parts that a profile is made of, and random mixes that it has never seen, in
turn in one run, so that a machine that slows down slows both. The last line is one JSON
object.
"""

from __future__ import annotations

import json

from absl import app, flags, logging
import numpy as np

import matformer_jax
from matformer_jax import granularity as gran
from matformer_jax import runtime, tables
from matformer_jax.decoding.decode import Decoder
from matformer_jax.evals import latency

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
  mixes = set()
  while len(mixes) < _MIXES.value:
    mixes.add(gran.parse(rng.integers(0, config.num_granularities, config.num_layers), config))
  mixes = sorted(mixes, key=lambda g: gran.count(config, g).params)
  result = {}
  for workload in latency.WORKLOADS:
    decoders = latency.parts(config, execution)
    weights = decoders[-1].lay_out(model.params)
    programs = [
      latency.make_program(d, weights, workload, _BATCH.value, config.seq_len)
      for d in [*decoders, *(Decoder(config, execution, g) for g in mixes)]
    ]
    times = latency.fastest(programs, _ROUNDS.value, f"timing {workload}")
    measured = times[len(decoders) :]
    costs = latency.solve(config, times[: len(decoders)], _BATCH.value, config.seq_len)
    predict = latency.Profile(latency.device_name(), {workload: costs}).predict
    errors = [predict(g, workload) / m - 1 for g, m in zip(mixes, measured)]
    rows = [
      (
        gran.to_text(g, config),
        f"{1e3 * predict(g, workload):.3f}",
        f"{1e3 * m:.3f}",
        f"{100 * e:+.1f}%",
      )
      for g, m, e in zip(mixes, measured, errors)
    ]
    print(f"\n{workload}, {gran.LATENCIES[workload]}\n")
    print(tables.table(("mix", "predicted ms", "measured ms", "error"), rows), flush=True)
    result[workload] = {
      "mixes": len(mixes),
      "worst_error": max(map(abs, errors)),
      "median_error": float(np.median(np.abs(errors))),
      "within_10_percent": sum(abs(e) <= 0.1 for e in errors),
    }
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
