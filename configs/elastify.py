"""Trains the sizes of a universal model that was made of a dense one (import_model).

  python -m matformer_jax.train --config=configs/elastify.py --workdir=runs/elastic \
      --config.init_from=models/elastic --config.data.source='text:books/*.txt'

The model is what init_from holds, but for seq_len. Its tokenizer is taken over. Each size also
learns from init_from itself, frozen.
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
      batch_size=4,
      # So that SmolLM2-135M takes 10 GB of a CPU's memory; accelerators: auto, both.
      remat="attn_out",
      layers="scanned",
      distill=dict(teacher="parent", weight=0.5),
      # SmolLM2-135M's, where init_from names no other.
      model=dict(
        vocab_size=49_152,
        seq_len=512,
        num_layers=30,
        d_model=576,
        num_heads=9,
        num_kv_heads=3,
        ffn_ratios=(),
        ffn_widths=(384, 768, 1152, 1536),
        activation="silu",
        gated=True,
        norm_eps=1e-5,
        rope_base=100_000.0,
        embedding_scale=1.0,
      ),
      optim=dict(peak_lr=3e-4, warmup_steps=50, b2=0.95, weight_decay=0.0, final_lr_ratio=0.1),
      checkpoint=dict(every=250),
      eval=dict(every=250, batches=8, batch_size=4),
    )
  )
  return config
