"""Trains the sizes of a universal model that was made of a dense one (import_model).

  python -m matformer_jax.train --config=configs/elastify.py --workdir=runs/elastic \
      --config.init_from=models/elastic --config.data.source='text:books/*.txt'

The model is what init_from holds, but for seq_len. Its tokenizer is taken over.
"""

import pathlib
import runpy

import ml_collections

matlm = runpy.run_path(str(pathlib.Path(__file__).with_name("matlm.py")))

ROWS = ("default",)


def get_config(row: str = "default") -> ml_collections.ConfigDict:
  """The config of a row."""
  if row not in ROWS:
    raise ValueError(f"configs/elastify.py has no row {row!r}; rows are {', '.join(ROWS)}")
  config = matlm["base"]()
  config.update(
    dict(
      steps=1_000,
      batch_size=8,
      model=dict(seq_len=512),
      optim=dict(peak_lr=1e-4, warmup_steps=50, b2=0.95, weight_decay=0.0, final_lr_ratio=0.1),
      checkpoint=dict(every=250),
      eval=dict(every=250, batches=16, batch_size=8),
    )
  )
  return config
