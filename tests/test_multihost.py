"""Several real processes on loopback: agreement, preemption, lost peers."""

import json
import pathlib
import re
import signal
import socket
import time

import helpers
from helpers import ONE_WIDTH, TWO_WIDTHS, digits_args, run_program, train_args
import numpy as np
import pytest

from matformer_jax.checkpoints import checkpoint
from matformer_jax.hosts.lock import LOCK_FILE

PEER_TIMEOUT = 15
DEVICES = 4  # in all, whatever the number of processes: so every job runs the same program
WORKER = pathlib.Path(__file__).parent / "multihost_worker.py"


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def environment(count: int) -> dict[str, str]:
  return {"XLA_FLAGS": helpers.xla_flags(DEVICES // count)}


class Job:
  """`count` processes that train the tiny row (or another: `make_args`) together."""

  def __init__(
    self,
    workdir,
    count: int,
    program=("train",),
    per_process=None,
    make_args=train_args,
    logs=None,
    env=None,
    **overrides,
  ):
    overrides = {
      "peer_timeout_s": float(PEER_TIMEOUT),
      "log_every": 1,
      **ONE_WIDTH,
      **overrides,
    }
    self._logs = (logs or workdir.parent) / f"logs-{time.time_ns()}"
    self._logs.mkdir()
    port = free_port()
    self.processes = []
    for i in range(count):
      args = make_args(workdir, **{**overrides, **(per_process or {}).get(i, {})})
      args += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
      env = environment(count) | (env or {})
      with open(self._logs / str(i), "w") as log:
        self.processes.append(helpers.Program(*program, *args, env=env, stdout=log))

  def log(self, index: int) -> str:
    return (self._logs / str(index)).read_text()

  def wait_for(self, index: int, words: str, timeout: float = helpers.BACKSTOP_S) -> None:
    deadline = time.time() + timeout
    while words not in self.log(index):
      assert self.processes[index].poll() is None and time.time() < deadline, self.log(index)
      time.sleep(0.05)

  def wait(self, timeout: float = helpers.BACKSTOP_S, but: int | None = None) -> list[int | None]:
    """Exit codes of all processes (`but` one, which is None); what remains is killed."""
    deadline = time.time() + timeout
    waited = [p for i, p in enumerate(self.processes) if i != but]
    while any(p.poll() is None for p in waited) and time.time() < deadline:
      time.sleep(0.05)
    codes = [None if i == but else p.poll() for i, p in enumerate(self.processes)]
    for p in self.processes:
      p.kill()
      p.wait()
    return codes

  def logs(self) -> str:
    return "\n".join(f"--- process {i}\n{self.log(i)}" for i in range(len(self.processes)))


def rows(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir) -> list[float]:
  assert [r["step"] for r in rows(workdir)] == list(range(1, len(rows(workdir)) + 1))
  return [r["loss"] for r in rows(workdir)]


def samples(workdir) -> dict[int, list[int]]:
  """{step: windows it trained on}, over all processes; a row read twice counts once."""
  found: dict[int, dict[int, list[int]]] = {}
  for path in workdir.glob("samples-*.jsonl"):
    for line in path.read_text().splitlines():
      row = json.loads(line)
      found.setdefault(row["step"], {}).update(row["first_row_to_ids"])
  return {
    step: [i for first in sorted(parts, key=int) for i in parts[first]]
    for step, parts in found.items()
  }


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> pathlib.Path:
  """The tiny row on as many devices as the jobs have, in one process."""
  workdir = tmp_path_factory.mktemp("one_process") / "run"
  result = run_program(
    "train", *train_args(workdir, data__log_samples=True, **TWO_WIDTHS), env=environment(1)
  )
  assert result.returncode == 0, result.stderr
  return workdir


# ------------------------------------------------------------ stop, kill, resume


@pytest.mark.slow
def test_kills_and_other_numbers_of_processes_change_nothing(one_process, tmp_path):
  """4 processes until SIGTERM, 2 until SIGKILL, then 1: the same run as 1 process throughout."""
  workdir = tmp_path / "run"
  changes = dict(data__log_samples=True, **TWO_WIDTHS)
  job = Job(workdir, 4, program=helpers.signalled(2, 12, signal.SIGTERM), **changes)
  assert job.wait() == [143] * 4, job.logs()
  stopped = checkpoint.steps(workdir)[-1]
  assert 12 <= stopped <= 15 and f"saved step {stopped}" in job.log(0)

  job = Job(workdir, 2, program=helpers.signalled(1, stopped + 13, signal.SIGKILL), **changes)
  assert job.wait()[0] == 42, job.logs()
  assert "lost process 1" in job.log(0)
  saved = checkpoint.steps(workdir)[-1]
  assert saved >= stopped

  result = run_program("train", *train_args(workdir, **changes), env=environment(1))
  assert result.returncode == 0 and f"at step {saved}" in result.stdout, result.stderr
  np.testing.assert_allclose(losses(workdir), losses(one_process), rtol=1e-5)
  assert [r["draw_hash"] for r in rows(workdir)] == [r["draw_hash"] for r in rows(one_process)]
  # Every process's ledger together: the same samples in the same rows of every step.
  assert samples(workdir) == samples(one_process)
  assert sorted(samples(workdir)) == list(range(1, 41))


@pytest.mark.slow
def test_a_slice_that_is_lost_changes_nothing(tmp_path):
  """Two slices until one is killed, then the one that is left."""
  changes = dict(data__log_samples=True, mesh__fsdp=2, checkpoint__every=5, eval__every=0)
  workdir = tmp_path / "run"
  job = Job(
    workdir,
    2,
    program=helpers.signalled(1, 13, signal.SIGKILL),
    mesh__slices=2,
    steps=20,
    **changes,
  )
  assert job.wait()[0] == 42, job.logs()
  assert "mesh {'slices': 2, 'data': 1, 'fsdp': 2, 'tensor': 1}" in job.log(0)
  assert checkpoint.steps(workdir)[-1] == 10
  alone = {"XLA_FLAGS": helpers.xla_flags(2)}
  for run in (workdir, tmp_path / "alone"):
    args = train_args(run, steps=20, **ONE_WIDTH, **changes)
    result = run_program("train", *args, env=alone)
    assert result.returncode == 0, result.stderr
  np.testing.assert_allclose(losses(workdir), losses(tmp_path / "alone"), rtol=1e-5)
  # As sets: the lost process noted some rows that were read again, in other parts.
  found, expected = (
    {step: set(ids) for step, ids in samples(run).items()} for run in (workdir, tmp_path / "alone")
  )
  assert found == expected and len(found) == 20


@pytest.mark.slow
def test_every_sample_once_per_epoch(tmp_path):
  """Short epochs, 2 processes."""
  for i in range(10):
    (tmp_path / f"{i}.txt").write_text("".join(f"value_{j} = {i * j}\n" for j in range(25)))
  workdir = tmp_path / "run"
  job = Job(
    workdir,
    2,
    data__log_samples=True,
    data__source=f"text:{tmp_path}/*.txt",
    steps=30,
    data__tokenizer=str(one_tokenizer(tmp_path)),
    eval__every=0,
    checkpoint__every=0,
    data__validation_fraction=0.2,
  )
  assert job.wait() == [0, 0], job.logs()
  order = [i for _, ids in sorted(samples(workdir).items()) for i in ids]
  windows = max(order) + 1
  assert 8 < windows < len(order) // 2
  for epoch in range(len(order) // windows):
    assert sorted(order[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


@pytest.mark.slow
def test_images_are_the_same_on_two_processes(tmp_path):
  """Order, augmentation, mixup and dropout."""
  changes = dict(
    data__log_samples=True,
    steps=25,
    mixup=0.5,
    model__dropout=0.1,
    eval__every=0,
    eval__batches=2,
    data__train_transform="pad_crop(1)",
    **ONE_WIDTH,
  )
  job = Job(tmp_path / "two", 2, make_args=digits_args, **changes)
  assert job.wait() == [0, 0], job.logs()
  result = run_program("train", *digits_args(tmp_path / "one", **changes), env=environment(1))
  assert result.returncode == 0, result.stderr
  np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
  assert samples(tmp_path / "two") == samples(tmp_path / "one")
  assert len(samples(tmp_path / "two")) == 25
  # Both measured the same sample of the validation images, and all of it.
  two, one = (json.loads((tmp_path / run / "eval.jsonl").read_text()) for run in ("two", "one"))
  assert two["examples"] == one["examples"] == 2 * 72
  for metric in ("loss", "accuracy", "loss_stderr", "accuracy_stderr"):
    assert two[metric] == pytest.approx(one[metric], rel=1e-4), metric


def one_tokenizer(tmp_path) -> pathlib.Path:
  from matformer_jax.data.tokenizer import train_tokenizer

  path = tmp_path / "tokenizer.model"
  path.write_bytes(
    train_tokenizer(["".join(map(chr, range(32, 127)))] * 50, 360, "bpe", 10**6).model
  )
  return path


@pytest.mark.parametrize(
  "count,victim,signum,moment",
  [
    (2, 1, signal.SIGKILL, "compiling"),
    (2, 1, signal.SIGKILL, "saving"),
    (2, 0, signal.SIGKILL, "evaluating"),
    (4, 0, signal.SIGKILL, "gathering"),
    (4, 2, signal.SIGSTOP, "comparing"),
  ],
)
@pytest.mark.slow
def test_a_lost_peer_is_named_and_nobody_hangs(count, victim, signum, moment, tmp_path):
  """While the others wait for it there: in a collective, or at a barrier of Orbax."""
  workdir = tmp_path / "run"
  job = Job(
    workdir,
    count,
    program=helpers.signalled(victim, moment, signum),
    steps=10**6,
    eval__every=3,
    eval__batches=2,
    checkpoint__every=2,
  )
  codes = job.wait(but=victim)
  survivors = [i for i in range(count) if i != victim]
  assert all(codes[i] == 42 for i in survivors), job.logs()
  words = f"lost process {victim}" + (", the coordinator" if victim == 0 else "")
  for i in survivors:
    log = job.log(i)
    assert words in log and "Thread 0x" in log and "Traceback" not in log, log
  # Saved at 2, 3, 4 and 6: each save waits for the one before, so the third finds one at least.
  started = moment in ("saving", "comparing", "evaluating")
  assert bool(checkpoint.steps(workdir)) == started, job.logs()
  assert (workdir / LOCK_FILE).exists() == (victim == 0)  # who was killed gives nothing back


@pytest.mark.slow
def test_sigterm_while_compiling_and_while_evaluating(tmp_path):
  workdir = tmp_path / "compiling"
  job = Job(workdir, 2, program=helpers.signalled(1, "compiling", signal.SIGTERM))
  assert job.wait() == [143, 143], job.logs()
  assert "before the first step" in job.log(0)

  workdir = tmp_path / "evaluating"
  job = Job(workdir, 2, eval__every=5, eval__batches=10**6)
  job.wait_for(0, "step 5/40")
  time.sleep(1)
  job.processes[1].send_signal(signal.SIGTERM)
  assert job.wait() == [143, 143], job.logs()
  assert checkpoint.steps(workdir) == [5] and "saved step 5" in job.log(0)


# ------------------------------------------------------------------- agreement


def test_a_host_started_differently_stops_the_job(tmp_path):
  job = Job(tmp_path / "run", 2, per_process={1: {"optim__peak_lr": 0.5}})
  assert job.wait() == [1, 1], job.logs()
  for i in range(2):
    assert re.search(
      r"error: .*config\.optim\.peak_lr is 0\.5 on process 1 \(\S+\) and 0\.01 on "
      "process 0",
      job.log(i),
    ), job.log(i)
    assert "Traceback" not in job.log(i)
  assert not checkpoint.steps(tmp_path / "run")


def test_a_mistake_on_one_host_stops_all(tmp_path):
  job = Job(tmp_path / "run", 2, per_process={0: {"data__source": "text:/nowhere/*"}})
  assert job.wait() == [1, 1], job.logs()
  assert "error: process 1 leaves because process 0" in job.log(1)
  assert "/nowhere/*" in job.log(1)


@pytest.mark.slow
def test_a_flipped_bit_in_one_replica_is_caught(tmp_path):
  """By the next check, on all processes, and before a checkpoint holds it."""
  job = Job(
    tmp_path / "run",
    2,
    program=[WORKER, "flip"],
    mesh__data=2,
    mesh__fsdp=2,
    replica_check_every=6,
    checkpoint__every=5,
    eval__every=0,
  )
  assert job.wait() == [42, 42], job.logs()
  for i in range(2):
    assert "copies of params/blocks/0/ffn/in differ" in job.log(i), job.log(i)
  assert "of process 1" in job.log(0)
  assert checkpoint.steps(tmp_path / "run") == [5]
  assert "step 12/" not in job.log(0)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "bucket"])
def test_a_checkpoint_of_four_processes_restores_in_two_and_in_one(place, tmp_path, request):
  """Checksums of what four wrote are compared while restoring."""
  workdir, env = tmp_path / "run", {}
  if place == "bucket":
    workdir, env = request.getfixturevalue("bucket"), request.getfixturevalue("gcs").env
  job = Job(workdir, 4, logs=tmp_path, env=env, steps=2, eval__every=0, eval__batches=1)
  assert job.wait() == [0] * 4, job.logs()
  found = []
  for count in (2, 1) if place == "here" else (2,):
    out = tmp_path / str(count)
    out.mkdir()
    job = Job(workdir, count, logs=tmp_path, env=env, program=[WORKER, "dump", out])
    assert job.wait() == [0] * count, job.logs()
    leaves = {}
    for path in sorted(out.iterdir()):
      for key, value in np.load(path).items():
        assert key not in leaves or leaves[key].tobytes() == value.tobytes()
        leaves[key] = value
    found.append({key: value.tobytes() for key, value in leaves.items()})
  assert all(f == found[0] for f in found) and len(found[0]) > 60
