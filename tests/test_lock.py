"""One training to a workdir: refused, taken over, given back."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import helpers
from helpers import run_program, train_args
import pytest

from matformer_jax import UserError
from matformer_jax.hosts import lock
from matformer_jax.hosts.multihost import Hosts

NEVER = 1800.0  # seconds; a backstop
HOLDER = (
  "import pathlib, sys, time\n"
  "from matformer_jax.hosts import lock, multihost\n"
  "hosts = multihost.Hosts()\n"
  "with lock.hold(pathlib.Path(sys.argv[1]), hosts):\n"
  "  print('held', flush=True)\n"
)


def holder(workdir, then: str) -> subprocess.Popen:
  """A process that holds `workdir` and then runs a line; returned once it holds it."""
  process = subprocess.Popen(
    [sys.executable, "-c", f"{HOLDER}  {then}\n", str(workdir)],
    cwd=helpers.ROOT,
    env=helpers.PROGRAM_ENV,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  return process


def rewrite(path, **changes) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextlib.contextmanager
def left_behind(workdir, **changes):
  """The lock of a process that was killed, changed; gives its path."""
  process = holder(workdir, "time.sleep(1800)")
  process.kill()
  process.communicate()
  rewrite(workdir / lock.LOCK_FILE, **changes)
  yield workdir / lock.LOCK_FILE


def test_a_second_training_is_refused(tmp_path):
  with lock.hold(tmp_path):
    before = sorted(tmp_path.iterdir())
    result = run_program("train", *train_args(tmp_path))
    assert sorted(tmp_path.iterdir()) == before
  assert result.returncode == 1 and "Traceback" not in result.stderr
  (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  assert f"--workdir={tmp_path}" in line and f"process {os.getpid()} on " in line
  assert "since 20" in line and "choose another --workdir" in line
  assert not list(tmp_path.iterdir())


def test_a_killed_training_is_taken_over_at_once(tmp_path, capfd):
  with left_behind(tmp_path) as path, lock.hold(tmp_path, stale_s=NEVER):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  assert "took over" in (told := capfd.readouterr().out) and "waiting" not in told
  assert not list(tmp_path.iterdir())


def test_a_process_not_waited_for_is_dead_and_a_stopped_one_is_not(tmp_path):
  process = holder(tmp_path, "time.sleep(1800)")
  process.send_signal(signal.SIGSTOP)
  with pytest.raises(UserError, match=f"process {process.pid} "), lock.hold(tmp_path):
    pass
  process.kill()
  os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
  with lock.hold(tmp_path, stale_s=NEVER):
    pass
  process.communicate()


def test_another_process_with_the_same_id_is_no_holder(tmp_path):
  with left_behind(tmp_path, pid=os.getpid()), lock.hold(tmp_path, stale_s=NEVER):
    pass


@pytest.mark.parametrize("content", [None, "", "not a lock"])
def test_silent_on_another_machine(content, tmp_path, capfd):
  with left_behind(tmp_path, machine="elsewhere", host="elsewhere") as path:
    if content is not None:
      path.write_text(content)
    with lock.hold(tmp_path, stale_s=0.3):
      pass
  assert "waiting up to 0.3 s" in (told := capfd.readouterr().out) and "took over" in told


def test_alive_on_another_machine(tmp_path, monkeypatch):
  """Its beat shows within the wait, whatever the clocks say."""
  with lock.hold(tmp_path, beat_s=0.05):
    monkeypatch.setattr(lock, "_machine", lambda: "another")
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
      with lock.hold(tmp_path, stale_s=NEVER):
        pass
  monkeypatch.undo()
  with lock.hold(tmp_path):  # given back
    pass


def test_one_of_many_takes_a_stale_lock(tmp_path):
  go, done = threading.Barrier(8), threading.Event()

  def attempt(_):
    go.wait()
    try:
      with lock.hold(tmp_path):
        done.wait()
        return True
    except UserError:
      return False

  with left_behind(tmp_path), concurrent.futures.ThreadPoolExecutor(8) as pool:
    attempts = [pool.submit(attempt, i) for i in range(8)]
    while sum(a.done() for a in attempts) < 7:
      time.sleep(0.01)
    done.set()
  assert sum(a.result() for a in attempts) == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "then,code",
  [
    ("pass", 0),
    ("raise SystemExit(1)", 1),
    ("hosts.leave(143, 'stopped')", 143),
    ("hosts.give_up('hung')", 42),
  ],
)
def test_it_is_given_back_however_the_process_ends(then, code, tmp_path):
  assert holder(tmp_path, then).wait() == code
  assert not list(tmp_path.iterdir())


def test_a_job_gives_it_back_when_its_processes_have_ended(tmp_path, monkeypatch):
  hosts = Hosts()
  monkeypatch.setattr(hosts, "count", 2)
  monkeypatch.setattr(hosts, "barrier", lambda: None)
  with pytest.raises(UserError), lock.hold(tmp_path, hosts):
    raise UserError("diverged")
  assert (tmp_path / lock.LOCK_FILE).exists()
  hosts.before_leaving[0]()
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr(hosts, "index", 1)
  with lock.hold(tmp_path, hosts):
    assert not list(tmp_path.iterdir())  # process 0 holds it for the job


def test_who_lost_the_lock_leaves_it_alone(tmp_path, monkeypatch, capfd):
  hosts, left = Hosts(), threading.Event()
  told = []
  monkeypatch.setattr(hosts, "leave", lambda *args: (told.append(args), left.set()))
  path = tmp_path / lock.LOCK_FILE
  with lock.hold(tmp_path, hosts, beat_s=0.05):
    path.unlink()  # by hand: it comes back
    while not path.exists():
      time.sleep(0.01)
    other = dataclasses.asdict(lock._holder(path.read_bytes())) | {"token": "x", "pid": 77}
    path.unlink()
    while True:
      path.write_text(json.dumps({"beat": "1", **other}))
      if left.wait(0.5):
        break
  assert told[0][0] == 1 and "process 77" in told[0][1] and "error: " in capfd.readouterr().err
  assert json.loads(path.read_text())["pid"] == 77
