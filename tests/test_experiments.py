"""Experiments: what they train, what they say of the numbers, and all of them at once."""

import csv
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import threading
import time

import helpers
import jax
import numpy as np
import pytest
import scipy.stats

from matformer_jax import UserError, models, sharding
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import checkpoint
from matformer_jax.config import Execution
from matformer_jax.data import image_sources, text_sources
from matformer_jax.errors import Diverged
from matformer_jax.evals import lm
from matformer_jax.experiments import __main__ as runner
from matformer_jax.experiments import (
  architectures,
  claims,
  commands,
  compare,
  corpus,
  elastify,
  families,
  images,
  scaling,
  vision,
)
from matformer_jax.experiments.families import DYNABERT, INDEPENDENT, MATFORMER, OFA
from matformer_jax.experiments.lab import Lab, Row
from matformer_jax.experiments.rates import Sweep
from matformer_jax.experiments.runs import Pool, Run
from matformer_jax.models import matlm
from matformer_jax.tasks import make_task_without_data
from matformer_jax.training import methods, metrics
from matformer_jax.training.trainer import Trainer

# ----------------------------------------------------------------------- claims


def test_an_interval_is_students():
  values = [1.0, 2.0, 4.0]
  low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
  found = claims.interval(values)
  assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
  assert np.isinf(claims.interval([1.0]).half)


def test_a_verdict_needs_the_whole_interval():
  assert claims.below([-1.0, -1.1, -0.9]) == claims.HOLDS
  assert claims.below([1.0, 1.1, 0.9]) == claims.FAILS
  assert claims.below([-1.0, 1.0, -0.5]) == claims.UNDECIDED
  assert claims.below([-1.0]) == claims.UNDECIDED  # one seed decides nothing
  assert claims.above([-0.4, -0.41, -0.39], -0.5) == claims.HOLDS
  assert claims.above([-0.6, -0.61, -0.59], -0.5) == claims.FAILS
  assert claims.all_of([claims.HOLDS, claims.UNDECIDED]) == claims.UNDECIDED
  assert claims.all_of([claims.HOLDS, claims.UNDECIDED, claims.FAILS]) == claims.FAILS
  found = claims.at_every_size("x", "y", {"S": [-1.0, -1.1], "M": [1.0, 1.1]}, claims.below)
  assert found.verdict == claims.FAILS and "S -1.05" in found.ours


def rows_of(values: dict[tuple[str, str], list[float]], params: dict[str, int]) -> list[Row]:
  return [
    Row(method, seed, size, params[size], 1, {"loss": value, "loss_stderr": 0.01})
    for (method, size), by_seed in values.items()
    for seed, value in enumerate(by_seed)
  ]


def test_mixes_are_measured_from_the_line_between_trained_sizes():
  rows = rows_of(
    {
      (MATFORMER, "S"): [4.0, 5.0],
      (MATFORMER, "XL"): [2.0, 3.0],
      (compare.MIXES, "S*1+XL*1"): [3.1, 3.9],
    },
    {"S": 100, "XL": 200, "S*1+XL*1": 150},
  )
  off = compare.off_the_line(rows, "loss")
  assert off == {"S*1+XL*1": [pytest.approx(0.1), pytest.approx(-0.1)]}


def test_sizes_are_told_apart_or_not():
  params = {"S": 100, "XL": 200}
  apart = {(INDEPENDENT, "S"): [4.0, 4.01], (INDEPENDENT, "XL"): [3.5, 3.5]}
  near = {(INDEPENDENT, "S"): [4.0, 4.01], (INDEPENDENT, "XL"): [3.99, 3.99]}
  found = [compare.separation(rows_of(v, params), "loss", ["S", "XL"]) for v in (apart, near)]
  assert [claim.verdict for claim in found] == [claims.HOLDS, claims.FAILS]
  other = claims.Claim("x", "y", "z", claims.HOLDS)
  verdicts = [compare.where_sizes_differ(claim, [other])[1].verdict for claim in found]
  assert verdicts == [claims.HOLDS, claims.UNDECIDED]
  worse = {(INDEPENDENT, "S"): [3.5, 3.5], (INDEPENDENT, "XL"): [4.0, 4.01]}
  assert compare.separation(rows_of(worse, params), "loss", ["S", "XL"]).verdict == claims.FAILS
  error = np.hypot(0.01, 0.01)  # of the windows, which is more than the seeds'
  assert f"{0.505 / error:.1f} standard errors" in found[0].ours


def test_the_scaling_law_is_found_again():
  law = lambda n, d: 14.08 * (n * d) ** -0.10 + 0.89  # Table 3's baseline
  points = [
    {"params": n, "tokens": d, "loss": law(n, d)} for n in (1e5, 3e5, 1e6) for d in (1e6, 4e6)
  ]
  assert scaling.fit_power_law(points) == pytest.approx((14.08, -0.10, 0.89), rel=1e-3)


def test_the_budgets_are_those_of_table_5():
  assert architectures.budget_mixes(16) == ["M", "M*12+L*4", "M*5+L*11", "L*3+XL*13"]
  assert architectures.budget_mixes(3) == ["M", "M*2+L*1", "M*1+L*2", "L*1+XL*2"]


def test_consistency_with_another_model(small, lively_params):
  """What a model trained alone agrees with is another one (Section 3.4)."""
  other_config = dataclasses.replace(small, num_layers=2, spans=())
  other = matlm.init_params(other_config, jax.random.key(7))
  other["blocks"] = jax.tree.map(lambda x: 4 * x, other["blocks"])
  tokens = np.random.default_rng(0).integers(0, small.vocab_size, (3, small.seq_len + 1))
  batch = {"tokens": tokens, "weight": np.array([1.0, 1.0, 0.0]), "bytes": np.full(3, 16)}
  execution = Execution()
  (found,) = lm.evaluate(
    small,
    execution,
    lively_params,
    [gran.full(small)],
    [batch],
    against=(other_config, other),
  )

  def log_probs(config, params):
    model = matlm.MatLM(config, execution)
    inputs = tokens[:2, :-1]
    logits = model.apply({"params": params}, inputs, granularity=gran.full(config))
    return np.asarray(jax.nn.log_softmax(logits), np.float64)

  ours, theirs = log_probs(small, lively_params), log_probs(other_config, other)
  kl = np.sum(np.exp(theirs) * (theirs - ours), -1).mean()
  assert found.metrics["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0.01
  assert found.metrics["agreement"] == np.mean(ours.argmax(-1) == theirs.argmax(-1)) < 1


# ------------------------------------------------------------------------- data


def test_the_text_holds_out_packages_and_repeats_nothing(tmp_path, monkeypatch):
  code = "".join(f"def f{i}(a, b):\n  return a * {i} + b  # number {i}\n" for i in range(30))
  files = {}
  for i in range(25):
    root = tmp_path / "site" / f"p{i:02}"
    root.mkdir(parents=True)
    (root / "own.py").write_text(f"'''Package {i}.'''\n{code.replace('f', f'g{i}_')}")
    (root / "vendored.py").write_text(code)
    (root / "numbers.py").write_text("X = [" + "1.25, -3.5e-7, " * 500 + "]\n")
    (root / "names.py").write_text(f"# By Ångström.\n{code.replace('f', f'h{i}_')}")
    files[f"p{i:02}"] = sorted(root.iterdir())
  monkeypatch.setattr(corpus, "_packages", lambda: files.items())
  source = corpus.write(tmp_path / "text", limit=0)
  texts = {p.stem: p.read_text() for p in sorted((tmp_path / "text").glob("*.txt"))}
  assert len(texts) == 25 and not any("3.5e-7" in text for text in texts.values())
  assert all(text.isascii() for text in texts.values())
  assert [name for name, text in texts.items() if "def f7(" in text] == ["p00"]
  opened = text_sources.open_corpus(source)
  held_out = set(opened.documents()) - set(opened.without_held_out(0.1).documents())
  assert held_out == {texts["p05"], texts["p15"]}  # whole packages
  (tmp_path / "text" / "p00.txt").write_text("kept")
  assert corpus.write(tmp_path / "text") == source  # made once
  assert (tmp_path / "text" / "p00.txt").read_text() == "kept"
  monkeypatch.setattr(corpus, "_packages", lambda: list(files.items())[:3])
  with pytest.raises(UserError, match="only 3 installed packages"):
    corpus.write(tmp_path / "other")


def test_images_are_of_every_character_and_the_same_again(tmp_path):
  source = images.write(tmp_path / "a", 12, 240, 60)
  train, test = (image_sources.open_images(source, s, channels=1) for s in ("train", "test"))
  assert (train.size, test.size, train.num_classes) == (240, 60, 12)
  pixels = np.asarray(train.decode(0)[0])
  assert pixels.shape == (images.SIZE, images.SIZE) and pixels.std() > 10
  again = image_sources.open_images(images.write(tmp_path / "b", 12, 240, 60), "train", channels=1)
  assert again.fingerprint == train.fingerprint != test.fingerprint
  assert len(set(images.CHARACTERS)) == len(images.CHARACTERS) <= 256  # labels are bytes


# ------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Lab:
  """A lab whose data is made and that has trained nothing."""
  root = tmp_path_factory.mktemp("lab")
  scale = families.make_scale("smoke", root / "data")
  return Lab(scale, Pool(root / "runs", 2), root, (0, 1))


def test_methods_cost_what_independent_models_cost_together(smoke):
  """Appendix B.4; a uniform draw makes MatFormer's cost the mean of the sizes'."""
  family = smoke.scale.text
  alone = smoke.independents(family, 0).values()
  assert sum(run.flops for run in alone) == pytest.approx(
    smoke.universal(family, MATFORMER, 0).flops
  )
  for method in (MATFORMER, DYNABERT, OFA, "sandwich", "sliced"):
    run = smoke.universal(family, method, 0)
    fewer = run.config.batch_size * run.model.seq_len  # where steps do not divide
    assert 0 <= sum(r.examples for r in alone) - run.examples < fewer, method
  updates = lambda method: smoke.universal(family, method, 0).config.steps
  assert updates(MATFORMER) == updates(OFA) == 4 * updates(DYNABERT)
  assert {run.config.steps for run in alone} == {updates(DYNABERT)}


@pytest.mark.parametrize("method", [DYNABERT, "distilled"])
def test_a_runs_cost_is_its_trainers(smoke, method):
  run = smoke.universal(smoke.scale.text, method, 0)
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  trainer = Trainer(make_task_without_data(run.config), run.config, mesh)
  steps = sum(kind.probability * trainer.step_flops(kind) for kind in trainer.kinds)
  assert run.flops == pytest.approx(steps * run.config.steps)


def test_a_model_trained_alone_is_that_size(smoke):
  for family in (smoke.scale.text, smoke.scale.images, *smoke.scale.nested_heads):
    for size, run in smoke.independents(family, 0).items():
      mine, theirs = (gran.count(m, g) for m, g in ((run.model, "G1"), (family.model, size)))
      assert (mine.params, mine.flops) == (theirs.params, theirs.flops), (family.name, size)


def test_seeds_are_paired(smoke):
  """A model of text sees what the universal one sees; of images seeds are apart."""
  seeds = lambda family: [r.config.seed for r in smoke.independents(family, 1).values()]
  assert seeds(smoke.scale.text) == [1] * 4
  assert len({*seeds(smoke.scale.images), 1}) == 5


@pytest.mark.parametrize("name", families.SCALES)
def test_every_scale_can_be_built(name, smoke, tmp_path, monkeypatch):
  """All runs of all experiments: their models, batches and kinds of steps; nothing is computed."""
  monkeypatch.setattr(corpus, "write", lambda directory, limit=0: f"text:{directory}/*.txt")
  monkeypatch.setattr(images, "write", lambda directory, *numbers: f"idx:{directory}")
  scale = families.make_scale(name, tmp_path)
  here = Lab(scale, Pool(tmp_path / "runs", 2), tmp_path, (0,))
  planned = [run for e in runner.EXPERIMENTS.values() for stage in e.runs for run in stage(here)]
  distinct = list(dict.fromkeys([*planned, *Sweep(here, planned).runs]))
  assert len({run.name for run in distinct}) == len(distinct)  # a directory each
  for run in distinct:
    assert run.flops > 0 and run.config.steps > 0
    parts = max(len(kind.granularities) for kind in methods.step_kinds(run.config, run.model))
    assert run.config.batch_size % max(parts, 1) == 0
  if name != "paper":
    return  # those are trained
  for model in {run.model for run in distinct}:
    shapes = jax.eval_shape(lambda m=model: models.init_params(m, jax.random.key(0)))
    whole = gran.count(model, gran.full(model)).params
    assert sum(x.size for x in jax.tree.leaves(shapes)) == whole
  assert [f.model.d_model for f in scaling.widths(here)] == [256, 512, 768, 1024, 1536]  # Table 4
  assert distinct[0].command(tmp_path).startswith("matformer train --config=matlm:850M")


def test_runs_are_trained_once_and_go_on(smoke, tmp_path, capsys):
  family = smoke.scale.text
  pool = Pool(tmp_path / "runs", 2)
  chosen = [smoke.universal(family, MATFORMER, 0), smoke.independents(family, 0)["S"]]
  assert pool.missing([*chosen, *chosen]) == chosen
  pool.train(chosen)
  said = capsys.readouterr().out
  assert "[2 of 2]" in said and chosen[0].name in said
  assert pool.missing(chosen) == [] and pool.estimate_s(chosen) == 0
  stamp = lambda run: (pool.root / run.name / "metrics.jsonl").stat().st_mtime_ns
  before = [stamp(run) for run in chosen]
  pool.train(chosen)
  assert [stamp(run) for run in chosen] == before and capsys.readouterr().out == ""
  other = chosen[0].but(chosen[0].name, {"optim.peak_lr": 0.5})
  with pytest.raises(UserError, match=r"another config \(optim.peak_lr differ\)"):
    pool.missing([other])
  # Kept measurements follow the models.
  here = Lab(smoke.scale, pool, tmp_path, (0,))
  count = []
  measure = lambda: count.append(1) or len(count)
  assert [here.measured("x", chosen, measure) for _ in range(2)] == [1, 1]
  assert here.measured("x", chosen[:1], measure) == 2


def test_a_run_that_cannot_be_trained_is_named(smoke, tmp_path):
  bad = smoke.universal(smoke.scale.text, MATFORMER, 0).but("text/bad", {"batch_size": 0})
  for jobs in (1, 2):
    with pytest.raises(UserError, match="text/(bad|worse) could not be trained.*batch_size"):
      Pool(tmp_path / "runs", jobs).train([bad, bad.but("text/worse", {})][:jobs])


def test_sigterm_saves_what_is_being_trained(smoke, tmp_path):
  pool = Pool(tmp_path / "runs", 2)
  run = smoke.universal(smoke.scale.text, MATFORMER, 0).but("text/long", {"steps": 20_000})
  progress = pool.root / run.name / "metrics.jsonl"

  def stop():
    while not metrics.read_jsonl(progress):
      time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=stop, daemon=True).start()
  with pytest.raises(KeyboardInterrupt):
    pool.train([run, run.but("text/longer", {"steps": 20_001})])
  assert not multiprocessing.active_children()
  assert 0 < checkpoint.steps(pool.root / run.name)[-1] < 20_000
  assert pool.missing([run]) == [run]


def test_the_best_learning_rate_is_taken(smoke, tmp_path, monkeypatch):
  """The sweep goes on where the best is the last in a row; who diverges is not taken."""
  family = dataclasses.replace(smoke.scale.text, rates=(1e-2, 5e-3, 2e-2))
  scale = dataclasses.replace(smoke.scale, text=family)
  here = Lab(scale, Pool(tmp_path, 1), tmp_path, (0,))
  best = {INDEPENDENT: 1e-2, MATFORMER: 1e-2, OFA: 8e-2, "muon": 1e-2}

  def train(runs):
    for run in runs:
      directory = here.directory(run)
      directory.mkdir(parents=True, exist_ok=True)
      rate = run.config.optim.peak_lr
      if run.method == "muon" and rate > 1e-2:
        run.divergence(tmp_path).write_text("diverged")
        continue
      loss = abs(math.log(rate / best[run.method]))
      (directory / "eval.jsonl").write_text(json.dumps({"step": 1, "loss": {"S": loss}}) + "\n")

  monkeypatch.setattr(Run, "is_done", lambda run, root: (root / run.name / "eval.jsonl").exists())
  planned = [here.universal(family, m, 0) for m in (MATFORMER, OFA, "muon", "table6_1")]
  sweep = Sweep(here, [*planned, *here.independents(family, 0).values()])
  assert len(sweep.runs) == 3 * (3 + 4)  # Table 6's row takes MatFormer's
  while not sweep.choose():
    assert len(sweep.runs) < 100
    train(sweep.runs)
  assert {m: here.rate(family, m) for m in best} == best
  assert here.rate(family, "table6_1") == 1e-2 and here.rate(family, DYNABERT) == 1e-2
  tried = {m: [r["learning_rate"] for r in sweep.tried if r["method"] == m] for m in best}
  assert tried[OFA] == [5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 16e-2]
  assert tried[MATFORMER] == tried["muon"] == [5e-3, 1e-2, 2e-2]
  assert Sweep(here, planned).choose() is True  # as it was found already


def test_seeds_decide_between_learning_rates_that_are_hardly_different(
  smoke, tmp_path, monkeypatch
):
  family = dataclasses.replace(smoke.scale.text, rates=(1e-2, 5e-3, 2e-2))
  here = Lab(dataclasses.replace(smoke.scale, text=family), Pool(tmp_path, 1), tmp_path, (0, 1, 2))
  losses = {5e-3: (4.5, 1, 1), 1e-2: (4.0, 5.0, 5.0), 2e-2: (4.001, 4.0, 4.0), 4e-2: (4.2, 1, 1)}
  monkeypatch.setattr(Run, "is_done", lambda run, root: (root / run.name / "eval.jsonl").exists())
  sweep = Sweep(here, [here.universal(family, MATFORMER, 0)])
  while not sweep.choose():
    for run in sweep.runs:
      here.directory(run).mkdir(parents=True, exist_ok=True)
      loss = losses[run.config.optim.peak_lr][run.config.seed]
      row = json.dumps({"step": 1, "loss": {"S": loss}}) + "\n"
      (here.directory(run) / "eval.jsonl").write_text(row)
  assert len(sweep.runs) == 1 + 3 + 3 and here.rate(family, MATFORMER) == 2e-2
  assert [row["seeds"] for row in sweep.tried] == [1, 3, 3]


def test_a_run_that_diverges_is_left_out_of_a_sweep_only(smoke, tmp_path, monkeypatch):
  run = smoke.universal(smoke.scale.text, MATFORMER, 0).but("text/wild", {})

  def train(config, workdir):
    workdir.mkdir(exist_ok=True)
    raise Diverged("diverged: not finite")

  monkeypatch.setattr("matformer_jax.train.train", train)
  pool = Pool(tmp_path / "runs", 1)
  kept = signal.getsignal(signal.SIGTERM)
  pool.train([run], may_diverge=True)
  assert pool.missing([run], may_diverge=True) == [] and pool.missing([run]) == [run]
  with pytest.raises(UserError, match="text/wild could not be trained: diverged"):
    pool.train([run])
  assert signal.getsignal(signal.SIGTERM) is kept


# --------------------------------------------------------------- all of them


@pytest.mark.slow
def test_all_experiments_at_the_smallest_scale(tmp_path):
  run = lambda: helpers.run_program(
    "experiments", "--experiment=all", "--scale=smoke", f"--out={tmp_path}", timeout=1500
  )
  result = run()
  assert result.returncode == 0, result.stderr + result.stdout[-2000:]
  report = tmp_path / "report"
  text = (report / "report.md").read_text()
  page = (report / "report.html").read_text()
  for name, experiment in runner.EXPERIMENTS.items():
    with open(report / f"{name}.csv") as f:
      assert list(csv.DictReader(f)), name
    assert f"## {experiment.item}: " in text and f"id='{name}'" in page
  assert "src='data:image/png;base64," in page and "http" not in page
  plots = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
  assert len(plots) >= 8 and all((report / plot).exists() for plot in plots)
  again = run()
  assert again.returncode == 0 and "\nmeasuring " not in again.stdout
  assert "[1 of" not in again.stdout


def test_what_can_be_asked_for():
  listed = helpers.run_program("experiments", "--list")
  assert listed.returncode == 0
  assert [line.split()[0] for line in listed.stdout.splitlines()] == list(runner.EXPERIMENTS)
  wrong = helpers.run_program("experiments", "--experiment=figure3")
  assert wrong.returncode == 1 and "did you mean" in wrong.stderr


def test_fine_tuning_starts_where_pretraining_ended(smoke):
  grid = vision.grid(smoke, 0)
  assert len(grid.pretrained) == 4 + 1 and len(grid.tuned) == 4 + 1 + 1 + 1
  before = set(smoke.scale.pretraining)
  for run in grid.pretrained.values():
    assert set(run.config.data.classes) == before and not run.config.init_from
  for run in grid.tuned.values():
    assert not before & set(run.config.data.classes)
    source = pathlib.Path(run.config.init_from)
    assert source in {smoke.pool.root / r.name for r in grid.pretrained.values()}
  assert grid.pretrained["XL"].config.sampling == "0/0/0/1"


# ------------------------------------------------------------------- elastify


def flag(args, name: str) -> str | None:
  return next((a.split("=", 1)[1] for a in args if a.startswith(f"--{name}=")), None)


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
