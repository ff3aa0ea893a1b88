"""Where time goes, what hangs, who is around: ledger, prefetch, watchdog, joining."""

import itertools
import json
import subprocess
import sys
import threading
import time

import conftest
from conftest import ONE_SIZE, run_program, train_args
import jax
import numpy as np
import pytest

from matformer_jax import UserError, sharding
from matformer_jax.checkpoints import replicas
from matformer_jax.data.prefetch import Prefetcher
from matformer_jax.hosts import goodput, multihost

# ---------------------------------------------------------------------- ledger


def test_phases_add_up_to_the_wall_clock(tmp_path, monkeypatch):
  clock = [1000.0]
  monkeypatch.setattr(goodput.time, "time", lambda: clock[0])
  monkeypatch.setattr(goodput, "process_start", lambda: clock[0] - 7)
  path = tmp_path / goodput.GOODPUT_FILE

  def spend(ledger, phase, seconds):
    with ledger.phase(phase):
      clock[0] += seconds

  first = goodput.Ledger(path)
  first.enter("step")
  clock[0] += 50
  spend(first, "data", 2)
  spend(first, "checkpoint", 3)
  first.save()
  clock[0] += 100  # killed here; 20 s of its steps were not saved
  second = goodput.Ledger(path, steps_lost_s=20)
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


def test_a_run_accounts_for_its_time(tmp_path):
  started = time.time()
  result = run_program("train", *train_args(tmp_path, steps=30, sampling=ONE_SIZE))
  wall = time.time() - started
  assert result.returncode == 0 and "goodput" in result.stdout and "wall-clock" in result.stdout
  (attempt,) = json.loads((tmp_path / goodput.GOODPUT_FILE).read_text())
  seconds = attempt["seconds"]
  # The sum is this process's life; leaving Python takes what little is missing.
  assert sum(seconds.values()) == pytest.approx(attempt["ended"] - attempt["started"], rel=0.01)
  assert sum(seconds.values()) == pytest.approx(wall, abs=1.5, rel=0.05)
  assert all(
    seconds[k] > 0 for k in ("start-up", "compile", "data", "step", "evaluation", "checkpoint")
  )
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert all(r["data_wait_s"] >= 0 for r in rows)


# -------------------------------------------------------------------- prefetch


def test_batches_come_in_order_and_ahead():
  loaded = []
  batches = Prefetcher((loaded.append(step) or step for step in range(5, 21)), depth=3)
  time.sleep(0.3)
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


def test_a_hang_is_left_with_stacks():
  program = (
    "import time\n"
    "from matformer_jax.hosts.multihost import Hosts\n"
    "from matformer_jax.hosts.watchdog import Watchdog\n"
    "with Watchdog(1.0, Hosts()) as dog:\n"
    "  for i in range(8):\n"
    "    time.sleep(0.3); dog.alive(f'step {i}')\n"  # longer than the timeout in all
    "  print('alive so far', flush=True)\n"
    "  time.sleep(60)\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", program],
    cwd=conftest.ROOT,
    timeout=60,
    env=conftest.PROGRAM_ENV,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 42 and "alive so far" in result.stdout
  assert "after step 7" in result.stderr and "hang_timeout_s=1" in result.stderr
  assert 'File "<string>", line 8' in result.stderr  # where it hangs


def test_a_profile_of_some_steps(tiny_run, tmp_path):
  args = train_args(tmp_path, steps=12, eval__every=0, eval__batches=1, sampling=ONE_SIZE)
  result = run_program("train", *args, "--profile=4:7")
  assert result.returncode == 0 and "wrote a profile of steps 4 to 6" in result.stdout, (
    result.stderr
  )
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  result = run_program("train", *args, "--profile=7")
  assert result.returncode == 1 and "--profile='7' is not FIRST:LAST" in result.stderr


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
