"""What is exported, loaded by transformers and llama.cpp: logits, greedy text and token ids."""

import argparse
import inspect
import itertools
import json
import pathlib
import typing

import export_models
from export_models import KINDS, MIX
from helpers import AWKWARD
import jax
import llama_cpp
import numpy as np
from PIL import Image
import pytest
import torch
import transformers

from matformer_jax import UserError, export
from matformer_jax.config import Execution, MatViTConfig
from matformer_jax.data.augment import Transform
from matformer_jax.exporting import compare
from matformer_jax.loading import VisionModel
from matformer_jax.models import matvit

PROMPTS = export_models.tokens()
SOURCE = [pathlib.Path(m.__file__).read_text() for m in (argparse, inspect, typing)]
SPECIALS = AWKWARD[-3]  # transformers makes special tokens of it
PROMPT = PROMPTS[0, :9].tolist()
COUNT = PROMPTS.shape[1] - len(PROMPT)


def of_transformers(directory, **options):
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, **options
  ).eval()


def greedy(model) -> list[int]:
  """PROMPT and what follows."""
  out = model.generate(
    torch.tensor([PROMPT]),
    attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
    max_new_tokens=COUNT,
    do_sample=False,
    eos_token_id=-1,
    pad_token_id=0,
  )
  return out[0].tolist()


@pytest.mark.parametrize(
  "kind,granularity",
  [*((kind, MIX) for kind in KINDS), ("llama, nested heads", "S"), ("gemma", "S")],
)
def test_transformers(tmp_path, kind, granularity):
  model = export_models.make(kind)
  want = export_models.logits(model, PROMPTS, granularity)
  for mixed in ("padded", "remote_code") if granularity == MIX else ("padded",):
    out = tmp_path / mixed
    export.export(model, granularity, "hf", out, mixed=mixed, check=False)
    theirs = of_transformers(out, trust_remote_code=mixed == "remote_code")
    with torch.no_grad():
      have = theirs(torch.tensor(PROMPTS)).logits.numpy()
    np.testing.assert_allclose(have, want, atol=1e-5 * max(1, np.abs(want).max()))
    assert export_models.is_greedy(model, greedy(theirs), len(PROMPT), granularity)


def test_remote_code_has_the_true_size(tmp_path):
  model = export_models.make("llama, nested heads")
  export.export(model, MIX, "hf", tmp_path / "mix", mixed="remote_code")
  theirs = of_transformers(tmp_path / "mix", trust_remote_code=True)
  widths = [layer.mlp.up_proj.out_features for layer in theirs.model.layers]
  heads = [layer.self_attn.q_proj.out_features // 8 for layer in theirs.model.layers]
  assert (widths, heads) == ([64, 64, 96, 96], [4, 4, 6, 6])


def of_llama_cpp(file, length: int):
  return llama_cpp.Llama(
    str(file), n_ctx=length, n_batch=length, logits_all=True, verbose=False, type_k=0, type_v=0
  )


@pytest.mark.parametrize(
  "kind,granularity,architecture",
  [
    ("llama, tied", "S", "llama"),
    ("llama, tied", MIX, "deci"),
    ("llama 3, in groups", "S", "llama"),
    ("llama 3, in groups", MIX, "deci"),
    ("llama, nested heads", "M", "llama"),
    ("llama, nested heads", "S*1+XL*1+M*1+L*1", "deci"),
    ("gemma", "M", "gemma"),
    ("arcee", "M", "arcee"),
    ("qwen2", "S", "qwen2"),
    ("qwen3", "S", "qwen3"),
  ],
)
def test_llama_cpp(tmp_path, kind, granularity, architecture):
  file, model = tmp_path / "model.gguf", export_models.make(kind)
  bound = compare.LLAMA_CPP_GELU if kind == "gemma" else 1e-4
  export.export(model, granularity, "gguf", file, check=False)
  runtime = of_llama_cpp(file, 64)
  assert runtime.metadata["general.architecture"] == architecture
  want = export_models.logits(model, PROMPTS, granularity)
  for tokens, logits in zip(PROMPTS, want):
    runtime.reset()
    runtime.eval(tokens.tolist())
    have = runtime.scores[: len(tokens)]
    np.testing.assert_allclose(have, logits, atol=bound * max(1, np.abs(want).max()))
  runtime.reset()
  text = itertools.islice(runtime.generate(PROMPT, temp=0.0, repeat_penalty=1.0), COUNT)
  assert export_models.is_greedy(model, [*PROMPT, *text], len(PROMPT), granularity)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_of_rounded_weights(tmp_path, dtype):
  """Rounding moves logits by what it moves weights."""
  model = export_models.make("llama")
  lines = export.export(model, MIX, "gguf", tmp_path / "model.gguf", dtype)
  assert "logits within" in lines[1]
  size = (tmp_path / "model.gguf").stat().st_size
  export.export(model, MIX, "gguf", tmp_path / "f32.gguf", check=False)
  assert size < 0.6 * (tmp_path / "f32.gguf").stat().st_size


@pytest.mark.parametrize("make", [export_models.sentencepiece, export_models.byte_level])
def test_tokenizers(tmp_path, make):
  ours = make()
  model = export_models.make("llama", ours)
  export.export(model, "S", "hf", tmp_path / "hf", check=False)
  export.export(model, "S", "gguf", tmp_path / "model.gguf", check=False)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  runtime = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
  for text in (*SOURCE, *AWKWARD):
    ids = ours.begin(text)
    assert runtime.tokenize(text.encode(), add_bos=True, special=False) == ids
    if text != SPECIALS:
      assert theirs(text).input_ids == ids
      assert theirs.decode(ids) == text
  assert theirs.eos_token_id == runtime.token_eos() == ours.eos_id


def test_a_difference_is_found(tmp_path, monkeypatch):
  """A wrong order of rows is no small error, and nothing is left of the file."""
  model = export_models.make("llama")
  right = export.gguf_export.target_of(model.config)
  wrong = export.gguf_export.dataclasses.replace(right, interleaved=False)
  monkeypatch.setattr(export.gguf_export, "target_of", lambda config: wrong)
  with pytest.raises(UserError, match="llama.cpp: logits within .* nothing was written"):
    export.export(model, "S", "gguf", tmp_path / "model.gguf")
  assert not list(tmp_path.iterdir())


def test_padding_is_said(tmp_path):
  model = export_models.make("llama")
  lines = export.export(model, MIX, "hf", tmp_path / "mix")
  # Two layers of 64 neurons beside two of 96, three matrices of 64 rows, 4 bytes.
  assert f"{2 * 32 * 3 * 64 * 4:,} bytes more" in lines[1]
  assert json.loads((tmp_path / "mix" / "config.json").read_text())["intermediate_size"] == 96


# ------------------------------------------------------------------------ vision

VIT = dict(
  image_size=16,
  patch_size=4,
  channels=3,
  num_classes=5,
  num_layers=3,
  d_model=32,
  num_heads=4,
  ffn_ratios=(0.5, 1.0, 2.0, 4.0),
)


def vision_model(transform: str = "", **changes) -> VisionModel:
  config = MatViTConfig(**VIT | changes)
  rng = np.random.default_rng(0)
  add_noise = lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32)
  params = jax.tree.map(add_noise, matvit.init_params(config, jax.random.key(0)))
  card = {"identity": {"classes": [f"class {i}" for i in range(5)]}}
  where = pathlib.Path("runs/random")
  return VisionModel(params, config, 0, card, where, Execution(), Transform(transform, 16))


@pytest.mark.parametrize(
  "granularity,changes",
  [("XL", {}), ("S", {}), ("S*1+XL*1+M*1", dict(nested_heads=True, ffn_groups=2))],
)
def test_vit(tmp_path, granularity, changes):
  model = vision_model(**changes)
  lines = export.export(model, granularity, "hf", tmp_path / "vit")
  assert "transformers: logits within" in lines[-1]
  theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "vit").eval()
  images = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8)
  with torch.no_grad():
    pixels = torch.tensor(images.transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)
    have = theirs(pixels).logits.numpy()
  np.testing.assert_allclose(have, model.logits(images, granularity), atol=2e-6 * 10)
  assert theirs.config.id2label[3] == "class 3"


@pytest.mark.parametrize("transform", ["", "resize(16)", "resize_small(20)|center_crop(16)"])
def test_vits_preprocessor(tmp_path, transform):
  """Their processor and our transform make the same pixels, to a level of 8 bits."""
  model = vision_model(transform)
  export.export(model, "S", "hf", tmp_path / "vit", check=False)
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit")
  size = (16, 16) if not transform else (40, 32)  # resize_small(20) rounds no side of it
  pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
  image = Image.fromarray(pixels)
  have = np.asarray(processor(image, return_tensors="np")["pixel_values"])
  want = model.prepare([image]).transpose(0, 3, 1, 2) / 127.5 - 1
  assert have.shape == want.shape
  assert np.abs(have - want).max() <= 1.01 / 127.5


def test_vits_that_transformers_does_not_have(tmp_path):
  for changes, words in (
    (dict(pooling="mean"), "pooling=mean"),
    (dict(representation_size=8), "a representation layer"),
    (dict(gated=True), "a gate"),
  ):
    with pytest.raises(UserError, match=words):
      export.export(vision_model(**changes), "S", "hf", tmp_path / "vit")
  assert not list(tmp_path.iterdir())
