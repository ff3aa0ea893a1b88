"""The command-line programs as a user runs them: kills, resumes, mistakes."""

import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import helpers
from helpers import ONE_SIZE, ONE_WIDTH, TWO_WIDTHS, run_program, train_args, train_until_signal
import jax
import numpy as np
import pytest

import matformer_jax
from matformer_jax import train as train_program
from matformer_jax.checkpoints import checkpoint
from matformer_jax.data.tokenizer import train_tokenizer


def metrics(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def trajectory(workdir) -> list[tuple]:
  return [(r["step"], r["granularity"], r["loss"], r["grad_norm"]) for r in metrics(workdir)]


def start(*args) -> helpers.Program:
  return helpers.Program("train", *args)


def wait_for_line(process, words: str, timeout: float = helpers.BACKSTOP_S) -> str:
  deadline = time.time() + timeout
  for line in process.stdout:
    if words in line:
      return line
    assert time.time() < deadline
  raise AssertionError(f"program ended without printing {words!r}")


def final_bytes(workdir) -> list[bytes]:
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(matformer_jax.load(workdir).params)]


# ------------------------------------------------------------- stop and resume


def test_sigterm_during_a_step_then_resume_is_bit_exact(tiny_run, tmp_path):
  result = train_until_signal(13, signal.SIGTERM, *train_args(tmp_path, log_every=1))
  assert result.returncode == 143, result.stderr
  stopped = checkpoint.steps(tmp_path)[-1]
  assert 13 <= stopped <= 15 and f"saved step {stopped}" in result.stdout
  assert [r["step"] for r in metrics(tmp_path)] == list(range(1, stopped + 1))
  again = run_program("train", *train_args(tmp_path, log_every=1))
  assert again.returncode == 0 and f"resuming {tmp_path} at step {stopped}" in again.stdout
  assert trajectory(tmp_path) == trajectory(tiny_run)
  assert final_bytes(tmp_path) == final_bytes(tiny_run)


def evaluated(workdir) -> list[int]:
  """The steps that eval.jsonl has."""
  path = workdir / "eval.jsonl"
  return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_sigterm_during_evaluation(tiny_run, tmp_path):
  # Evaluation of thousands of batches starts after step 5 and would take minutes.
  args = train_args(tmp_path, log_every=1, eval__every=5, eval__batches=10**6)
  process = start(*args)
  wait_for_line(process, "step 5/40")
  time.sleep(1.0)
  process.send_signal(signal.SIGTERM)
  rest = process.communicate(timeout=helpers.BACKSTOP_S)[0]
  assert process.returncode == 143 and "validation" not in rest, rest
  assert checkpoint.steps(tmp_path) == [5]
  again = run_program("train", *train_args(tmp_path, log_every=1, eval__every=5))
  assert again.returncode == 0, again.stderr
  assert trajectory(tmp_path) == trajectory(tiny_run)
  assert evaluated(tmp_path) == list(range(5, 41, 5))  # the first was made up for


def test_a_stop_in_the_last_evaluation_is_no_end(tmp_path):
  args = train_args(tmp_path, steps=6, eval__every=3, **ONE_WIDTH)
  result = train_until_signal("evaluating", signal.SIGTERM, *args)
  assert result.returncode == 143 and "saved step 6" in result.stdout, result.stderr
  assert evaluated(tmp_path) == [3]
  for words in ("done: 6 steps", "nothing to do"):
    result = run_program("train", *args)
    assert result.returncode == 0 and words in result.stdout, result.stderr
    assert evaluated(tmp_path) == [3, 6]


def test_ctrl_c_saves_too(tmp_path):
  process = start(*train_args(tmp_path, log_every=1, steps=10**5, eval__every=0, sampling=ONE_SIZE))
  wait_for_line(process, "step 4/")
  process.send_signal(signal.SIGINT)
  rest = process.communicate(timeout=helpers.BACKSTOP_S)[0]
  assert process.returncode == 130 and "stopped by SIGINT; saved step" in rest, rest
  assert matformer_jax.load(tmp_path).step >= 4


def test_sigterm_before_the_first_step(tmp_path):
  args = train_args(tmp_path, steps=2, eval__batches=1, sampling=ONE_SIZE)
  result = train_until_signal("compiling", signal.SIGTERM, *args)
  assert result.returncode == 143 and "before the first step" in result.stdout, result.stderr
  assert not (tmp_path / "train.lock").exists()
  assert run_program("train", *args).returncode == 0


def test_a_change_that_cannot_be_resumed_is_named_and_moves_nothing(tiny_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(tiny_run, workdir)
  result = run_program("train", *train_args(workdir, steps=50, optim__clip_norm=0.0))
  assert_one_line_error(
    result, "optim.clip_norm is 1.0 there and 0.0 here", f"--config.init_from={workdir}"
  )
  assert checkpoint.steps(workdir) == checkpoint.steps(tiny_run)
  assert not (workdir / checkpoint.DAMAGED_DIR).exists()


def test_starting_over_takes_a_flag(tiny_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(tiny_run, workdir)
  for step in checkpoint.steps(workdir):
    (workdir / checkpoint.STEPS_DIR / str(step) / "meta" / "metadata").write_text("{")
  args = train_args(workdir, steps=2, sampling=ONE_SIZE, eval__every=0)
  result = run_program("train", *train_args(workdir))
  assert_one_line_error(result, "none of the", "meta is unreadable", "--start_over")
  before = checkpoint.steps(tiny_run)
  assert checkpoint.steps(workdir) == before
  nowhere = "--config.data.source=text:/nowhere/*"
  assert_one_line_error(run_program("train", *args, "--start_over", nowhere), "/nowhere/*")
  assert checkpoint.steps(workdir) == before  # a command that cannot run moves nothing
  # Other text and a smaller vocabulary: the old run's tokenizer is not taken.
  text = tmp_path / "text"
  text.mkdir()
  for i in range(40):
    (text / f"{i}.txt").write_text(f"{i} " + "some other words entirely. " * 60)
  args += [f"--config.data.source=text:{text}/*.txt", "--config.model.vocab_size=300"]
  result = run_program("train", *args, "--start_over")
  assert result.returncode == 0, result.stderr
  assert checkpoint.steps(workdir) == [2]
  aside = workdir / checkpoint.DAMAGED_DIR / "run"
  names = {p.name for p in tiny_run.iterdir()}
  assert {p.name for p in aside.iterdir()} == names and checkpoint.steps(aside) == before
  # A job that is restarted repeats its flags.
  result = run_program("train", *args, "--config.steps=3", "--start_over")
  assert result.returncode == 0 and "at step 2" in result.stdout, result.stderr
  assert "--start_over works once" in result.stdout
  assert [p.name for p in (workdir / checkpoint.DAMAGED_DIR).iterdir()] == ["run"]


def test_what_init_from_holds_is_copied_again_where_it_is_missing(tiny_run, tmp_path):
  config = helpers.get_config("tiny")
  config.init_from = str(tiny_run)
  train_program._copy_files(config, tmp_path, {"a": "card"})
  copied = tmp_path / "tokenizer.model"
  assert copied.read_bytes() == (tiny_run / "tokenizer.model").read_bytes()
  copied.write_bytes(b"its own")
  train_program._copy_files(config, tmp_path, {"a": "card"})
  assert copied.read_bytes() == b"its own"


def test_any_legal_directory_name_works(tmp_path):
  """Written, read back, extracted and started from."""
  root = tmp_path / "a[b]?c%41#d\\e 'f\" ä {x}"
  root.mkdir()
  args = train_args(root / "run", sampling=ONE_SIZE, eval__every=0)
  for steps in (2, 3):
    result = run_program("train", *args, f"--config.steps={steps}")
    assert result.returncode == 0, result.stderr
  assert "at step 2" in result.stdout and checkpoint.steps(root / "run") == [2, 3]
  for program, *flags in (
    ("evaluate", "--batches=1", "--granularities=S"),
    ("extract", "--granularity=M", f"--out={root / 'small'}"),
    ("generate", "--max_tokens=2"),
  ):
    result = run_program(program, f"--workdir={root / 'run'}", *flags)
    assert result.returncode == 0, result.stderr
  assert matformer_jax.load(root / "small").step == 3
  tuned = train_args(root / "tuned", init_from=root / "small", steps=1, eval__every=0)
  result = run_program("train", *tuned)
  assert result.returncode == 0, result.stderr


def test_an_evaluation_that_fails_loses_nothing(tmp_path):
  program = (
    "import runpy, sys\n"
    "from matformer_jax.tasks.language import LanguageModeling\n"
    "LanguageModeling.evaluate = lambda *args, **kwargs: 1 / 0\n"
    "sys.argv[0] = 'train'\n"
    "runpy.run_module('matformer_jax.train', run_name='__main__')\n"
  )
  args = train_args(tmp_path, steps=3, sampling=ONE_SIZE, eval__every=0, checkpoint__every=0)
  result = subprocess.run(
    [sys.executable, "-c", program, *args],
    cwd=helpers.ROOT,
    env=helpers.PROGRAM_ENV,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 1 and "ZeroDivisionError" in result.stderr
  assert checkpoint.steps(tmp_path) == [3]


def test_embeddings_are_not_taken_for_another_tokenizer_s(tiny_run, tmp_path):
  (tmp_path / "text").mkdir()
  for i in range(40):
    (tmp_path / "text" / f"{i}.txt").write_text(f"{i} " + "some other words entirely. " * 60)
  other = dict(
    init_from=tiny_run,
    data__source=f"text:{tmp_path}/text/*.txt",
    data__tokenizer=tmp_path / "other.model",
    sampling=ONE_SIZE,
    steps=1,
    eval__every=0,
  )
  documents = (p.read_text() for p in (tmp_path / "text").iterdir())
  tokenizer = train_tokenizer(documents, 300, "bpe", 10**6)
  (tmp_path / "other.model").write_bytes(tokenizer.model)
  result = run_program("train", *train_args(tmp_path / "a", **other))
  assert_one_line_error(result, "another tokenizer", "--config.init_head=False")
  fresh = train_args(tmp_path / "b", init_head=False, model__vocab_size=300, **other)
  result = run_program("train", *fresh)
  assert result.returncode == 0, result.stderr
  new, old = matformer_jax.load(tmp_path / "b"), matformer_jax.load(tiny_run)
  assert new.params["embedding"].shape == (300, 32)
  distance = lambda name: np.abs(
    np.asarray(new.params["blocks"]["0"]["ffn"][name])
    - np.asarray(old.params["blocks"]["0"]["ffn"][name])
  ).max()
  assert max(distance("in"), distance("out")) < 0.05  # one step from the trained blocks


@pytest.mark.slow
def test_sigkill_at_any_moment_loses_at_most_the_unsaved_steps(tmp_path):
  """Kills at 10 random moments of a run that saves every second step, so mostly mid-save."""
  changes = dict(steps=60, checkpoint__every=2, log_every=1, eval__every=0, **TWO_WIDTHS)
  rng = random.Random(0)
  straight = tmp_path / "straight"
  assert run_program("train", *train_args(straight, **changes)).returncode == 0
  workdir, kills, reached = tmp_path / "killed", 0, 0
  while kills < 10:
    process = start(*train_args(workdir, **changes))
    wait_for_line(process, f"step {min(reached + 2 + rng.randrange(3), 58)}/60")
    time.sleep(rng.random() * 0.15)
    if process.poll() is not None:
      break
    process.kill()
    output = process.communicate()[0]
    kills += 1
    seen = [r["step"] for r in metrics(workdir)]
    assert seen == list(range(1, seen[-1] + 1)), output
    reached = max([s for s in checkpoint.steps(workdir)], default=0)
    # A save of step t has ended when the one of step t + 2 begins: at most 4 steps are lost.
    assert seen[-1] - reached <= 5
  assert kills >= 8
  final = run_program("train", *train_args(workdir, **changes))
  assert final.returncode == 0, final.stderr
  assert trajectory(workdir) == trajectory(straight)
  assert final_bytes(workdir) == final_bytes(straight)


def test_a_damaged_newest_step_is_set_aside_and_training_goes_on(tiny_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(tiny_run, workdir)
  newest = workdir / checkpoint.STEPS_DIR / "40"
  data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(content)
  result = run_program("train", *train_args(workdir))
  assert result.returncode == 0, result.stderr
  assert "warning: checkpoint" in result.stderr and "set aside as" in result.stderr
  assert "resuming" in result.stdout and "at step 30" in result.stdout
  assert (workdir / checkpoint.DAMAGED_DIR / "40").is_dir()
  assert trajectory(workdir) == trajectory(tiny_run)
  assert final_bytes(workdir) == final_bytes(tiny_run)  # so step 40 was saved again


def test_damaged_side_files_are_remade(tiny_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(tiny_run, workdir)
  (workdir / "tokenizer.model").write_bytes(b"junk")
  (workdir / "config.json").write_text("{")
  with open(workdir / "metrics.jsonl", "a") as f:
    f.write('{"step": 41, "gran')
  result = run_program("train", *train_args(workdir, steps=45))
  assert result.returncode == 0, result.stderr
  assert [r["step"] for r in metrics(workdir)] == list(range(1, 46))
  assert (workdir / "tokenizer.model").read_bytes() == (tiny_run / "tokenizer.model").read_bytes()
  assert json.loads((workdir / "config.json").read_text())["config"]["steps"] == 45


def test_running_a_finished_run_again_changes_nothing(tiny_run, tmp_path):
  shutil.copytree(tiny_run, tmp_path / "run")
  before = trajectory(tmp_path / "run")
  result = run_program("train", *train_args(tmp_path / "run"))
  assert result.returncode == 0 and "nothing to do" in result.stdout
  assert trajectory(tmp_path / "run") == before


def test_divergence_stops_with_a_clear_error_and_saves_nothing_bad(tiny_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(tiny_run, workdir)
  result = run_program(
    "train",
    *train_args(
      workdir,
      steps=80,
      max_nonfinite=3,
      optim__peak_lr=1e38,
      optim__clip_norm=1e30,
      checkpoint__every=1,
      eval__every=0,
    ),
  )
  assert result.returncode == 1
  assert "not finite for 3 steps in a row" in result.stderr and "optim.peak_lr" in result.stderr
  assert "Traceback" not in result.stderr
  skipped = [r for r in metrics(workdir) if r.get("skipped")]
  assert len(skipped) >= 3 and all(r["granularity"] in ("S", "M", "L", "XL") for r in skipped)
  # What is logged is what would have been applied: the schedule follows the updates made.
  assert len({r["learning_rate"] for r in skipped[-3:]}) == 1
  model = matformer_jax.load(workdir)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(model.params))
  newest = checkpoint.steps(workdir)[-1]
  assert f"the newest checkpoint is of step {newest}" in result.stderr
  assert newest < skipped[-3]["step"]  # nothing is saved while steps are being skipped


@pytest.mark.slow
def test_sharded_run_through_the_command_line(tiny_run, tmp_path):
  """The same command on 8 virtual devices gives the same losses."""
  flags = {"XLA_FLAGS": helpers.xla_flags(8)}
  result = run_program("train", *train_args(tmp_path, mesh__tensor=1), env=flags)
  assert result.returncode == 0, result.stderr
  assert "'fsdp': 8" in result.stdout
  ours, theirs = ([r["loss"] for r in metrics(w)] for w in (tmp_path, tiny_run))
  np.testing.assert_allclose(ours, theirs, rtol=2e-3)
  # And its checkpoint evaluates on one device.
  result = run_program("evaluate", f"--workdir={tmp_path}", "--batches=2")
  assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------- mistakes


def assert_one_line_error(result, *words):
  assert result.returncode == 1, result.stdout + result.stderr
  errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
  for word in words:
    assert word in errors[0], errors[0]


MISTAKES = {
  "unknown key": ({"optim__peak_lrr": 1}, ("peak_lrr", "did you mean 'peak_lr'")),
  "unknown group": ({"optm__peak_lr": 1}, ("optm", "did you mean 'optim'")),
  "not a number": ({"batch_size": "many"}, ("batch_size", "many")),
  "batch": ({"grad_accum": 3}, ("batch_size=8", "grad_accum=3")),
  "mesh": ({"mesh__fsdp": 3}, ("mesh", "1 devices")),
  "heads": ({"model__num_heads": 5}, ("num_heads=5", "d_model=32")),
  "widths": ({"model__ffn_ratios": "(0.3,1)"}, ("0.3", "d_model=32")),
  "no widths": ({"model__ffn_ratios": "banana"}, ("ffn_ratios", "banana")),
  "corpus": ({"data__source": "text:/nowhere/*.txt"}, ("/nowhere/*.txt", "no file")),
  "source": ({"data__source": "wiki"}, ("'wiki'", "stdlib")),
  "vocabulary": ({"model__vocab_size": 10**6}, ("vocab_size=1000000", "at most")),
  "sampling": ({"sampling": "0.5/0.6/0/0"}, ("sampling", "1.1")),
  "optimizer": ({"optim__name": "adam"}, ("'adam'", "adamw")),
  "remat": ({"remat": "some"}, ("'some'", "attn_out")),
  "seed": ({"seed": 2**32}, ("seed=4294967296", "4294967295")),
  "tokenizer": ({"data__tokenizer": "/nowhere.model"}, ("/nowhere.model",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_config_mistakes(name, tmp_path):
  changes, words = MISTAKES[name]
  assert_one_line_error(run_program("train", *train_args(tmp_path, **changes)), *words)


@pytest.mark.parametrize(
  "args,words",
  [
    (["--workdir=x"], ["--config is missing"]),
    (["--config=configs/matlm.py:tiny"], ["--workdir is missing"]),
    (["--config=nope.py", "--workdir=x"], ["nope.py"]),
    (["--config=configs/matlm.py:9B", "--workdir=x"], ["'9B'", "850M"]),
    (["--config=configs/matlm.py:tiny", "--workdir=/proc/nowhere"], ["/proc/nowhere"]),
    (["--config=configs/matlm.py:tiny", "--workdr=x"], ["workdr"]),
    (["--config=configs/matlm.py:tiny", "--workdir=x", "stray"], ["'stray'"]),
  ],
)
def test_command_mistakes(args, words):
  assert_one_line_error(run_program("train", *args), *words)


def test_a_workdir_of_another_model(tiny_run, tmp_path):
  shutil.copytree(tiny_run, tmp_path / "run")
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
  result = run_program("train", *train_args(tmp_path / "run", model__d_model=64))
  assert_one_line_error(result, "model.d_model is 32 there and 64 here")
  result = run_program("train", *train_args(tmp_path / "run", seed=7))
  assert_one_line_error(result, "seed is 0 there and 7 here")
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_a_full_disk(tmp_path):
  """A real one: a file system of 3 MiB; what was saved before stays loadable."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
  )
  if mounted.returncode:
    pytest.skip("mounting a small file system needs root")
  try:
    result = run_program(
      "train",
      *train_args(
        disk / "run",
        model__d_model=64,
        checkpoint__every=5,
        checkpoint__keep_last=50,
        steps=400,
        eval__every=0,
        sampling=ONE_SIZE,
      ),
    )
    assert_one_line_error(result, "No space left", "intact")
    assert matformer_jax.load(disk / "run").step >= 5
  finally:
    subprocess.run(["umount", str(disk)], check=True)


# ----------------------------------------------------- evaluate and describe


def test_evaluate(tiny_run, tmp_path):
  out, picture = tmp_path / "out.json", tmp_path / "curve.png"
  result = run_program(
    "evaluate",
    f"--workdir={tiny_run}",
    "--granularities=S,M,M*1+L*1,XL",
    f"--json={out}",
    f"--plot={picture}",
    "--bigram",
    "--batches=20",
  )
  assert result.returncode == 0, result.stderr
  report = json.loads(out.read_text())
  rows = report["granularities"]
  assert list(rows) == ["S", "M", "M*1+L*1", "XL"]
  assert rows["XL"]["agreement"] == 1.0 and abs(rows["XL"]["kl"]) < 1e-5
  for name in ("S", "M", "M*1+L*1"):
    assert 0 < rows[name]["agreement"] < 1 and rows[name]["kl"] > 0
    assert rows[name]["perplexity"] == pytest.approx(np.exp(rows[name]["loss"]))
    assert rows[name]["params"] < rows["XL"]["params"]
    assert f"{rows[name]['loss']:.4f}" in result.stdout
  assert "bigram baseline" in result.stdout and report["bigram"]["loss"] < np.log(512)
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_evaluate_repeats_the_last_validation_of_the_run(tiny_run, tmp_path):
  """The same windows of the whole split, digit for digit, with standard errors."""
  out = tmp_path / "out.json"
  result = run_program(
    "evaluate", f"--workdir={tiny_run}", "--metrics=loss", "--bigram", f"--json={out}"
  )
  assert result.returncode == 0, result.stderr
  report = json.loads(out.read_text())
  last = json.loads((tiny_run / "eval.jsonl").read_text().splitlines()[-1])
  assert report["tokens"] == last["examples"] == 2 * 8 * 32
  for name, row in report["granularities"].items():
    for metric in ("loss", "loss_stderr", "perplexity", "bits_per_byte"):
      assert row[metric] == last[metric][name], (name, metric)
    assert 0 < row["loss_stderr"] < 0.5
    assert f"{row['loss']:.4f} ± {row['loss_stderr']:.4f}" in result.stdout
    ratio = report["bigram"]["bits_per_byte"] / report["bigram"]["loss"]  # of the same text
    assert row["bits_per_byte"] / row["loss"] == pytest.approx(ratio)


def test_evaluate_only_loss_with_a_ladder(tiny_run):
  result = run_program(
    "evaluate", f"--workdir={tiny_run}", "--metrics=loss", "--ladder=3", "--batches=2"
  )
  assert result.returncode == 0, result.stderr
  assert "agrees" not in result.stdout and "L" in result.stdout


@pytest.mark.parametrize(
  "args,words",
  [
    (["--granularities=S,Q"], ["'Q'", "S, M, L, XL"]),
    (["--granularities=M*3"], ["3 layers"]),
    (["--metrics=loss,bleu"], ["bleu"]),
    (["--step=3"], ["no checkpoint of step 3"]),
    (["--workdir=/nowhere"], ["/nowhere", "is not a run"]),
  ],
)
def test_evaluate_mistakes(tiny_run, args, words):
  assert_one_line_error(run_program("evaluate", f"--workdir={tiny_run}", *args), *words)


def test_describe_matches_table_4_and_the_run(tiny_run):
  result = run_program("describe", "--config=configs/matlm.py:850M", "--json")
  rows = json.loads(result.stdout)["granularities"]
  assert [round(rows[n]["non_embedding_params"] / 1e6) for n in ("S", "M", "L", "XL")] == [
    189,
    227,
    302,
    453,
  ]
  assert {"params", "ffn_params", "flops_per_token"} <= rows["S"].keys()
  text = run_program("describe", f"--workdir={tiny_run}").stdout
  assert "41,120" in text and "FLOPs/token" in text
  assert_one_line_error(run_program("describe"), "exactly one")


@pytest.mark.parametrize("module", ["train", "evaluate", "describe"])
def test_help(module):
  result = run_program(module, "--help")
  assert f"python -m matformer_jax.{module}" in result.stdout + result.stderr


def test_own_text(tmp_path):
  """The README's way to train on one's own files."""
  for path in sorted(pathlib.Path(helpers.ROOT / "matformer_jax").rglob("*.py")):
    (tmp_path / path.name).write_text(path.read_text())
  result = run_program(
    "train",
    *train_args(
      tmp_path / "run",
      data__source=f"text:{tmp_path}/*.py",
      steps=4,
      eval__every=0,
      checkpoint__every=0,
      sampling=ONE_SIZE,
    ),
  )
  assert result.returncode == 0, result.stderr
  assert checkpoint.steps(tmp_path / "run") == [4]
  assert "optim.warmup_steps=5 is not below steps=4; warming up over 2" in result.stdout
