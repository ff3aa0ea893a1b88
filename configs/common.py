"""What the configs of every task share: the loop, checkpoints, the mesh, the optimizer.

Not a config of its own. The files beside it read it by path, since each of them may itself be
loaded by path, from any directory:

  common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))
"""

import ml_collections

GRANULARITIES = 4


def base(task: str, **own) -> ml_collections.ConfigDict:
  """The keys of every config.

  Args:
    task: the kind of model and of data.
    own: what the task adds, or sets differently; dicts are merged key by key.
  """
  config = ml_collections.ConfigDict(
    dict(
      task=task,
      # Directory of a trained or extracted model to start from, with a fresh optimizer. An
      # extracted M*2+L*2 has the sizes S, M and M*2+L*2; sampling=0/0/0/1 trains only the last.
      init_from="",
      seed=0,
      steps=0,
      batch_size=0,  # sequences or images per step, over all devices
      # Which sizes a step trains: sampled (one), joint (all, DynaBERT), sandwich (XL, S and one
      # drawn), each on its share of the batch; layerwise (one per layer, OFA).
      method="sampled",
      # p_S/p_M/p_L/p_XL: uniform, a row of Table 6 (table6_1 .. table6_5), or numbers
      # such as 0.2/0.22/0.24/0.34; 0/0/0/1 trains a plain Transformer. The paper's main
      # results use uniform (Section 3.2).
      sampling="uniform",
      grad_accum=1,
      dtype="auto",  # compute: float32 on CPU, bfloat16 elsewhere; parameters are float32
      # What layers keep for the backward pass: full (their inputs only), attn_out, dots_no_batch,
      # attn_out_ffn_pre, products, none (all). auto: none on CPU; where the attention kernel runs,
      # the first that fits of none (if unrolled), products, attn_out and full; else attn_out.
      remat="auto",
      # scanned, or unrolled, which is faster and compiles longer. auto: unrolled on one CPU, and
      # up to 32 layers where the attention kernel runs; else scanned. TPUs that chips.py does not
      # list run the kernels too, but take what auto takes elsewhere: attn_out, scanned.
      layers="auto",
      logits_gib=0.0,  # logits that the loss holds at a time, per device; 0: a sixth of a TPU's
      kernels="auto",  # Pallas kernels on TPU v4 and later; none leaves attention and loss to XLA
      max_nonfinite=10,  # stop after this many skipped updates in a row; 0 never stops
      log_every=10,
      # Copies of parameters on several devices are compared, bit for bit, before every
      # checkpoint, and every this many steps (0: only then).
      replica_check_every=0,
      hang_timeout_s=1800.0,  # exit when nothing finishes for this long; 0 waits for ever
      peer_timeout_s=60.0,  # exit when another host is silent for this long
      storage_timeout_s=300.0,  # exit when a bucket's workdir cannot be written for this long
      # -1: the remaining devices of a slice; slices=0: as many as the devices are of.
      mesh=dict(slices=0, data=1, fsdp=1, tensor=1),
      slice_grad_dtype="",  # in which gradients cross slices, e.g. bfloat16; "": as computed
      model=dict(
        num_layers=0,
        d_model=0,
        num_heads=0,
        num_kv_heads=0,  # fewer: grouped-query attention; 0: num_heads
        head_dim=0,  # 0: d_model / num_heads
        ffn_ratios=(0.5, 1.0, 2.0, 4.0),  # Sections 3.1 and 4.2
        ffn_widths=(),  # neurons, instead of ffn_ratios, which must then be ()
        activation="gelu",  # or relu2; the paper names both
        gated=False,
        nested_heads=False,
        head_ratios=(0.25, 0.5, 0.75, 1.0),  # Appendix F.2
        ffn_groups=1,
        head_groups=1,
        norm_eps=1e-6,
      ),
      data=dict(
        source="",
        data_dir="",  # where TFDS datasets were prepared
        log_samples=False,  # samples-<process>.jsonl: what each step trained on
      ),
      optim=dict(
        name="adamw",  # or adafactor, sgd, muon (AdamW for all but the matrices of the blocks)
        # full: also what the sampled size lacks decays, and moves by its momentum; sliced: it stays
        scope="full",
        schedule="cosine",
        peak_lr=0.0,
        warmup_steps=0,
        final_lr_ratio=0.0,
        b1=0.9,
        b2=0.0,
        momentum=0.9,  # of sgd
        muon_momentum=0.95,
        muon_rms=0.2,  # of its updates, as AdamW's (Liu et al. 2025); 0: scaled as by Jordan et al.
        # Matrices are orthogonalised whole, or nested: what each size adds to the one before apart.
        muon_blocks="whole",
        eps=1e-8,
        weight_decay=0.1,  # times the learning rate; matrices only
        clip_norm=1.0,
      ),
      checkpoint=dict(every=0, keep_last=2, keep_best=1),
      eval=dict(every=0, batches=0, batch_size=0),  # 0 batches: all validation data
    )
  )
  config.update(own)
  return config
