"""Where time goes, what hangs, who is around: ledger, prefetch, watchdog, joining."""

import itertools
import json
import subprocess
import sys
import threading
import time

import helpers
from helpers import ONE_SIZE, ONE_WIDTH, run_program, train_args
import jax
import numpy as np
import pytest

from matformer_jax import UserError, sharding
from matformer_jax import train as train_program
from matformer_jax.checkpoints import replicas
from matformer_jax.data.prefetch import Prefetcher
from matformer_jax.hosts import goodput, multihost
from matformer_jax.hosts.watchdog import Watchdog

# ---------------------------------------------------------------------- ledger


def test_phases_add_up_to_the_wall_clock(tmp_path):
  clock = [1000.0]
  path = tmp_path / goodput.GOODPUT_FILE

  def begin(**kwargs):
    return goodput.Ledger(path, clock=lambda: clock[0], started=clock[0] - 7, **kwargs)

  def spend(ledger, phase, seconds):
    with ledger.phase(phase):
      clock[0] += seconds

  first = begin()
  first.enter("step")
  clock[0] += 50
  spend(first, "data", 2)
  spend(first, "checkpoint", 3)
  first.save()
  clock[0] += 100  # killed here; 20 s of its steps were not saved
  second = begin(steps_lost_s=20)
  second.enter("step")
  clock[0] += 10
  totals = second.totals()
  assert totals == {
    "start-up": 14,
    "compile": 0,
    "data": 2,
    "step": 40,
    "evaluation": 0,
    "checkpoint": 3,
    "lost": 20,
    "down": 93,
  }
  assert sum(totals.values()) == clock[0] - 993
  assert "goodput 23.3% over 2 starts" in second.report()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
  """(workdir, result, unix time before and after) of a run that traces some steps."""
  workdir = tmp_path_factory.mktemp("profiled")
  before = time.time()
  args = train_args(workdir, steps=12, eval__batches=1, sampling=ONE_SIZE)
  result = run_program("train", *args, "--profile=4:7")
  return workdir, result, before, time.time()


def test_a_run_accounts_for_its_time(profiled):
  workdir, result, before, after = profiled
  assert result.returncode == 0 and "goodput" in result.stdout and "wall-clock" in result.stdout
  (attempt,) = json.loads((workdir / goodput.GOODPUT_FILE).read_text())
  seconds = attempt["seconds"]
  assert sum(seconds.values()) == pytest.approx(attempt["ended"] - attempt["started"], rel=0.01)
  # From before the program's first line until all it wrote was written. The kernel's clock ticks.
  written = max(p.stat().st_mtime for p in (workdir / "checkpoints").iterdir())
  first_write = min(p.stat().st_mtime for p in workdir.iterdir())
  assert before - 0.1 <= attempt["started"] < first_write
  assert written - 0.1 <= attempt["ended"] <= after
  assert all(
    seconds[k] > 0 for k in ("start-up", "compile", "data", "step", "evaluation", "checkpoint")
  )
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert all(r["data_wait_s"] >= 0 for r in rows)


# -------------------------------------------------------------------- prefetch


def test_batches_come_in_order_and_ahead():
  loaded = []
  batches = Prefetcher((loaded.append(step) or step for step in range(5, 21)), depth=3)
  while len(loaded) < 4:
    time.sleep(0.01)
  time.sleep(0.1)  # in which a reader that did not wait would go on
  assert loaded == [5, 6, 7, 8]  # three are ready, one waits to be put
  assert [batches.next() for _ in range(16)] == list(range(5, 21))
  batches.close()


def test_a_failing_read_is_raised_where_the_batch_is_needed():
  def load(step):
    if step == 2:
      raise UserError("disk gone")
    return step

  batches = Prefetcher(map(load, range(6)))
  assert [batches.next(), batches.next()] == [0, 1]
  with pytest.raises(UserError, match="disk gone"):
    batches.next()


def test_closing_stops_reading():
  loaded = []
  batches = Prefetcher(map(loaded.append, itertools.count()), depth=1)
  batches.next()
  batches.close()
  count = len(loaded)
  time.sleep(0.2)
  assert len(loaded) == count <= 4
  assert not [t for t in threading.enumerate() if t.name == "prefetch"]


# --------------------------------------------------------------- hangs, profile


class Given(Exception):
  """In place of the end of the process."""


def test_a_hang_is_told_from_slow_steps_and_from_a_suspended_process(monkeypatch):
  clock, hosts = [0.0], multihost.Hosts()

  def give_up(why):
    raise Given(why)

  monkeypatch.setattr(hosts, "give_up", give_up)
  dog = Watchdog(10, hosts, lambda: clock[0])
  for step in range(8):  # longer than the timeout in all
    dog.alive(f"step {step}")
    for _ in range(2):
      clock[0] += 4
      dog.check()
  clock[0] += 1000  # suspended
  dog.check()
  clock[0] += 4
  dog.check()
  clock[0] += 4
  dog.check()
  clock[0] += 4
  with pytest.raises(Given, match="nothing finished for 12 s after step 7 .hang_timeout_s=10"):
    dog.check()


def test_a_hang_is_left_with_stacks():
  program = (
    "import time\n"
    "from matformer_jax.hosts.multihost import Hosts\n"
    "from matformer_jax.hosts.watchdog import Watchdog\n"
    "with Watchdog(0.5, Hosts()) as dog:\n"
    "  dog.alive('step 7')\n"
    "  time.sleep(1800)\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", program],
    cwd=helpers.ROOT,
    timeout=helpers.BACKSTOP_S,
    env=helpers.PROGRAM_ENV,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 42
  assert "after step 7" in result.stderr and "hang_timeout_s=0.5" in result.stderr
  assert 'File "<string>", line 6' in result.stderr  # where it hangs


def test_a_profile_of_some_steps(profiled):
  workdir, result, *_ = profiled
  assert result.returncode == 0 and "wrote a profile of steps 4 to 6" in result.stdout, (
    result.stderr
  )
  assert list((workdir / "profile").rglob("*.xplane.pb"))


def test_a_profile_of_a_run_that_stops_and_resumes_within_it(tmp_path):
  for steps, traced in ((3, "2 to 3"), (5, "4 to 5")):
    args = train_args(tmp_path, eval__every=0, eval__batches=1, steps=steps, **ONE_WIDTH)
    result = run_program("train", *args, "--profile=2:50")
    assert result.returncode == 0, result.stderr
    assert f"wrote a profile of steps {traced}" in result.stdout


def test_profile_mistakes():
  assert train_program._parse_profile("4:7") == range(4, 7)
  with pytest.raises(UserError, match="--profile='7' is not FIRST:LAST"):
    train_program._parse_profile("7")


# --------------------------------------------------------------------- joining


@pytest.mark.parametrize(
  "env,count",
  [
    ({}, 1),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, 1),  # inside salloc, not a step of srun
    ({"SLURM_STEP_NODELIST": "n[1-8]", "SLURM_NTASKS": "8"}, 8),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, 6),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, 1),
  ],
)
def test_how_many_processes_are_around(env, count):
  assert multihost.processes_around(env) == count


@pytest.mark.parametrize(
  "args,words",
  [
    (("h:1", None, None), "--num_processes and --process_id missing"),
    (("nowhere", 2, 0), "'nowhere' is not host:port"),
    (("h:1", 2, 2), "--process_id=2 with --num_processes=2"),
  ],
)
def test_joining_mistakes(args, words):
  with pytest.raises(UserError, match=words):
    multihost.join(*args, timeout_s=1)


def test_a_lone_process_agrees_with_itself():
  hosts = multihost.join(None, None, None, 60)
  assert hosts.first and hosts.count == 1 and hosts.gather(3) == [3]
  hosts.check_equal({"a": 1})
  assert hosts.finish(0) == 0
  signals = multihost.Signals(hosts, sharding.make_mesh({"data": 8}))
  assert (
    signals.read(signals.send(True), 1) is None and signals.any(True) and not signals.any(False)
  )


def test_processes_that_draw_differently_are_stopped():
  mesh = sharding.make_mesh({"data": 8})
  signals = multihost.Signals(multihost.Hosts(count=2), mesh)
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  told = lambda *draws: jax.device_put(np.array([[0, d] for d in draws], np.uint32), place)
  assert signals.read(told(*[5] * 8), 7) is False
  with pytest.raises(UserError, match="drew another granularity at step 7"):
    signals.read(told(5, 5, 5, 5, 6, 6, 6, 6), 7)


class Store:
  """The coordination service's key-value store, of a job whose other process says nothing."""

  def __init__(self):
    self.entries = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    self.entries[key] = json.loads(value)

  def key_value_dir_get(self, prefix):
    return [(k, json.dumps(v)) for k, v in self.entries.items()]


def caused(error: Exception, cause: Exception) -> Exception:
  error.__cause__ = cause
  return error


GLOO = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")


@pytest.mark.parametrize(
  "error,code",
  [
    (GLOO, 42),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses"), 42),
    (caused(TimeoutError("a barrier of Orbax"), GLOO), 42),
    (caused(ValueError("an asynchronous save failed"), GLOO), 42),
    (ConnectionResetError(104, "Connection reset by peer"), 42),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte"), 1),
    (TypeError("a bug"), 1),
    (ValueError("a bug"), 1),
    (UserError("a mistake"), 1),
    (caused(UserError("a mistake"), GLOO), 1),
    (OSError(28, "No space left on device"), 1),
  ],
)
@pytest.mark.parametrize("lost", [False, True])
def test_what_a_failed_block_ends_with(error, code, lost, monkeypatch, capfd):
  hosts = multihost.Hosts(timeout_s=0.01)
  store, given = Store(), []

  def quit_(code):
    given.append(code)
    raise Given

  monkeypatch.setattr(hosts, "count", 2)
  monkeypatch.setattr(hosts, "_client", store)
  monkeypatch.setattr(hosts, "_quit", quit_)
  if lost:
    hosts._silent[1], hosts._peer_hosts[1] = 99.0, "node7"
  with pytest.raises(type(error) if code == 1 else Given) as raised, hosts.together():
    raise error
  (entry,) = store.entries.values()
  assert entry["code"] == code
  told = capfd.readouterr().err
  if code == 1:
    assert raised.value is error and not given and str(error) in entry["why"]
  else:
    assert given == [42] and ("lost process 1 (node7)" in told) == lost
    assert ("Traceback" in told) != lost  # a lost peer says it all
    assert entry["why"] in told


def test_a_lone_process_has_no_peers_to_blame():
  with pytest.raises(jax.errors.JaxRuntimeError), multihost.Hosts().together():
    raise GLOO


def test_what_differs_is_named():
  old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
  assert multihost.differences(old, {"a": {"b": 1, "c": [1, 3]}, "e": 2}) == [
    ("a.c", [1, 2], [1, 3]),
    ("e", None, 2),
  ]


# -------------------------------------------------------------------- replicas


@pytest.mark.parametrize(
  "mesh,spec",
  [
    (dict(data=8), ()),
    (dict(data=2, fsdp=4), (None, "fsdp")),
    (dict(data=2, fsdp=2, tensor=2), ("tensor", "fsdp")),
  ],
)
def test_one_odd_copy_among_devices_is_found(mesh, spec):
  mesh = sharding.make_mesh(mesh)
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  good = jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8), place)
  replicas.check({"w": good}, mesh)
  shards = [np.array(s.data) for s in good.addressable_shards]
  shards[5].view(np.uint32).flat[1] ^= 1
  bad = jax.make_array_from_single_device_arrays(
    good.shape,
    place,
    [jax.device_put(x, s.device) for x, s in zip(shards, good.addressable_shards)],
  )
  # With two copies nobody knows which is right: either may be named.
  with pytest.raises(replicas.ReplicasDiffer, match="copies of w differ between devices: device"):
    replicas.check({"v": good, "w": bad}, mesh)
