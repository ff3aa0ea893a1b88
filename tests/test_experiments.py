"""Experiments: which programs they call, and what they say of the numbers."""

import json
import pathlib
import sys

import helpers
import pytest

from matformer_jax import UserError
from matformer_jax import granularity as gran
from matformer_jax.config import model_config
from matformer_jax.experiments import commands, elastify, vit, vit_finetune

CONFIG = helpers.get_config("digits", "matvit")
MODEL = model_config(CONFIG)


def flag(args, name: str) -> str | None:
  return next((a.split("=", 1)[1] for a in args if a.startswith(f"--{name}=")), None)


@pytest.fixture
def calls(monkeypatch):
  """What is called; programs write what they would, with accuracies by what they measure."""
  made = []

  def run(module, *args):
    args = [str(a) for a in args]
    made.append((module, args))
    workdir = pathlib.Path(flag(args, "workdir"))
    if module == "extract":
      pathlib.Path(flag(args, "out")).mkdir()
      return
    if module == "train":
      (workdir / "checkpoints" / "7").mkdir(parents=True, exist_ok=True)
      sizes = "G1" if flag(args, "config.model.ffn_ratios") else "S,M,L,XL"
      if "extracted" in (flag(args, "config.init_from") or ""):
        sizes = pathlib.Path(flag(args, "config.init_from")).name.removeprefix("extracted_")
      (workdir / "sizes").write_text(sizes)
      return
    names = (workdir / "sizes").read_text().split(",")
    if flag(args, "ladder"):
      names += ["S*1+M*1", "L*1+XL*1"]
    if module == "evaluate":
      rows = {n: {"accuracy": 0.5 + 0.01 * i} for i, n in enumerate(names)}
      pathlib.Path(flag(args, "json")).write_text(
        json.dumps({"step": 7, "images": 400, "granularities": rows})
      )
      return
    row = lambda encoder, n, corpus, share: {
      "encoder": encoder,
      "granularity": n,
      "corpus": corpus,
      "1-nn": share,
    }
    rows = [row("MatViT", n, names[-1] if "G1" in names else "XL", 0.4) for n in names]
    if flag(args, "symmetric"):
      rows += [row("MatViT", n, n, 0.3) for n in ("S", "M", "L")]
      rows += [row(b, "G1", "XL", 0.1) for b in flag(args, "baselines").split(",")]
    (workdir / "retrieval").mkdir()
    (workdir / "retrieval" / "retrieval.json").write_text(json.dumps({"step": 7, "rows": rows}))

  monkeypatch.setattr(commands, "run", run)
  monkeypatch.setattr(
    sys,
    "argv",
    ["vit", "--config=configs/matvit.py:digits", "--workdir=x", "--config.batch_size=8"],
  )
  return made


def test_both_sides_see_as_many_images(calls, tmp_path):
  found = vit.Measured()
  vit.run_seed(CONFIG, MODEL, 3, tmp_path, 5, found)
  trained = [args for module, args in calls if module == "train"]
  assert all("--config.batch_size=8" in a for a in trained)
  assert [flag(a, "config.seed") for a in trained] == ["3", "1003", "2003", "3003", "4003"]
  steps = [int(flag(a, "config.steps") or CONFIG.steps) for a in trained]
  assert steps[0] == sum(steps[1:]) == CONFIG.steps
  assert [flag(a, "config.model.ffn_ratios") for a in trained] == [
    None,
    "(0.5,)",
    "(1.0,)",
    "(2.0,)",
    "(4.0,)",
  ]
  assert (
    found.images == 400
    and found.top1["M"] == [51.0]
    and found.independent == {n: [50.0] for n in gran.names(MODEL)}
  )
  assert found.asymmetric["L*1+XL*1"] == [40.0] and found.symmetric == {
    "S": [30.0],
    "M": [30.0],
    "L": [30.0],
    "XL": [40.0],
  }
  assert set(found.independent_asymmetric) == {"S", "M", "L", "XL"}
  before = len([c for c in calls if c[0] != "train"])
  vit.run_seed(CONFIG, MODEL, 3, tmp_path, 5, found)  # again: nothing is measured twice
  assert len([c for c in calls if c[0] != "train"]) == before
  (tmp_path / "matvit" / "checkpoints" / "9").mkdir()  # trained further
  with pytest.raises(FileExistsError):  # the stub's, which is called to measure anew
    vit.run_seed(CONFIG, MODEL, 3, tmp_path, 5, found)


def test_all_cells_of_the_fine_tuning_grid(calls, tmp_path):
  cells = vit_finetune.run(CONFIG, MODEL, tmp_path, "0,1,2,3", "4,5,6", 200)
  assert all(set(cells[c]) == {"S", "M", "L", "XL"} for c in vit_finetune.CELLS)
  trained = {pathlib.Path(flag(a, "workdir")).name: a for m, a in calls if m == "train"}
  assert len(trained) == 4 + 4 + 1 + 1 + 4 + 1
  for name, args in trained.items():
    pretrained = name.startswith("pretrained")
    assert flag(args, "config.data.classes") == ("(0,1,2,3,)" if pretrained else "(4,5,6,)")
    assert flag(args, "config.model.num_classes") == ("4" if pretrained else "3")
    whole = name in ("pretrained_matvit", "plain_nested", "nested_nested")
    assert int(flag(args, "config.steps")) == (300 if pretrained else 200) // (1 if whole else 4)
    assert ("--config.sampling=0/0/0/1" in args) == (
      name in ("pretrained_vit_XL", "plain_plain_XL") or name.startswith("nested_plain")
    )
  source = lambda name: pathlib.Path(flag(trained[name], "config.init_from")).name
  assert source("plain_nested") == source("plain_plain_XL") == "pretrained_vit_XL"
  assert (
    source("nested_plain_S") == "extracted_S" and source("nested_plain_XL") == "pretrained_matvit"
  )
  assert "nested, plain" in vit_finetune.table_7(MODEL, cells).splitlines()[0]


def measured(**changes) -> vit.Measured:
  names = gran.names(MODEL)
  top1 = dict(zip(names, ([80.0, 81.0], [82.0, 83.0], [84.0, 85.0], [86.0, 87.0])))
  near = {**{n: [v - 1 for v in top1[n]] for n in names}, "L": [85.0, 85.8], "XL": [85.2, 86.0]}
  values = dict(
    top1={**top1, "S*1+M*1": [81.1, 82.1]},
    independent={n: [v - 0.2 for v in top1[n]] for n in names},
    asymmetric=near,
    symmetric=near,
    independent_symmetric=near,
    independent_asymmetric={n: [9.0, 11.0] for n in names},
    images=400,
  )
  return vit.Measured(**{**values, **changes})


def test_claims_follow_the_numbers(tmp_path):
  """Digits: L takes 70% of XL's FLOPs, M 54%."""
  found = measured()
  line = vit.on_the_line(MODEL, found.top1)
  assert line == {"S*1+M*1": [pytest.approx(81.0), pytest.approx(82.0)]}  # parameters halfway
  held = vit.claims(MODEL, found)
  assert [" holds" in c for c in held] == [True, True, False, True]
  assert "M (54%) loses 4.10" in held[2]
  worse = measured(
    independent={n: [90.0, 90.0] for n in gran.names(MODEL)},
    independent_asymmetric={n: [50.0, 50.0] for n in gran.names(MODEL)},
  )
  held = vit.claims(MODEL, worse)
  assert "NOT hold" in held[0] and "NOT hold" in held[3]
  text = vit.summary(MODEL, found)
  assert "80.50 ±0.71" in text and "400 images: 1.71 points" in text  # sqrt(0.865 * 0.135 / 400)
  for path in vit.draw_plots(MODEL, found, tmp_path, "title"):
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_failing_program_stops_the_experiment(tmp_path):
  with pytest.raises(UserError, match="ended with 1; fix what it reports"):
    commands.run("describe", "--workdir=/nowhere")


def test_elastify_measures_one_order_and_one_training_beside_the_other(tmp_path, monkeypatch):
  calls = []

  def run(module, *args):
    args = [str(a) for a in args]
    calls.append((module, args))
    workdir = pathlib.Path(flag(args, "out") or flag(args, "workdir"))
    (workdir / "checkpoints" / "7").mkdir(parents=True, exist_ok=True)
    if module == "evaluate":
      losses = {"unordered": 9, "ordered": 6, "sampled": 4, "distilled": 3}
      rows = {
        n: {"params": 10**6 * i, "loss": losses[workdir.name] / i, "loss_stderr": 0.1}
        for i, n in enumerate(("S", "M", "S*1+M*1"), 1)
      }
      found = {"step": 7, "source": flag(args, "source"), "granularities": rows}
      pathlib.Path(flag(args, "json")).write_text(json.dumps(found))

  monkeypatch.setattr(commands, "run", run)
  monkeypatch.setattr(sys, "argv", ["elastify", "--config=elastify", "--config.steps=5"])
  config = helpers.get_config("default", "elastify")
  config.data.source = "text:a*"
  elastify.make(config, "model.gguf", tmp_path)
  rows = elastify.measure(tmp_path, "text:b*", "evaluation_1.json", 9, 2, 4)
  imports = [args for module, args in calls if module == "import_model"]
  assert "--order=none" in imports[0] and flag(imports[1], "calibration") == "text:a*"
  sampled, distilled = (args for module, args in calls if module == "train")
  assert flag(sampled, "config.distill.teacher") == "none"
  assert flag(distilled, "config.distill.teacher") is None and "--config.steps=5" in distilled
  assert flag(sampled, "config.init_from") == flag(distilled, "config.init_from")
  assert flag(sampled, "config.init_from").endswith("/ordered")
  assert all(flag(args, "source") == "text:b*" for module, args in calls if module == "evaluate")
  for text, more in (("text:b*", 0), ("text:c*", 4)):  # what is measured is kept, of its text
    before = len(calls)
    elastify.measure(tmp_path, text, "evaluation_1.json", 9, 2, 4)
    assert len(calls) - before == more
  table = elastify.losses_table(rows).splitlines()
  assert "9.000" in table[2] and "3.000" in table[2] and "1.000" in table[4]
  elastify.draw(rows, "title", tmp_path / "plot.png")
  assert (tmp_path / "plot.png").stat().st_size > 10_000
  made = len(calls)
  elastify.make(config, "model.gguf", tmp_path)  # trains on, if there is something to train
  assert [module for module, _ in calls[made:]] == ["train", "train"]
