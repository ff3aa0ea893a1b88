"""MatLM configs: `--config=configs/matlm.py:ROW`.

Rows of Table 4 (16 layers, 16 heads, 256k vocabulary, 1024 context, 1M-token batches):

  78M 180M 310M 463M 850M 2.6B

each as it is or as it trains fastest on a slice, e.g. 850M@v5p:4x4x4 (PLANS below), and two
small ones that run on the embedded corpus, the Python standard library:

  quickstart   4 minutes on 2 CPU cores: make quickstart
  tiny         seconds; what the tests train

Any key can be overridden: --config.optim.peak_lr=1e-3. Tuples are given whole:
--config.model.ffn_ratios='(1,2,4)'.
"""

import pathlib
import runpy

import ml_collections

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))

# Table 4. A universal model is trained on g x the listed tokens (Appendix B.4).
TABLE_4 = {
  # row: (d_model, tokens per granularity in billions)
  "78M": (256, 10),
  "180M": (512, 20),
  "310M": (768, 30),
  "463M": (1024, 40),
  "850M": (1536, 80),
  "2.6B": (3072, 80),  # named in the text; the paper gives no token count: 850M's is kept
}

# ROW@SLICE: what `matformer pod_plan --config=matlm:ROW --topology=SLICE --tune` found, and its
# estimate of a step (libtpu 0.0.52). Other settings are left to `auto`.
PLANS: dict[str, dict] = {
  # mean over the sizes 238 ms, 66.3% MFU; XL 279 ms, 33.9 GiB: what `auto` comes to, set down
  "850M@v5p:4x4x4": {"remat": "none", "layers": "unrolled"},
  # mean over the sizes 469 ms, 54.8% MFU; XL 570 ms, 59.1%, 12.6 of 16 GiB; the row as it is: 704
  "2.6B@v5e:16x16": {
    "remat": "products",
    "layers": "unrolled",
    "mesh.fsdp": 64,
    "logits_gib": 5.34,
  },
}
ROWS = (*TABLE_4, *PLANS, "quickstart", "tiny")


def get_config(row: str = "quickstart") -> ml_collections.ConfigDict:
  """The config of a row."""
  if row not in ROWS:
    raise ValueError(f"configs/matlm.py has no row {row!r}; rows are {', '.join(ROWS)}")
  config = base()
  size = row.partition("@")[0]
  if size in TABLE_4:
    _table_4(config, *TABLE_4[size])
    config.update_from_flattened_dict(PLANS.get(row, {}))
  elif row == "quickstart":
    _quickstart(config)
  else:
    _tiny(config)
  return config


def base() -> ml_collections.ConfigDict:
  return common["base"](
    task="matlm",
    init_head=True,  # take the embedding over, which is the head too; False for a new tokenizer
    z_loss=0.0,
    # Every size also learns from a teacher: (1 - weight) * cross-entropy + weight *
    # temperature^2 * KL(teacher || size). teacher=self is XL of the same weights, whose own steps
    # stay as they are; parent is a frozen model, the directory `parent` or else `init_from`, of
    # the same vocabulary and tokenizer.
    distill=dict(weight=0.0, temperature=1.0, teacher="none", parent=""),
    mesh=dict(fsdp=-1),
    model=dict(
      vocab_size=256_000,
      num_layers=16,
      num_heads=16,
      seq_len=1024,
      rope_base=10_000.0,
      # As Llama's and its kin's models have them; the paper's have none of it.
      rope_scaling=(),  # (factor, low, high, original length), e.g. (8, 1, 4, 8192): Llama 3
      tied_head=True,
      embedding_scale=0.0,  # 0: sqrt(d_model)
      qkv_bias=False,
      qk_norm=False,
    ),
    data=dict(
      source="stdlib",  # text:GLOB, tfds:NAME[/CONFIG]:FEATURE, tokens:DIR (data.prepare)
      tokenizer="",  # a SentencePiece .model, a tokenizer.json, or where one is; empty trains one
      tokenizer_type="bpe",
      tokenizer_sample_bytes=50_000_000,
      validation_fraction=0.05,
      attend="across",  # or within: attention and positions restart with every document
      cache_dir="",  # default ~/.cache/matformer_jax/data
    ),
    optim=dict(final_lr_ratio=0.1, b2=0.95),
  )


def _table_4(config, d_model: int, billion_tokens: int) -> None:
  """A size of Table 4.

  The paper gives architecture, vocabulary, context, batch and tokens (Appendix B.1)
  and cites Adafactor; it is silent on the learning rate and every other optimizer
  constant. Ours: Adafactor with 10k warm-up steps and reciprocal-square-root decay,
  relative step 0.01 (the T5 pretraining recipe, Raffel et al. 2020, Section 3.1.2;
  LaMDA, whose set-up the paper follows, builds on T5's), global-norm clipping at 1
  (PaLM, Section 5) and z-loss 1e-4 (PaLM, Section 5).
  """
  config.model.d_model = d_model
  # Room for tensor parallelism up to 8 in the FFN and 4 in the heads; m_1 / 8 is a
  # multiple of 16 at every size, which bf16 tiles want.
  config.model.ffn_groups = 8
  config.model.head_groups = 4
  # Fits every slice in docs/pods.md; fewer than 16 devices want a smaller mesh.fsdp.
  config.mesh.update(dict(data=-1, fsdp=16))
  config.batch_size = 1024  # x 1024 tokens = 1M
  config.steps = common["GRANULARITIES"] * billion_tokens * 10**9 // (1024 * 1024)
  config.data.source = "tfds:c4/en:text"
  config.data.validation_fraction = 0.001
  config.data.tokenizer_type = "unigram"
  config.data.tokenizer_sample_bytes = 10**9
  config.z_loss = 1e-4
  config.optim.update(
    dict(name="adafactor", schedule="rsqrt", peak_lr=0.01, warmup_steps=10_000, weight_decay=0.0)
  )
  config.log_every = 100
  config.checkpoint.update(dict(every=1000, keep_last=3, keep_best=1))
  config.eval.update(dict(every=5000, batches=16, batch_size=1024))


def _quickstart(config) -> None:
  """About 4 minutes of training on 2 CPU cores; see README.md for the table it ends with."""
  config.model.update(dict(vocab_size=2048, num_layers=4, d_model=192, num_heads=4, seq_len=128))
  config.batch_size = 16
  config.steps = 1300
  # So short a run gives XL's own neurons few updates: draw it more often.
  config.sampling = "table6_4"
  config.optim.update(dict(peak_lr=3e-3, warmup_steps=60, final_lr_ratio=0.05))
  config.log_every = 20
  config.checkpoint.update(dict(every=100))
  config.eval.update(dict(every=650, batches=16, batch_size=16))


def _tiny(config) -> None:
  config.model.update(
    dict(
      vocab_size=512, num_layers=2, d_model=32, num_heads=4, seq_len=32, ffn_groups=2, head_groups=1
    )
  )
  config.batch_size = 8
  config.steps = 40
  config.optim.update(dict(peak_lr=1e-2, warmup_steps=5))
  config.data.tokenizer_sample_bytes = 500_000
  config.log_every = 10
  config.checkpoint.update(dict(every=10))
  config.eval.update(dict(every=20, batches=2, batch_size=8))
