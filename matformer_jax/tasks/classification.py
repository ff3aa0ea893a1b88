"""Image classification: MatViT on images (Section 4.2)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from matformer_jax.config import MatViTConfig
from matformer_jax.config_keys import Config
from matformer_jax.data import image_sources
from matformer_jax.data.augment import Transform
from matformer_jax.data.batches import (
  Corrupt,
  ImageBatches,
  LabelledBatches,
  read_ahead,
  sample_order,
)
from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.evals import classification
from matformer_jax.models import losses, matvit
from matformer_jax.tasks import sample_size


class Classification:
  """Classification with a MatViT: model and loss, without data.

  A training batch is {"image": uint8 [B, S, S, channels], "label": int32 [B], "seed": uint32
  [B]} and, for mixup, {"mix": float32 [B]}. `seed` decides what dropout drops of a row, `mix`
  is a row's own share. They come with the batch, so that a step is a function of its batch.
  """

  examples_unit = "img"
  rate = "examples_per_s"
  metrics = classification.METRICS
  headline = "accuracy"
  files = ()

  def __init__(
    self, model_config: MatViTConfig, batch_size: int, loss: str = "softmax", mixup: float = 0.0
  ):
    if loss not in losses.CLASSIFICATION:
      raise UserError(f"loss={loss!r} is unknown{did_you_mean(str(loss), losses.CLASSIFICATION)}")
    self.model_config = model_config
    self.examples_per_step = batch_size
    self.loss_name, self.mixup = loss, mixup

  @classmethod
  def from_config(cls, config: Config):
    return cls(MatViTConfig.from_dict(config.model), config.batch_size, config.loss, config.mixup)

  def batch_shapes(self, batch_size):
    c = self.model_config
    shape = lambda dtype, *rest: jax.ShapeDtypeStruct((batch_size, *rest), dtype)
    shapes = {
      "image": shape(jnp.uint8, c.image_size, c.image_size, c.channels),
      "label": shape(jnp.int32),
      "seed": shape(jnp.uint32),
    }
    return shapes | ({"mix": shape(jnp.float32)} if self.mixup else {})

  def preprocess(self, batch):
    """Mixup (Zhang et al. 2018): each image and its classes with those of the row before."""
    images = matvit.scale(batch["image"])
    targets_BxC = jax.nn.one_hot(batch["label"], self.model_config.num_classes)
    if self.mixup:
      mix = jax.vmap(lambda own, other, share: share * own + (1 - share) * other)
      images, targets_BxC = (
        mix(x, jnp.roll(x, 1, axis=0), batch["mix"]) for x in (images, targets_BxC)
      )
    return {"image": images, "target": targets_BxC, "seed": batch["seed"]}

  def loss(self, sub_config, execution, sub_params, batch, teacher=None, layer_indices=None):
    assert teacher is None  # only `matlm` configs have `distill`
    assert layer_indices is None  # refused by methods.step_kinds
    drops = sub_config.dropout or sub_config.stochastic_depth
    logits_BxC = matvit.MatViT(sub_config, execution).apply(
      {"params": sub_params}, batch["image"], seeds_B=batch["seed"] if drops else None
    )
    loss = jnp.mean(losses.CLASSIFICATION[self.loss_name](logits_BxC, batch["target"]))
    return loss, {"loss": loss}


class ImageClassification(Classification):
  """Classification of a set of images, augmented by index and epoch."""

  def __init__(self, config: Config, workdir=None):
    super().__init__(
      MatViTConfig.from_dict(config.model), config.batch_size, config.loss, config.mixup
    )
    data, model = config.data, self.model_config
    self.open_split = functools.partial(
      image_sources.open_images,
      data.source,
      channels=model.channels,
      classes=tuple(data.classes),
      data_dir=data.data_dir or None,
      label=data.label,
      max_pixels=getattr(data, "max_pixels", image_sources.MAX_PIXELS),  # older runs have none
    )
    self.train_images = self.open_split(data.train_split)
    self.validation_images = self.open_split(data.validation_split)
    if self.train_images.num_classes != model.num_classes:
      raise UserError(
        f"model.num_classes={model.num_classes}, but data.source={data.source!r} has "
        f"{self.train_images.num_classes} classes; set --config.model.num_classes="
        f"{self.train_images.num_classes}"
      )
    transform = functools.partial(Transform, size=model.image_size)
    self._corrupt = Corrupt(data.corrupt, workdir)
    self._train = ImageBatches(
      self.train_images,
      config.batch_size,
      transform(data.train_transform, name="data.train_transform"),
      self._corrupt,
      config.seed,
      config.mixup,
    )
    self._eval_transform = transform(data.eval_transform, name="data.eval_transform")
    self._eval, self._workers = config.eval, data.workers
    # One of each, so that a mistake in a transform shows before training, not after it.
    self._train.batch(0, range(1))
    self._validation(1, 1).batch(0)

  def _validation(self, images: int, batch_size: int) -> LabelledBatches:
    """The first `images` (0: all) of the sample that stands for the validation split."""
    order = sample_order(self.validation_images.size)
    return LabelledBatches(
      self.validation_images,
      batch_size,
      self._eval_transform,
      self._corrupt,
      order[:images] if images else order,
    )

  def batch(self, step, rows=None):
    return self._train.batch(step, rows)

  def batches(self, first, last, rows):
    return read_ahead(self._train, first, last, rows, self._workers)

  def sample_ids(self, step, rows=None):
    return self._train.image_ids(step, rows)

  def evaluate(
    self,
    execution,
    params,
    put,
    granularities,
    *,
    consistency=False,
    batches=None,
    batch_size=None,
    should_stop=lambda: False,
    progress=lambda done, total: None,
  ):
    images, batch_size = sample_size(self._eval, batches, batch_size)
    reader = self._validation(images, batch_size)
    total = reader.num_batches
    read = (put(functools.partial(reader.batch, i), batch_size) for i in range(total))
    return classification.evaluate(
      self.model_config,
      execution,
      params,
      granularities,
      read,
      self.loss_name,
      consistency,
      should_stop,
      lambda done: progress(done, total),
    )

  def identity(self):
    return {
      "train_images": self.train_images.fingerprint,
      "classes": self.train_images.class_names,
      "loss": self.loss_name,
    }

  def save_files(self, workdir):
    pass
