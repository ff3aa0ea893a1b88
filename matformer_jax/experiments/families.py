"""Families of models to compare, at three scales.

  smoke   seconds a model: do the programs work?
  laptop  minutes a model on one processor: which claims hold for small models?
  paper   the paper's own sizes and budgets, for pods

A family is one shape of universal model on one text or set of images. What is compared is trained
on equally many examples (Appendix B.4): a universal model for `steps`, and each of its g sizes,
alone, for a g-th of them. All methods have the same hyper-parameters, but for the learning rate,
of which each gets the best of the same few.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

from matformer_jax import config_files
from matformer_jax import granularity as gran
from matformer_jax.config import ModelConfig, model_config
from matformer_jax.config_keys import Config
from matformer_jax.data import image_sources
from matformer_jax.experiments import corpus, images
from matformer_jax.experiments.runs import Run, changed, flat

INDEPENDENT, MATFORMER, DYNABERT, OFA = "independent", "matformer", "dynabert", "ofa"
# How a universal model's config differs from MatFormer's.
UNIVERSAL: dict[str, dict[str, Any]] = {
  MATFORMER: {},
  DYNABERT: {"method": "joint"},
  OFA: {"method": "layerwise"},
  # Beyond the paper.
  "sandwich": {"method": "sandwich"},
  "joint, same batch": {"method": "joint"},
  "distilled": {"distill.teacher": "self", "distill.weight": 0.5},
  "sliced": {"optim.scope": "sliced"},
  "muon": {"optim.name": "muon"},
  "muon, nested blocks": {"optim.name": "muon", "optim.muon_blocks": "nested"},
  "muon, sliced": {"optim.name": "muon", "optim.scope": "sliced"},
  # Rows of Table 6; its third is MatFormer's uniform.
  **{f"table6_{row}": {"sampling": f"table6_{row}"} for row in (1, 2, 4, 5)},
}
# Methods with the learning rate of another one; every other has its own.
RATE_OF = {f"table6_{row}": MATFORMER for row in (1, 2, 4, 5)}
# Batches that a step takes, one for each size that it trains, for that fewer steps; DynaBERT's as
# in Appendix B.3.
BATCHES = {DYNABERT: 4, "sandwich": 3}
# A pair of runs of one seed sees the same text in the same order. Of images the seeds of models
# trained alone differ: from equal initial weights their embeddings would resemble each other.
_IMAGE_SEEDS_APART = 1000


@dataclasses.dataclass(frozen=True)
class Family:
  """Models of one shape.

  Attributes:
    name: of the directory of its runs.
    spec, changes: the config of its universal model.
    rates: learning rates that every method is tried with, if there are several; the first one is
      that of families which share another one's sweep.
  """

  name: str
  spec: str
  changes: Mapping[str, Any]
  rates: tuple[float, ...]

  @functools.cached_property
  def config(self) -> Config:
    """Of the universal model."""
    return changed(self.spec, self.changes)

  @functools.cached_property
  def model(self) -> ModelConfig:
    """The universal model."""
    return model_config(self.config)

  @property
  def sizes(self) -> tuple[str, ...]:
    """Names of the g granularities, smallest first."""
    return gran.names(self.model)

  def universal(self, method: str, seed: int, rate: float) -> Run:
    """A run of one of UNIVERSAL."""
    changes = dict(UNIVERSAL[method])
    if method in BATCHES:
      times = BATCHES[method]
      changes |= {"batch_size": self.config.batch_size * times, **self._shorter(times)}
    return self._run(method, seed, rate, changes, method, seed)

  def independent(self, size: str, seed: int, rate: float) -> Run:
    """A run of a size alone."""
    i = self.sizes.index(size)
    is_text = self.config.task == "matlm"
    changes = {
      "model.ffn_ratios": (self.model.ffn_ratios[i],),
      "sampling": "uniform",
      **self._shorter(self.model.num_granularities),
    }
    if self.model.nested_heads:
      # A head keeps its width, so that there are fewer.
      heads = self.model.head_counts[i]
      changes |= {
        "model.nested_heads": False,
        "model.num_heads": heads,
        "model.num_kv_heads": heads // self.model.queries_per_kv,
        "model.head_dim": self.model.head_dim,
        "model.head_groups": 1,
      }
    own_seed = seed if is_text else seed + _IMAGE_SEEDS_APART * (i + 1)
    return self._run(INDEPENDENT, own_seed, rate, changes, f"{INDEPENDENT}_{size}", seed)

  def independents(self, seed: int, rate: float) -> dict[str, Run]:
    """A run for every size."""
    return {size: self.independent(size, seed, rate) for size in self.sizes}

  def _shorter(self, times: int) -> dict[str, Any]:
    config = self.config
    return {
      "steps": max(config.steps // times, 1),
      "optim.warmup_steps": config.optim.warmup_steps // times,
    }

  def _run(self, method: str, seed: int, rate: float, changes, label: str, number: int) -> Run:
    label = label.replace(", ", "_").replace(" ", "_")
    changes = {**self.changes, "optim.peak_lr": rate, "seed": seed, **changes}
    name = f"{self.name}/{label}-lr{rate:g}-seed{number}"
    return Run(name, self.spec, tuple(changes.items()), method)


@dataclasses.dataclass(frozen=True)
class Scale:
  """What experiments are made of.

  Attributes:
    text, images: the families that most of them compare.
    widths: families of growing size, for the scaling law (Table 4); those that differ from `text`.
    nested_heads: nested in the heads only, and in heads and FFN (Appendix F.2).
    batches: of validation text that everything is measured on.
    ladder: Mix'n'Match models, about.
    architectures: that the search measures.
    pretraining: classes of images that Table 7 pretrains on; the others are fine-tuned on.
    seeds: repetitions by default.
  """

  text: Family
  images: Family
  widths: tuple[Family, ...]
  nested_heads: tuple[Family, Family]
  batches: int
  ladder: int
  architectures: int
  pretraining: tuple[int, ...]
  seeds: int


SCALES = ("smoke", "laptop", "paper")
# Rows of configs/matlm.py.
_PAPER_WIDTHS = ("78M", "180M", "310M", "463M")


def make_scale(name: str, root: pathlib.Path, text: str = "", pictures: str = "") -> Scale:
  """A scale; makes its data where it is not there yet.

  Args:
    root: where data is made.
    text, pictures: sources to take instead, as `data.source`.

  Raises:
    UserError: where data cannot be made.
  """
  if name == "paper":
    return _paper(text, pictures)
  smoke = name == "smoke"
  prefix = "smoke_" if smoke else ""
  text = text or corpus.write(root / f"{prefix}text", limit=3_000_000 if smoke else 0)
  if pictures:
    classes = image_sources.open_images(pictures, "train", channels=1).num_classes
  else:
    classes, train, test = (8, 400, 200) if smoke else (len(images.CHARACTERS), 60_000, 30_000)
    pictures = images.write(root / f"{prefix}images", classes, train, test)
  return _smoke(text, pictures, classes) if smoke else _laptop(text, pictures, classes)


def _text_family(name: str, spec: str, source: str, rates, **changes) -> Family:
  data = {"data.source": source} if source else {}
  return Family(name, spec, {"sampling": "uniform", **data, **flat(changes)}, rates)


def _image_family(spec: str, source: str, rates, **changes) -> Family:
  data = {"data.source": source} if source else {}
  return Family("images", spec, {"sampling": "uniform", **data, **flat(changes)}, rates)


def _with_heads(family: Family) -> tuple[Family, Family]:
  """The same nested in its heads only, and in both."""
  top = family.model.ffn_ratios[-1]
  nested = {"model.nested_heads": True}
  alone = {**nested, "model.ffn_ratios": (top,) * family.model.num_granularities}
  return (
    dataclasses.replace(family, name=f"{family.name}_heads", changes={**family.changes, **alone}),
    dataclasses.replace(
      family, name=f"{family.name}_heads_and_ffn", changes={**family.changes, **nested}
    ),
  )


def _of_width(family: Family, d_model: int, steps: int) -> Family:
  changes = {**family.changes, "model.d_model": d_model, "steps": steps}
  return dataclasses.replace(family, name=f"{family.name}_d{d_model}", changes=changes)


_QUIET = {"eval": {"every": 0}, "checkpoint": {"every": 0, "keep_last": 1, "keep_best": 0}}


def _smoke(text: str, pictures: str, classes: int) -> Scale:
  language = _text_family(
    "text",
    "matlm:tiny",
    text,
    (1e-2,),
    steps=16,
    **_QUIET,
    data={"tokenizer_sample_bytes": 300_000, "validation_fraction": 0.1},
    model={"d_model": 16, "num_layers": 3},
  )
  vision = _image_family(
    "matvit:digits",
    pictures,
    (1e-2,),
    steps=16,
    batch_size=32,
    **_QUIET,
    model={"image_size": images.SIZE, "patch_size": 7, "num_classes": classes, "d_model": 16},
  )
  return Scale(
    language,
    vision,
    (_of_width(language, 32, 24),),
    _with_heads(language),
    batches=2,
    ladder=3,
    architectures=24,
    pretraining=tuple(range(0, classes, 2)),
    seeds=1,
  )


def _laptop(text: str, pictures: str, classes: int) -> Scale:
  often = {**_QUIET, "checkpoint": {"every": 500, "keep_last": 1, "keep_best": 0}}
  language = _text_family(
    "text",
    "matlm:quickstart",
    text,
    (1e-2, 5e-3, 2e-2),
    steps=2400,
    batch_size=8,
    **often,
    data={"tokenizer_sample_bytes": 20_000_000, "validation_fraction": 0.1},
    model={"vocab_size": 1024, "num_layers": 6, "d_model": 48, "num_heads": 4, "seq_len": 128},
    optim={"warmup_steps": 120},
  )
  vision = _image_family(
    "matvit:fashion",
    pictures,
    (4e-3, 2e-3, 8e-3),
    steps=25_600,
    batch_size=32,
    **often,
    data={"train_transform": "", "eval_transform": ""},
    model={"num_classes": classes, "patch_size": 7, "d_model": 32},
    optim={"warmup_steps": 1600, "clip_norm": 0.3},
  )
  return Scale(
    language,
    vision,
    tuple(_of_width(language, d, steps) for d, steps in ((24, 1200), (32, 1600), (64, 3200))),
    _with_heads(language),
    batches=128,
    ladder=13,
    architectures=256,
    pretraining=tuple(range(0, classes, 2)),
    seeds=3,
  )


def _paper(text: str, pictures: str) -> Scale:
  """Table 4's models; ViT-B/16 on ImageNet-1K with AugReg. One learning rate: its own."""
  rates = lambda spec: (config_files.get_config(spec).optim.peak_lr,)
  family = lambda row, name: _text_family(name, f"matlm:{row}", text, rates(f"matlm:{row}"))
  language = family("850M", "text")
  return Scale(
    language,
    _image_family("matvit:B16_i1k_augreg", pictures, rates("matvit:B16_i1k_augreg")),
    tuple(family(row, f"text_{row}") for row in _PAPER_WIDTHS),
    _with_heads(language),
    batches=16,  # a million tokens each
    ladder=13,
    architectures=16_000,
    pretraining=tuple(range(0, 1000, 2)),
    seeds=3,
  )
