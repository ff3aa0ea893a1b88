"""Scoring, and the paper's 25 tasks in lm-eval, offline, on a few examples of each."""

import csv
import json
import re
import subprocess
import sys
import types

import downstream_files
import helpers
import jax
import numpy as np
import pytest

from matformer_jax import downstream, sharding
from matformer_jax import granularity as gran
from matformer_jax.config import Execution, MatLMConfig
from matformer_jax.errors import UserError
from matformer_jax.evals.likelihood import Request, Scorer
from matformer_jax.harness.paper25 import PAPER25, Row
from matformer_jax.models import matlm

lm_eval = pytest.importorskip("lm_eval")
CONFIG = MatLMConfig(
  vocab_size=64, num_layers=4, d_model=32, num_heads=4, seq_len=64, ffn_groups=2, head_groups=2
)
SIZES = ("S", "M*2+L*2")


@pytest.fixture(scope="module")
def params():
  return matlm.init_params(CONFIG, jax.random.key(0))


def requests(count: int = 24) -> list[Request]:
  """Questions of up to four choices, repeated ones and lone ones among them."""
  rng = np.random.default_rng(0)
  draw = lambda low, high: rng.integers(0, 64, rng.integers(low, high)).tolist()
  found = []
  for _ in range(count):
    context = draw(1, 60)
    ends = [draw(1, 8) for _ in range(rng.integers(1, 5))]
    found += [Request([*context, *end], len(end)) for end in (*ends, ends[0])]
  return found


def reference(params, granularity: gran.Granularity, asked: list[Request]) -> list[tuple]:
  """By a pass of the whole model over each sequence."""
  width = max(len(r.tokens) for r in asked)
  tokens = np.array([[*r.tokens, *[0] * (width - len(r.tokens))] for r in asked])
  apply = jax.jit(
    lambda t: matlm.MatLM(CONFIG).apply({"params": params}, t, granularity=granularity)
  )
  log_p = np.asarray(jax.nn.log_softmax(apply(tokens)))
  answers = []
  for row, r in zip(log_p, asked):
    at, next_ = np.arange(len(r.tokens) - 1)[-r.scored :], r.tokens[-r.scored :]
    greedy = row[at].argmax(-1) == next_
    answers.append((row[at, next_].sum(), greedy.all()))
  return answers


@pytest.mark.parametrize("how", ["unrolled", "scanned", "mesh"])
def test_scores_are_those_of_whole_sequences(params, how):
  asked, small = requests(), gran.parse("M*2+L*2", CONFIG)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}) if how == "mesh" else None
  platform = "gpu" if how == "scanned" else "cpu"
  execution = Execution.for_platform(platform, mesh, dtype="float32", remat="none")
  placed = params
  if mesh is not None:
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
  want = reference(params, small, asked)
  for share in (True, False):
    scorer = Scorer(placed, CONFIG, execution, small, batch_tokens=256, share=share)
    scores = scorer.score(asked)
    np.testing.assert_allclose([s.log_likelihood for s in scores], [w[0] for w in want], atol=1e-4)
    assert [s.greedy for s in scores] == [w[1] for w in want]
    assert any(name == "tails" for name, *_ in scorer.programs) == share


def test_sharing_runs_fewer_tokens_and_new_requests_no_new_programs(params):
  rng = np.random.default_rng(1)
  context = rng.integers(0, 64, 40).tolist()
  asked = [Request([*context, *rng.integers(0, 64, 3).tolist()], 3) for _ in range(8)]
  scorers = [
    Scorer(params, CONFIG, Execution(), gran.full(CONFIG), batch_tokens=256, share=share)
    for share in (True, False)
  ]
  for scorer in scorers:
    scorer.score(asked)
  assert scorers[0].tokens_run[1] == 40 + 8 * 2 and scorers[1].tokens_run[1] == 8 * 42
  before = set(scorers[0].programs)
  scorers[0].score(asked[::-1])
  assert set(scorers[0].programs) == before


# ------------------------------------------------------------------ the harness


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return downstream_files.write(tmp_path_factory.mktemp("downstream") / "data")


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def run(tiny_run, *args):
  return helpers.run_program("downstream", f"--workdir={tiny_run}", *args, env=OFFLINE)


def test_all_tasks_of_the_paper(tiny_run, data, tmp_path):
  args = f"--data={data}", f"--out={tmp_path}", "--tasks=paper25", "--noloss"
  result = run(tiny_run, *args, "--granularities=S")
  assert result.returncode == 0, result.stderr
  record = json.loads((tmp_path / "table.json").read_text())
  assert list(record["tasks"]) == [row.task for row in PAPER25] and len(PAPER25) == 25
  for row in PAPER25:
    measured = record["tasks"][row.task]["S"]
    assert measured["examples"] == downstream_files.EXAMPLES, row
    assert measured["metric"] == row.metric and 0 <= measured["value"] <= 1, row
  rows = list(csv.reader((tmp_path / "table.csv").open()))
  assert rows[0] == ["Downstream Task", "S"] and rows[-1][0] == "Average" and len(rows) == 27
  values = [record["tasks"][row.task]["S"]["value"] for row in PAPER25]
  assert float(rows[-1][1]) == pytest.approx(100 * np.mean(values), abs=0.006)
  # What is there is not measured again: with no data to be had, the same table.
  before = (tmp_path / "table.csv").read_text()
  kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "results").iterdir()}
  again = run(tiny_run, *args, "--granularities=S")
  assert again.returncode == 0 and (tmp_path / "table.csv").read_text() == before
  assert kept == {p: p.stat().st_mtime_ns for p in (tmp_path / "results").iterdir()}


def test_two_sizes_with_their_losses(tiny_run, data, tmp_path):
  result = run(
    *(tiny_run, f"--data={data}", f"--out={tmp_path}", "--tasks=piqa,copa", "--num_fewshot=0"),
    *("--granularities=S,XL", "--limit=3"),
  )
  assert result.returncode == 0, result.stderr
  record = json.loads((tmp_path / "table.json").read_text())
  assert set(record["loss"]) == {"S", "XL"} and 0 < record["loss"]["S"] < 20
  assert record["tasks"]["piqa"]["XL"]["examples"] == 3
  lines = (tmp_path / "table.md").read_text().splitlines()
  assert lines[0] == "| Downstream Task | S | XL |" and lines[-1].startswith("| Loss |")


def test_a_mistake_is_one_line(tiny_run, tmp_path):
  result = run(tiny_run, f"--out={tmp_path}", "--tasks=piqa")
  assert result.returncode == 1 and "Traceback" not in result.stderr
  last = result.stderr.strip().splitlines()[-1]
  assert re.match("error: task piqa: the dataset baber/piqa is not in .* --data=DIR", last), last


def test_names_and_local_data_are_checked(data, tmp_path):
  known, groups = ["piqa", "hellaswag", "anli_r1"], ["anli"]
  parse = lambda *names: downstream.parse_tasks(names, known, groups)
  assert parse("paper25", "piqa") == list(PAPER25)
  assert parse("hellaswag")[0].label == "hellaswag"
  with pytest.raises(UserError, match="no task is called 'helaswag'; did you mean 'hellaswag'"):
    parse("helaswag")
  with pytest.raises(UserError, match="anli is a group"):
    parse("anli")
  assert set(downstream.local_data(str(data), "anli_r1")) == {"test_r1", "train_r1", "dev_r1"}
  assert downstream.local_data(str(data), "mmlu") == downstream.local_data(None, "piqa") == {}
  with pytest.raises(UserError, match="no such directory"):
    downstream.local_data(str(tmp_path / "nowhere"), "piqa")
  (tmp_path / "piqa").mkdir()
  with pytest.raises(UserError, match="holds no SPLIT.jsonl"):
    downstream.local_data(str(tmp_path), "piqa")


def test_a_result_is_read_only_with_all_it_depends_on(tmp_path):
  store, key = downstream.Store(tmp_path), {"task": "piqa", "step": 1}
  store.write(key, {"value": 0.5})
  assert store.read(key)["value"] == 0.5
  assert store.read({**key, "step": 2}) is None
  (path,) = tmp_path.iterdir()
  path.write_text(path.read_text()[:20])  # cut short
  assert store.read(key) is None


def test_a_request_needs_context():
  scorer = Scorer(
    matlm.init_params(CONFIG, jax.random.key(0)), CONFIG, Execution(), gran.full(CONFIG)
  )
  with pytest.raises(ValueError, match="no context"):
    scorer.score([Request([5, 6], 2)])


def test_a_digest_is_of_names_and_contents(tmp_path):
  file = tmp_path / "train.jsonl"
  assert downstream.digest(tmp_path.glob("*.jsonl")) is None
  seen = set()
  for name, content in (("train", "a"), ("train", "b"), ("test", "b")):
    file.unlink(missing_ok=True)
    file = tmp_path / f"{name}.jsonl"
    file.write_text(content)
    seen.add(downstream.digest(tmp_path.glob("*.jsonl")))
  assert len(seen) == 3 and None not in seen


def test_interrupted_measuring_goes_on(tmp_path):
  """Every finished pair of task and size is kept, and only those missing are measured."""
  done, rows = [], [Row("A", "a"), Row("B", "b")]

  def measure(fail_at):
    def one(task, row, size):
      if len(done) == fail_at:
        raise KeyboardInterrupt
      done.append((row.task, size))
      return {"value": 0.5}

    key = lambda row: {"task": row.task}
    return downstream.measure(rows, SIZES, key, downstream.Store(tmp_path), lambda row: row, one)

  with pytest.raises(KeyboardInterrupt):
    measure(3)
  assert len(measure(-1)) == 4
  assert done == [(t, s) for t in "ab" for s in SIZES]


@pytest.fixture(scope="module")
def model(tiny_run):
  from matformer_jax.harness.model import MatFormerLM

  return MatFormerLM(str(tiny_run), "S", data=1, quiet=True)


def instances(*args):
  return [types.SimpleNamespace(args=a) for a in args]


def test_texts_end_at_stop_strings_and_do_not_depend_on_the_batch(model):
  ask = {"until": ["\n"], "max_gen_toks": 12}
  asked = instances(*((f"def f{i}(", ask) for i in range(11)))
  texts = model.generate_until(asked)
  assert not any("\n" in text for text in texts)
  free = model.generate_until(instances(("def f3(", {"max_gen_toks": 12})))[0]
  assert free.startswith(texts[3])
  assert free == model.model.generate("def f3(", "S", max_tokens=12)
  sampled = [{"do_sample": True, "temperature": 1.5, "max_gen_toks": 6}, ask]
  mixed = model.generate_until(instances(("a", sampled[0]), ("def f3(", ask)))
  assert mixed[1] == texts[3]


def test_rolling_likelihood_is_the_loss(model):
  text = "import os\n" * 3
  ids = model.tok_encode(text)
  assert len(ids) < model.max_length
  (total,) = model.loglikelihood_rolling(instances((text,)))
  loss = model.model.loss([model.prefix_token_id, *ids], "S")
  assert total == pytest.approx(-loss * len(ids), rel=1e-4)


def test_arguments_are_checked(model, tiny_run):
  from matformer_jax.harness.model import Generation, MatFormerLM

  with pytest.raises(UserError, match="num_beams"):
    Generation.parse({"num_beams": 4})
  with pytest.raises(UserError, match="JAX chooses"):
    MatFormerLM(str(tiny_run), device="cuda:0")
  with pytest.raises(UserError, match="longer than max_length"):
    model.loglikelihood(instances(("a", " b" * 10_000)))


def test_it_is_known_by_name_and_imports_no_torch(tiny_run):
  code = f"""
import sys
import matformer_jax.downstream
assert "lm_eval" not in sys.modules
import lm_eval, matformer_jax.harness.model
from lm_eval.api.registry import get_model
made = get_model("matformer").create_from_arg_string(
  "workdir={tiny_run},granularity=S*1+M*1", dict(batch_size=4, device=None))
assert made.get_model_info()["model_granularity"] == "S*1+M*1"
assert "torch" not in sys.modules
"""
  result = subprocess.run(
    [sys.executable, "-c", code], env=helpers.PROGRAM_ENV, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
