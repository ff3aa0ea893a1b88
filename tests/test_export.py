"""What is exported, read back, and run without this package. tests/peers/ has other runtimes."""

import json
import re
import subprocess
import sys

import export_models
from export_models import MIX
from helpers import AWKWARD, PROGRAM_ENV, run_program
import jax
import numpy as np
import pytest
import tokenizers

import matformer_jax
from matformer_jax import UserError, export
from matformer_jax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from matformer_jax.formats import families, gguf_vocab, hf_export, hf_tokenizer, sources
from matformer_jax.loading import VisionModel

WIDTHS = export_models.SHAPE["ffn_widths"]
EXACT = dict(embedding_scale=1.0)  # else the rows of the embedding are written scaled


def read_back(path, **changes):
  source = sources.open_source(path)
  config = families.model_config(source, WIDTHS, **changes)
  return config, families.read_params(source, config), source.tokenizer()


@pytest.mark.parametrize("format,name", [("hf", "model"), ("gguf", "model.gguf")])
@pytest.mark.parametrize("kind", ["llama 3, in groups", "qwen3"])
def test_import_inverts_export(tmp_path, format, name, kind):
  """Bit by bit, groups and heads back in their places."""
  scaling = (8.0, 1.0, 4.0, 2048.0) if kind.startswith("llama 3") else ()
  model = export_models.make(kind, rope_scaling=scaling, **EXACT)
  export.export(model, "XL", format, tmp_path / name, check=False)
  c = model.config
  groups = dict(ffn_groups=c.ffn_groups, head_groups=c.head_groups)
  config, params, tokenizer = read_back(tmp_path / name, **groups)
  assert config == c
  jax.tree.map(np.testing.assert_array_equal, params, model.params)
  assert tokenizer.begin(export_models.TEXT) == model.tokenizer.begin(export_models.TEXT)


def test_a_large_model_is_in_several_files(tmp_path):
  model = export_models.make("llama", **EXACT)
  arrays = dict(families.dense_arrays(model.config, model.params, _llama()))
  hf_export.write_safetensors(tmp_path, arrays.items(), "float32", shard_bytes=200_000)
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
  (tmp_path / "config.json").write_text("{}")
  source = sources.open_source(tmp_path)
  assert source.names == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(source.read(name), array)


def _llama() -> families.Family:
  return families.FAMILIES["LlamaForCausalLM"]


# -------------------------------------------------------------------- tokenizers


def begun(tokenizer):
  """The same tokenizer, whose texts begin with a token."""
  config = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "add_bos_token": True}
  return HuggingFaceTokenizer(tokenizer.definition, config)


TOKENIZERS = {
  "SentencePiece": export_models.sentencepiece,
  "byte-level": export_models.byte_level,
  "with bos": lambda: begun(export_models.byte_level()),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_keep_their_ids(name):
  ours = TOKENIZERS[name]()
  files = hf_tokenizer.files(ours)
  theirs = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
  theirs.encode_special_tokens = True
  gguf = gguf_vocab.to_tokenizer(gguf_vocab.from_tokenizer(ours))
  for text in (export_models.TEXT, *AWKWARD):
    want = ours.begin(text)
    assert theirs.encode(text).ids == want
    assert theirs.decode(want) == text
    assert gguf.begin(text) == want
  config = json.loads(files["tokenizer_config.json"])
  assert theirs.token_to_id(config["eos_token"]) == ours.eos_id


def test_a_spm_model_with_a_space_before_every_text():
  """As Llama 2's, which has no user-defined pieces."""
  proto = gguf_vocab.parse_sentencepiece(export_models.sentencepiece().model)
  proto.normalizer_spec.add_dummy_prefix = True
  for piece in proto.pieces:
    if piece.type == gguf_vocab.USER_DEFINED:
      piece.type = gguf_vocab.NORMAL
  ours = SentencePieceTokenizer(proto.SerializeToString())
  theirs = tokenizers.Tokenizer.from_buffer(hf_tokenizer.files(ours)["tokenizer.json"])
  theirs.encode_special_tokens = True
  for text in (export_models.TEXT, *AWKWARD):
    assert theirs.encode(text).ids == ours.encode(text), text[:40]
    assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def test_tokenizers_that_llama_cpp_does_not_have():
  definition = json.loads(export_models.byte_level().definition)
  definition["pre_tokenizer"]["add_prefix_space"] = True
  odd = HuggingFaceTokenizer(json.dumps(definition).encode(), {"eos_token": "<|endoftext|>"})
  with pytest.raises(UserError, match="cut text before BPE"):
    gguf_vocab.from_tokenizer(odd)
  unigram = export_models.train_tokenizer([export_models.TEXT], 500, "unigram", 100_000)
  with pytest.raises(UserError, match="data.tokenizer_type=bpe"):
    gguf_vocab.from_tokenizer(unigram)


# --------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  "kind,granularity,format,options,words",
  [
    ("arcee", MIX, "gguf", {}, "only layers of gated silu can differ in width"),
    ("arcee, gelu", "S", "gguf", {}, "arcee, is relu2's, not gelu's"),
    ("gemma", MIX, "gguf", {}, "not of gated gelu"),
    ("qwen2", MIX, "gguf", {}, "differ in width cannot have qkv_bias"),
    ("llama", "S", "hf", dict(dtype="q8_0"), "--dtype=q8_0 is not for --format=hf"),
    ("llama", "S", "stablehlo", dict(dtype="f16"), "f16 is not for --format=stablehlo"),
    ("llama", "S", "hf", dict(mixed="remote_code"), "--mixed=remote_code is for"),
    ("llama, nested heads", "S", "gguf", dict(dtype="q8_0"), "heads x head_dim 16"),
    ("llama", "S", "gguf", dict(out="model"), "ends in .gguf"),
  ],
)
def test_what_is_refused(tmp_path, kind, granularity, format, options, words):
  model = export_models.make(kind)
  out = tmp_path / options.pop("out", "m.gguf" if format == "gguf" else "m")
  with pytest.raises(UserError, match=re.escape(words)):
    export.export(model, granularity, format, out, **options)
  assert not list(tmp_path.iterdir())


def test_a_gemma_that_gguf_cannot_hold(tmp_path):
  model = export_models.make("gemma", tied_head=False)
  with pytest.raises(UserError, match="tied_head=False"):
    export.export(model, "S", "gguf", tmp_path / "m.gguf")


def test_an_ungated_model_with_norms_of_queries_fits_stablehlo_only(tmp_path):
  model = export_models.make("arcee", qk_norm=True)
  with pytest.raises(UserError, match="qk_norm=True without a gate"):
    export.export(model, "S", "hf", tmp_path / "m")


# ---------------------------------------------------------------------- program


def test_the_program(tiny_run, tmp_path):
  out = tmp_path / "hf"
  args = (f"--workdir={tiny_run}", "--format=hf", "--granularity=S*1+M*1", f"--out={out}")
  result = run_program("export", *args)
  assert result.returncode == 0, result.stderr
  assert "bytes more" in result.stdout and "logits within" in result.stdout
  files = {path.name for path in out.iterdir()}
  assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} < files
  again = run_program("export", *args)
  assert again.returncode == 1
  assert re.fullmatch(
    r"error: --out=.* exists already and is not empty; give a new directory\n", again.stderr
  )


def test_the_programs_refusal_is_one_line(tiny_run, tmp_path):
  flags = (f"--workdir={tiny_run}", "--format=gguf", f"--out={tmp_path / 'm.gguf'}")
  result = run_program("export", *flags)
  assert result.returncode == 1
  assert result.stderr.startswith("error: --format=gguf:") and result.stderr.count("\n") == 1


# -------------------------------------------------------------------- StableHLO

# Runs what the directory's README says, where this package cannot be imported.
ISOLATED = """
import importlib.abc, re, sys

class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.partition(".")[0] in ("matformer_jax", "flax"):
      raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
code = re.search(r"```python\\n(.*?)```", open("README.md").read(), re.S)[1]
names = {}
exec(code, names)
import numpy as np
np.save(sys.argv[1], np.asarray(names["forward"](names["weights"], np.load(sys.argv[2]))))
"""


def run_readme(directory, tmp_path, inputs) -> tuple[str, np.ndarray]:
  """(what the README's lines print, logits of `inputs` in that process)."""
  np.save(tmp_path / "inputs.npy", inputs)
  result = subprocess.run(
    [sys.executable, "-I", "-c", ISOLATED, tmp_path / "logits.npy", tmp_path / "inputs.npy"],
    cwd=directory,
    env={**PROGRAM_ENV, "PYTHONPATH": ""},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout, np.load(tmp_path / "logits.npy")


@pytest.mark.parametrize("kind", ["llama 3, in groups", "llama, nested heads"])
def test_stablehlo_runs_without_this_package(tmp_path, kind):
  model = export_models.make(kind)
  lines = export.export(model, MIX, "stablehlo", tmp_path / "out")
  assert sum("logits within" in line for line in lines) == 2  # whole, and token by token
  inputs = export_models.tokens(33)[:1]  # sizes that the export has not seen
  printed, have = run_readme(tmp_path / "out", tmp_path, inputs)
  want = export_models.logits(model, inputs, MIX)
  np.testing.assert_allclose(have, want, atol=1e-5 * np.abs(want).max())
  for prompt, text in zip(([5, 6, 7, 8], [9, 10]), json.loads(printed)):
    assert len(text) == 8
    assert export_models.is_greedy(model, [*prompt, *text], len(prompt), MIX)


def test_stablehlo_refuses_what_is_too_long(tmp_path):
  from matformer_jax.exporting import stablehlo

  model = export_models.make("arcee", num_layers=1)
  export.export(model, "S", "stablehlo", tmp_path / "out", check=False)
  functions, weights = stablehlo.load(tmp_path / "out")
  with pytest.raises(ValueError, match="shapes"):
    functions["forward"](weights, np.zeros((1, 65), np.int32))


def test_a_vision_model_as_stablehlo(digits_run, tmp_path):
  model = matformer_jax.load(digits_run, kind=VisionModel)
  lines = export.export(model, "M", "stablehlo", tmp_path / "out")
  assert "logits within" in lines[1]
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
  printed, have = run_readme(tmp_path / "out", tmp_path, images)
  np.testing.assert_allclose(have, model.logits(images, "M"), atol=1e-5)
  assert printed.count("'") == 4  # two names of classes
