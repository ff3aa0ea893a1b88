"""The programs that choose, cut out, time and run submodels."""

import csv
import json
import shutil
import subprocess

import helpers
from helpers import OPTIMISED, run_program, train_args
import numpy as np
import pytest
from test_programs import assert_one_line_error

import matformer_jax
from matformer_jax import UserError
from matformer_jax import granularity as gran
from matformer_jax.decoding.decode import Decoder
from matformer_jax.evals import latency
from matformer_jax.search import Candidate, candidates, score, summarize

# ------------------------------------------------------------------- describe


@pytest.mark.parametrize(
  "budget,expected",
  [
    ("nonembedding:226.6M", "M"),
    ("nonembedding:245.5M", "M*12+L*4"),
    ("nonembedding:278.5M", "M*5+L*11"),
    ("nonembedding:377.6M", "L*8+XL*8"),
  ],
)
def test_describe_reproduces_table_5(budget, expected):
  result = run_program("describe", "--config=configs/matlm.py:850M", f"--budget={budget}", "--json")
  chosen = json.loads(result.stdout)["mix_n_match"]
  assert chosen["granularity"] == expected
  assert chosen["non_embedding_params"] <= float(budget[13:-1]) * 1e6


def test_describe_shows_the_choice_and_the_ends():
  args = ("describe", "--config=configs/matlm.py:850M")
  text = run_program(*args, "--budget=0.8x").stdout
  assert "Within --budget=0.8x: M*4+L*12" in text and "676,382,208" in text
  assert_one_line_error(
    run_program(*args, "--budget=0.6x"), "0.6x", "582,010,368 (S)", "846,251,520 (XL)"
  )
  assert_one_line_error(run_program(*args, "--budget=15ms"), "matformer_jax.latency")


# --------------------------------------------------------------------- profile


def test_latency_of_a_model_of_one_size(tiny_run, tmp_path):
  small = tmp_path / "s"
  result = run_program("extract", f"--workdir={tiny_run}", "--granularity=S", f"--out={small}")
  assert result.returncode == 0, result.stderr
  result = run_program("latency", f"--workdir={small}", "--rounds=1")
  assert result.returncode == 0 and "--budget=latency:" in result.stdout, result.stderr


def test_what_is_empty(tiny_run):
  model = matformer_jax.load(tiny_run)
  assert model.generate([]) == []
  for nothing in ("", []):
    with pytest.raises(UserError, match="at least 2 tokens, got 0"):
      model.loss(nothing)


def test_profile_then_plan_a_latency(tiny_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(tiny_run, workdir)
  result = run_program("latency", f"--workdir={workdir}", "--rounds=5")
  assert result.returncode == 0, result.stderr
  assert "decode" in result.stdout and "attention/layer" in result.stdout
  model = matformer_jax.load(workdir)
  found = latency.read(workdir, model.config)
  low, high = (
    found.predict(g, "decode") for g in (gran.parse("S", model.config), gran.full(model.config))
  )
  assert 0 < low and 0 < high
  budget = f"decode:{1e3 * max(low, high) * 0.999999:.9f}ms"
  if low < high:  # timings of so small a model can come out in any order
    result = run_program("describe", f"--workdir={workdir}", f"--budget={budget}", "--json")
    assert result.returncode == 0, result.stderr
    assert "mix_n_match" in json.loads(result.stdout)
  (workdir / latency.PROFILE_FILE).write_text("{}")
  assert_one_line_error(
    run_program("describe", f"--workdir={workdir}", "--budget=15ms"),
    "is not a profile of this model",
  )


def test_a_prediction_is_the_sum_of_the_parts(small):
  costs = latency.Costs(1.0, (0.25,) * 4, (0.125, 0.5, 1.0, 2.0), 1, 16)
  p = latency.Profile("here", {"latency": costs, "decode": costs})
  assert p.predict(gran.parse("S*1+M*1+XL*2", small)) == 1 + 4 * 0.25 + 0.125 + 0.5 + 4
  assert latency.Profile.from_json(json.loads(json.dumps(p.to_json()))) == p
  # S costs 2.5, M 4, L 6: the largest within 4.6 is M and one layer at L.
  assert gran.to_text(gran.mix_n_match(small, latency=4.6, profile=p), small) == "M*3+L*1"
  assert gran.to_text(gran.mix_n_match(small, "latency:4600ms", profile=p), small) == "M*3+L*1"


def test_measured_parts_reproduce_the_measured_sizes(small, small_params):
  """By construction the prediction for a profiled size is its own measurement."""
  from matformer_jax.config import Execution

  costs = latency.measure(small, Execution(), small_params, "latency", 1, 16, rounds=3)
  assert len(costs.ffn) == len(costs.attention) == 4 and costs.fixed > 0
  timed = latency.make_program(
    Decoder(small, Execution(), gran.full(small)),
    Decoder(small, Execution(), gran.full(small)).lay_out(small_params),
    "decode",
    2,
    16,
  )
  assert timed() > 0 and timed() > 0  # the state is not used up


# ---------------------------------------------------------------------- search


def test_search(tiny_run, tmp_path):
  out = tmp_path / "found"
  result = run_program(
    "search",
    f"--workdir={tiny_run}",
    "--budgets=0.75x,0.85x",
    "--random=4",
    "--batches=2",
    "--batch_size=4",
    f"--out={out}",
  )
  assert result.returncode == 0, result.stderr
  assert "minus Mix'n'Match" in result.stdout and "±" in result.stdout
  assert "bits/byte" in result.stdout
  rows = json.loads((out / "search.json").read_text())["rows"]
  table = list(csv.DictReader(open(out / "search.csv")))
  assert [r["granularity"] for r in table] == [r["granularity"] for r in rows]
  assert [float(r["loss"]) for r in table] == [r["loss"] for r in rows]
  assert {r["kind"] for r in rows} >= {"trained", "mix_n_match", "decreasing", "random"}
  assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
  xl = matformer_jax.load(tiny_run).config
  limit = 0.85 * gran.count(xl, "XL").params
  assert all(r["params"] <= limit for r in rows if r["budget"] == "0.85x")


def test_scores_are_the_losses_of_the_static_programs(tiny_run):
  from matformer_jax.evals import lm

  model = matformer_jax.load(tiny_run)
  tokens = [np.random.default_rng(i).integers(0, 512, (4, 33)).astype(np.int32) for i in (0, 1)]
  ones = np.ones(4, np.float32)
  batches = [{"tokens": t, "bytes": np.full(4, 64, np.int32), "weight": ones} for t in tokens]
  batches[1]["weight"] = np.array([1, 1, 1, 0], np.float32)  # the last row only fills the batch
  chosen = [gran.parse(t, model.config) for t in ("S", "M+L", "XL+S", "XL")]
  have = score(model.config, model.execution, model.params, chosen, batches)
  want = lm.evaluate(model.config, model.execution, model.params, chosen, batches, False)
  assert have.shape == (4, 7)
  np.testing.assert_allclose(have.mean(1), [r.metrics["loss"] for r in want], rtol=1e-5)


def test_front_and_paired_differences(small):
  parse = lambda text: gran.parse(text, small)
  found = [
    Candidate(parse("S"), "trained", ""),
    Candidate(parse("M"), "increasing", "b"),
    Candidate(parse("S*2+L*2"), "random", "b"),
    Candidate(parse("XL"), "trained", ""),
  ]
  windows = np.array([[5.0, 3.0], [4.0, 2.0], [4.5, 2.5], [3.0, 1.0]])
  scored = summarize(small, found, windows, bits_per_nat=0.5)
  assert scored[0].bits_per_byte == pytest.approx(2.0)
  assert [s.pareto for s in scored] == [True, True, False, True]
  assert scored[2].difference == 0.5 and scored[2].difference_stderr == 0
  assert scored[0].difference is None and scored[0].stderr == pytest.approx(1.0)


def test_random_candidates_use_their_budget(small):
  found = [c for c in candidates(small, ["0.7x"], random=10, seed=0, rungs=5) if c.kind == "random"]
  assert len({c.granularity for c in found}) == 10
  limit = 0.7 * gran.count(small, "XL").params
  best = gran.count(small, gran.mix_n_match(small, "0.7x")).params
  for c in found:
    params = gran.count(small, c.granularity).params
    assert params <= best <= limit
    for layer, size in enumerate(c.granularity.ffn):  # no layer can be raised
      wider = list(c.granularity.ffn)
      wider[layer] += 1
      assert size == 3 or gran.count(small, wider).params > best


# ------------------------------------------------------------ extract, fine-tune


def test_extract_evaluate_fine_tune(tiny_run, tmp_path):
  out = tmp_path / "small"
  result = run_program("extract", f"--workdir={tiny_run}", "--budget=0.76x", f"--out={out}")
  assert result.returncode == 0, result.stderr
  assert "wrote M*1+L*1" in result.stdout
  result = run_program("evaluate", f"--workdir={out}", "--batches=2", env=OPTIMISED)
  assert result.returncode == 0 and "agrees with M*1+L*1" in result.stdout, result.stderr
  mine = run_program(
    "evaluate",
    f"--workdir={tiny_run}",
    "--batches=2",
    "--granularities=M*1+L*1",
    "--metrics=loss",
    env=OPTIMISED,
  ).stdout.split()[-5:]
  assert mine == [
    w
    for line in result.stdout.splitlines()
    if line.startswith("M*1+L*1")
    for w in line.split()[3:8]
  ]  # the same loss, error, perplexity and bits per byte
  result = run_program("describe", f"--workdir={out}")
  assert "M*1+L*1" in result.stdout
  tuned = tmp_path / "tuned"
  args = train_args(tuned, init_from=out, sampling="0/0/0/1", steps=30, eval__every=10)
  result = run_program("train", *args)
  assert result.returncode == 0, result.stderr
  assert f"starting from {out}, step 40" in result.stdout
  evals = [json.loads(line)["loss"] for line in (tuned / "eval.jsonl").read_text().splitlines()]
  assert set(evals[0]) == {"S", "M", "M*1+L*1"}
  before = float(mine[0])
  assert evals[-1]["M*1+L*1"] < before
  model = matformer_jax.load(tuned)
  assert [r.ffn for r in model.config.spans] == [1, 2]
  # Resuming does not start over, and the extracted model was not touched.
  shutil.rmtree(out)
  again = run_program("train", *args).stdout
  assert "nothing to do" in again and "changed config" not in again


def test_extract_mistakes(tiny_run, tmp_path):
  at = (f"--workdir={tiny_run}", f"--out={tmp_path / 'x'}")
  assert_one_line_error(run_program("extract", *at), "exactly one of --granularity")
  assert_one_line_error(run_program("extract", *at, "--granularity=M*3"), "3 layers")
  assert_one_line_error(run_program("extract", *at, "--budget=0.1x"), "below the smallest")
  assert_one_line_error(
    run_program("extract", "--workdir=/nowhere", f"--out={tmp_path / 'x'}", "--granularity=S"),
    "/nowhere",
  )
  assert not (tmp_path / "x").exists()


def test_starting_from_nowhere(tmp_path):
  assert_one_line_error(
    run_program("train", *train_args(tmp_path, init_from="/nowhere")), "/nowhere"
  )


def test_an_extracted_directory_is_not_trained_in_place(tiny_run, tmp_path):
  assert (
    run_program(
      "extract", f"--workdir={tiny_run}", "--granularity=M", f"--out={tmp_path / 'm'}"
    ).returncode
    == 0
  )
  assert_one_line_error(run_program("train", *train_args(tmp_path / "m")), "--config.init_from=")


# -------------------------------------------------------------------- generate


def test_generate_prints_only_the_text(tiny_run):
  args = (f"--workdir={tiny_run}", "--prompt=def ", "--max_tokens=40")
  plain = run_program("generate", *args, "--temperature=0")
  assert plain.returncode == 0, plain.stderr
  model = matformer_jax.load(tiny_run)
  assert plain.stdout == model.generate("def ", max_tokens=40)
  assert "tokens/s" in plain.stderr
  draft = run_program("generate", *args, "--temperature=0", "--draft=S")
  assert draft.stdout == plain.stdout and "accepted" in draft.stderr
  small = run_program("generate", *args, "--temperature=0", "--granularity=M*1+L*1")
  assert small.stdout == model.generate("def ", "M+L", max_tokens=40)
  sampled = [run_program("generate", *args, f"--seed={s}").stdout for s in (1, 1, 2)]
  assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
  "args,head",
  [
    (("describe", "--config=configs/matlm.py:850M"), ["head", "-n", "1"]),
    (("generate", "--max_tokens=400", "--prompt=def "), ["head", "-c", "20"]),
  ],
)
def test_a_closed_pipe_ends_without_a_word(tiny_run, args, head):
  program, *flags = args
  flags += [f"--workdir={tiny_run}"] if program == "generate" else []
  streams = dict(cwd=helpers.ROOT, env=helpers.PROGRAM_ENV, stdout=subprocess.PIPE)
  writer = subprocess.Popen(helpers.command(program, *flags), stderr=subprocess.PIPE, **streams)
  reader = subprocess.run(head, stdin=writer.stdout, capture_output=True)
  writer.stdout.close()
  error = writer.stderr.read().decode()
  assert writer.wait() in (0, 141) and "Traceback" not in error and "BrokenPipe" not in error, error
  assert reader.stdout


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range(tiny_run, seed):
  flag = f"--seed={seed}"
  assert_one_line_error(run_program("generate", f"--workdir={tiny_run}", flag), str(seed))
  with pytest.raises(UserError, match=f"seed={seed}"):
    matformer_jax.load(tiny_run).generate("x", seed=seed)
  last = matformer_jax.load(tiny_run).generate(["x", "y"], max_tokens=2, seed=2**32 - 1)
  assert len(last) == 2


def test_generate_from_python(tiny_run):
  model = matformer_jax.load(tiny_run)
  one = model.generate("import ", "M", max_tokens=20)
  assert model.generate(["import ", "x = "], "M", max_tokens=20)[0] == one
  assert model.generate("import ", "M", max_tokens=20, draft="S") == one
  assert isinstance(model.generate("", temperature=1.0, max_tokens=3), str)


@pytest.mark.parametrize(
  "args,words",
  [
    (["--granularity=Q"], ["'Q'"]),
    (["--draft=XL", "--granularity=S"], ["XL", "stored only up to S"]),
    (["--max_tokens=0"], ["max_tokens=0"]),
    (["--temperature=-1"], ["temperature=-1"]),
    (["--draft=S", "--draft_length=0"], ["draft_length='0'"]),
    (["--workdir=/nowhere"], ["/nowhere"]),
  ],
)
def test_generate_mistakes(tiny_run, args, words):
  assert_one_line_error(run_program("generate", f"--workdir={tiny_run}", *args), *words)


@pytest.mark.parametrize("module", ["latency", "search", "extract", "generate"])
def test_help(module):
  result = run_program(module, "--help")
  assert f"python -m matformer_jax.{module}" in result.stdout + result.stderr
