"""MatLM configs: `--config=configs/matlm.py:ROW`.

Rows of Table 4 (16 layers, 16 heads, 256k vocabulary, 1024 context, 1M-token batches):

  78M 180M 310M 463M 850M 2.6B

and two small ones that run on the embedded corpus, the Python standard library:

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
ROWS = tuple(TABLE_4) + ("quickstart", "tiny")


def get_config(row: str = "quickstart") -> ml_collections.ConfigDict:
  """The config of a row."""
  if row not in ROWS:
    raise ValueError(f"configs/matlm.py has no row {row!r}; rows are {', '.join(ROWS)}")
  config = _base()
  if row in TABLE_4:
    _table_4(config, *TABLE_4[row])
  elif row == "quickstart":
    _quickstart(config)
  else:
    _tiny(config)
  return config


def _base() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      task="matlm",
      # Directory of a trained or extracted model to start from: its model, tokenizer and
      # weights, a fresh optimizer. An extracted M*2+L*2 has the sizes S, M and M*2+L*2;
      # sampling=0/0/0/1 trains only the last.
      init_from="",
      seed=0,
      steps=0,
      batch_size=0,  # sequences per step, over all devices
      # p_S/p_M/p_L/p_XL: uniform, a row of Table 6 (table6_1 .. table6_5), or numbers
      # such as 0.2/0.22/0.24/0.34. The paper's main results use uniform (Section 3.2).
      sampling="uniform",
      grad_accum=1,
      dtype="auto",  # compute: float32 on CPU, bfloat16 elsewhere; parameters are float32
      remat="auto",  # none on CPU, else attn_out; or full, dots_no_batch, attn_out_ffn_pre
      z_loss=0.0,
      max_nonfinite=10,  # stop after so many skipped updates in a row; 0 never stops
      log_every=10,
      # Copies of parameters on several devices are compared, bit for bit, before every
      # checkpoint, and every so many steps.
      replica_check_every=0,
      hang_timeout_s=1800.0,  # leave when nothing finishes for so long; 0 waits for ever
      peer_timeout_s=60.0,  # leave when another host is silent for so long
      mesh=dict(data=1, fsdp=-1, tensor=1),  # -1: the remaining devices
      model=dict(
        vocab_size=256_000,
        num_layers=16,
        d_model=0,
        num_heads=16,
        seq_len=1024,
        ffn_ratios=(0.5, 1.0, 2.0, 4.0),  # Section 3.1
        activation="gelu",  # or relu2; the paper names both
        gated=False,
        nested_heads=False,
        head_ratios=(0.25, 0.5, 0.75, 1.0),  # Appendix F.2
        ffn_groups=1,
        head_groups=1,
        rope_base=10_000.0,
        norm_eps=1e-6,
      ),
      data=dict(
        source="stdlib",  # text:GLOB, tfds:NAME[/CONFIG]:FEATURE, tokens:DIR (data.prepare)
        data_dir="",  # where TFDS datasets were prepared
        tokenizer="",  # a SentencePiece .model file; empty trains one
        tokenizer_type="bpe",
        tokenizer_sample_bytes=50_000_000,
        validation_fraction=0.05,
        attend="across",  # or within: attention and positions start anew with every document
        cache_dir="",  # default ~/.cache/matformer_jax/data
        log_samples=False,  # samples-<process>.jsonl: which windows each step trained on
      ),
      optim=dict(
        name="adamw",  # or adafactor, sgd
        schedule="cosine",
        peak_lr=0.0,
        warmup_steps=0,
        final_lr_ratio=0.1,
        b1=0.9,
        b2=0.95,
        momentum=0.9,  # of sgd
        eps=1e-8,
        weight_decay=0.1,  # matrices only
        clip_norm=1.0,
      ),
      checkpoint=dict(every=0, keep_last=2, keep_best=1),
      eval=dict(every=0, batches=0, batch_size=0),
    )
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
