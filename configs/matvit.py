"""MatViT configs: `--config=configs/matvit.py:ROW`.

  B16_i1k_augreg     B/16 on ImageNet-1K with AugReg, 300 epochs (Figures 4a, 5a)
  L16_i21k           L/16 on ImageNet-21K: pretraining (Figures 4b, 5b)
  L16_i1k_finetune   L/16 on ImageNet-1K: fine-tuning, --config.init_from=DIR of the above

and two that run on a laptop:

  fashion            Fashion-MNIST, patch 4: minutes on 2 CPU cores
  digits             scikit-learn's 8x8 digits: seconds; what the tests train

Any other size: --config=configs/matvit.py:S32_i1k_augreg, of Ti, S, B, L, H and patch 4, 8, 14,
16, 32. Any key can be overridden: --config.optim.peak_lr=5e-4.

ImageNet-1K: --config.data.source=tfds:imagenet2012 (prepared as array_record), or
folder:DIR with DIR/train/<class>/*.JPEG and DIR/validation/<class>/*.JPEG. ImageNet-21K has no
TFDS builder: folder:DIR, or a builder of your own.
"""

import pathlib
import re
import runpy

import ml_collections

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))

# d_model, layers, heads: Dosovitskiy et al. 2021, Table 1; Ti and S: Steiner et al. 2021.
VARIANTS = {
  "Ti": (192, 12, 3),
  "S": (384, 12, 6),
  "B": (768, 12, 12),
  "L": (1024, 24, 16),
  "H": (1280, 32, 16),
}
PATCHES = (4, 8, 14, 16, 32)
ROWS = ("B16_i1k_augreg", "L16_i21k", "L16_i1k_finetune", "fashion", "digits")
IMAGENET_1K, IMAGENET_21K = 1_281_167, 14_197_122  # training images


def get_config(row: str = "fashion") -> ml_collections.ConfigDict:
  """The config of a row."""
  config = _base()
  if row in ("fashion", "digits"):
    (_fashion if row == "fashion" else _digits)(config)
    return config
  match = re.fullmatch(r"(Ti|S|B|L|H)(\d+)_(i1k_augreg|i21k|i1k_finetune)", row)
  if not match or int(match[2]) not in PATCHES:
    raise ValueError(f"configs/matvit.py has no row {row!r}; rows are {', '.join(ROWS)}")
  d_model, num_layers, num_heads = VARIANTS[match[1]]
  config.model.update(
    dict(d_model=d_model, num_layers=num_layers, num_heads=num_heads, patch_size=int(match[2]))
  )
  {"i1k_augreg": _i1k_augreg, "i21k": _i21k, "i1k_finetune": _i1k_finetune}[match[3]](config)
  return config


def _base() -> ml_collections.ConfigDict:
  return common["base"](
    task="matvit",
    # With init_from, the encoder is taken over, and its positions are resized to image_size.
    init_head=False,  # take the head over too; else it starts at zero
    loss="softmax",  # or sigmoid: a binary cross-entropy per class
    mixup=0.0,  # alpha; 0 mixes nothing
    mesh=dict(data=-1),
    model=dict(
      image_size=224,
      patch_size=16,
      channels=3,
      num_classes=1000,
      pooling="cls",  # or mean
      representation_size=0,
      head_bias=0.0,
      dropout=0.0,
      stochastic_depth=0.0,
    ),
    data=dict(
      source="tfds:imagenet2012",  # sklearn:digits, idx:DIR, folder:DIR
      train_split="train",
      validation_split="validation",
      label="label",  # TFDS feature with the class, or several (real_label)
      classes=(),  # keep only these, renumbered; () keeps all
      # Operations, see matformer_jax/data/augment.py.
      train_transform="inception_crop(224)|flip",
      eval_transform="resize_small(256)|center_crop(224)",
      corrupt="error",  # or skip: images that do not decode are left out and counted
      max_pixels=178_956_970,  # images of more are corrupt: they could fill the memory
      workers=0,  # processes that decode; 0: in the training process
    ),
    optim=dict(peak_lr=1e-3, warmup_steps=10_000, b2=0.999),
  )


def _i1k_augreg(config) -> None:
  """ImageNet-1K from scratch with AugReg (Steiner et al. 2021), as Scenic's ViT configs have it."""
  config.model.update(dict(head_bias=-6.9, dropout=0.1, stochastic_depth=0.1))
  config.loss = "sigmoid"
  config.mixup = 0.5
  config.batch_size = 4096
  # A universal model gets what g independent ones get together (Appendix B.4).
  config.steps = common["GRANULARITIES"] * 300 * IMAGENET_1K // config.batch_size
  config.data.train_transform = "inception_crop(224)|flip|randaugment(2,15)"
  _pod(config, eval_every=5000)


def _i21k(config) -> None:
  """ImageNet-21K pretraining: 90 epochs per granularity, light augmentation."""
  config.model.update(dict(num_classes=21_843, head_bias=-10.0, dropout=0.1, stochastic_depth=0.1))
  config.loss = "sigmoid"
  config.mixup = 0.2
  config.batch_size = 4096
  config.steps = common["GRANULARITIES"] * 90 * IMAGENET_21K // config.batch_size
  config.data.update(
    dict(
      source="folder:/data/imagenet21k",
      train_transform="inception_crop(224)|flip|randaugment(2,10)",
    )
  )
  config.optim.weight_decay = 0.03
  _pod(config, eval_every=20_000)


def _i1k_finetune(config) -> None:
  """Fine-tuning on ImageNet-1K at 384 pixels, softmax, SGD with momentum (Dosovitskiy et al.
  2021, Appendix B.1.1). For 224 pixels override model.image_size and both transforms."""
  config.model.image_size = 384
  config.batch_size = 512
  config.steps = 20_000
  config.data.update(dict(train_transform="inception_crop(384)|flip", eval_transform="resize(384)"))
  config.optim.update(dict(name="sgd", peak_lr=0.03, warmup_steps=500, weight_decay=0.0))
  _pod(config, eval_every=2000)


def _pod(config, eval_every: int) -> None:
  config.data.workers = 32  # per host; benchmarks/images.py measures how many a host needs
  config.log_every = 100
  config.checkpoint.update(dict(every=1000, keep_last=3, keep_best=1))
  config.eval.update(dict(every=eval_every, batch_size=1024))


def _fashion(config) -> None:
  """Fashion-MNIST from its IDX files, such as Debian's dataset-fashion-mnist installs."""
  config.model.update(
    dict(
      image_size=28, patch_size=4, channels=1, num_classes=10, d_model=64, num_layers=4, num_heads=4
    )
  )
  config.data.update(
    dict(source="idx:/usr/share/datasets/fashion-mnist", train_transform="flip", eval_transform="")
  )
  config.batch_size = 32
  config.steps = 12_000
  config.optim.update(dict(peak_lr=3e-3, warmup_steps=600, b2=0.95))
  config.log_every = 100
  config.checkpoint.update(dict(every=3000))
  config.eval.update(dict(every=3000, batches=8, batch_size=250))


def _digits(config) -> None:
  config.model.update(
    dict(
      image_size=8,
      patch_size=2,
      channels=1,
      num_classes=10,
      d_model=32,
      num_layers=2,
      num_heads=4,
      ffn_groups=2,
    )
  )
  config.data.update(dict(source="sklearn:digits", train_transform="", eval_transform=""))
  config.batch_size = 64
  config.steps = 300
  config.optim.update(dict(peak_lr=1e-2, warmup_steps=20))
  config.log_every = 50
  config.checkpoint.update(dict(every=100))
  config.eval.update(dict(every=150, batch_size=72))
