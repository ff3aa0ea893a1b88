"""The Python API in one script: train a tiny universal model, then use it at every size.

  python examples/every_size.py [WORKDIR]

Takes less than a minute on a CPU, nearly all of it compiling. With a WORKDIR the run is kept, and
used again if it is there.
"""

import pathlib
import sys
import tempfile

import matformer_jax
from matformer_jax.extract import extract
from matformer_jax.train import train


def main(workdir: pathlib.Path) -> None:
  if not (workdir / "config.json").exists():
    config = matformer_jax.get_config("matlm:tiny")
    config.log_every = 20  # any key can be changed
    train(config, workdir)

  model = matformer_jax.load(workdir)
  print(model)  # a table of sizes

  # Any size of the same weights, named by its layers' widths.
  tokens = model.tokenizer.encode("def main(")
  text = "for i in range(10):\n  print(i)\n"
  for size in ("S", "M", "S*1+M*1", "XL"):
    logits = model.logits(tokens, size)
    print(f"{size:8} logits {logits.shape}, loss {model.loss(text, size):.3f}")

  # Mix'n'Match: the largest mix of sizes within a budget, which no step has trained.
  small = matformer_jax.mix_n_match(model.config, "0.8x")
  counts = matformer_jax.count(model.config, small)
  print(f"0.8x of the parameters: {matformer_jax.to_text(small, model.config)}, {counts.params:,}")

  # Cut out, it is a model like any other.
  out = workdir / "small"
  if not out.exists():
    extract(workdir, small, out)
  submodel = matformer_jax.load(out)
  print(f"universal {model.loss(text, small):.6f}, extracted {submodel.loss(text):.6f}")

  print(repr(model.generate("def main(", "XL", max_tokens=20, draft="S")))


if __name__ == "__main__":
  if len(sys.argv) > 1:
    main(pathlib.Path(sys.argv[1]))
  else:
    with tempfile.TemporaryDirectory() as directory:
      main(pathlib.Path(directory) / "run")
