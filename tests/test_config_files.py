"""Configs by path and by name, and the types of their keys."""

import inspect
import runpy
from typing import get_origin

import helpers
from helpers import ROOT
import ml_collections
import pytest

import matformer_jax
from matformer_jax import config_files, config_keys
from matformer_jax.config import model_config
from matformer_jax.errors import UserError


@pytest.mark.parametrize("spec", ["matlm:tiny", "matlm.py:tiny", "configs/matlm.py:tiny"])
def test_a_shipped_config_from_any_directory(spec, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert matformer_jax.get_config(spec) == helpers.get_config("tiny")
  assert matformer_jax.get_config(ROOT / "configs/matlm.py").model.d_model == 192  # quickstart


def test_an_existing_file_wins_over_a_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "matlm").write_text(
    "import ml_collections\ndef get_config(row): return ml_collections.ConfigDict({'row': row})"
  )
  assert matformer_jax.get_config("matlm:mine").row == "mine"


def rows() -> list[str]:
  """Every row of every shipped config, and of the ViT family, whose rows are patterns, two more."""
  specs = ["matvit:S32_i1k_augreg", "matvit:H14_i21k"]
  for file in config_files.names():
    listed = runpy.run_path(str(ROOT / "configs" / f"{file}.py"))["ROWS"]
    specs += [f"{file}:{row}" for row in listed]
  return specs


@pytest.mark.parametrize("spec", rows())
def test_every_row_is_a_model(spec):
  config = matformer_jax.get_config(spec)
  assert model_config(config).name and config.steps and config.batch_size


def keys(config, types, prefix="") -> tuple[dict, dict]:
  """({key: value}, {key: type}) of a config and of the class that types it, sections apart."""
  values = {}
  typed = {prefix + name: kind for name, kind in inspect.get_annotations(types).items()}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      inner = keys(value, typed.pop(prefix + name), f"{prefix}{name}.")
      values, typed = values | inner[0], typed | inner[1]
    else:
      values[prefix + name] = value
  for section, kind in list(typed.items()):  # that other configs have
    if isinstance(kind, type) and issubclass(kind, ml_collections.ConfigDict):
      del typed[section]
      typed |= keys({}, kind, f"{section}.")[1]
  return values, typed


def test_every_key_is_typed():
  used = set()
  for spec in rows():
    values, typed = keys(matformer_jax.get_config(spec), config_keys.Config)
    wrong = [k for k, v in values.items() if type(v) is not (get_origin(typed[k]) or typed[k])]
    assert not wrong, spec
    used |= set(values)
  assert used == set(typed)  # none is left of a key that is gone


CONFIG_MISTAKES = {
  "mutlm:tiny": ("'mutlm'", "matlm and matvit", "did you mean 'matlm'?"),
  "configs/none.py": ("'configs/none.py'", "matlm and matvit"),
  "matlm:tny": ("'tny'", "850M", "did you mean 'tiny'?"),
  "matvit:B15_i21k": ("'B15_i21k'", "L16_i21k"),
  "common": ("'common'",),
  "broken.py": ("SyntaxError", "broken.py"),
  "empty.py": ("get_config",),
  "raises.py:x": ("KeyError: 'k'", "raises.py:2"),
  "dict.py:x": ("is a dict", "ConfigDict"),
}


@pytest.mark.parametrize("spec", CONFIG_MISTAKES)
def test_config_mistakes(spec, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "broken.py").write_text("def get_config(:")
  (tmp_path / "empty.py").write_text("")
  (tmp_path / "dict.py").write_text("def get_config(row): return {}")
  (tmp_path / "raises.py").write_text("def get_config(row):\n  return {}['k']\n")
  with pytest.raises(UserError) as e:
    matformer_jax.get_config(spec)
  assert "\n" not in str(e.value)
  for words in CONFIG_MISTAKES[spec]:
    assert words in str(e.value)
