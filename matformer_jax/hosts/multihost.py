"""Several processes as one program: joining, agreeing, noticing who is gone, leaving together.

JAX moves the arrays. What it lacks is here: a difference between hosts stops the job
before the first step and names the host; a lost peer is named, and nobody waits for it
in a collective, in a save or at exit for longer than a configured time.

Every process keeps an entry in the key-value store of JAX's coordination service,
which process 0 serves: a beat counter and, once it leaves, its exit code and why.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
import contextlib
import ctypes
import faulthandler
import glob
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from matformer_jax.errors import UserError, first_line
from matformer_jax.runtime import say_here

EXIT_ERROR = 1  # a mistake to fix first
EXIT_RETRY = 42  # a peer or the machine failed: run the same command again
_ENTRY = "matformer/peers/"
_GATHER = "matformer/gather/"


# What the status of a JaxRuntimeError says where the program is at fault, and would be again.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "OUT_OF_RANGE")


class Rounds:
  """The rounds of a loop that watches others, which are not to blame while it stands still.

  Args:
    longest_s: a round that takes longer shows that this process itself was suspended.
    clock: seconds.
  """

  def __init__(self, longest_s: float, clock: Callable[[], float] = time.monotonic):
    self._longest_s, self._clock, self._last = longest_s, clock, clock()

  def suspended(self) -> bool:
    """To be called once a round: whether this process was suspended since the last one."""
    now = self._clock()
    took, self._last = now - self._last, now
    return took > self._longest_s


class Hosts:
  """The processes of a job. With one process every method is trivial.

  Attributes:
    index: this process, 0 to count - 1.
    count: processes in the job.
    timeout_s: how long a silent peer is waited for.
    before_leaving: what to do before this process exits at once, without unwinding its stack.
  """

  def __init__(
    self,
    index: int = 0,
    count: int = 1,
    timeout_s: float = 60.0,
    client=None,
    coordinator: str = "",
  ):
    self.index, self.count, self.timeout_s = index, count, timeout_s
    self._client, self._coordinator = client, coordinator
    self._beat, self._gathers = 0, 0
    self._silent: dict[int, float] = {}  # seconds since each peer's last sign of life
    self._peer_hosts: dict[int, str] = {}
    self._state: dict[str, Any] = {"host": socket.gethostname()}
    self._exit_code: int | None = None
    self.before_leaving: list[Callable[[], None]] = []
    self._leaving = threading.Event()
    self._leaver = threading.Thread(target=self._act_before_leaving, daemon=True)
    self._watching = False
    self._answered = time.monotonic()
    self._publishing = threading.RLock()  # a signal handler may interrupt its holder
    if client is not None:
      self._publish()
      self._abort_handler = _on_abort(self._aborted)
      atexit.register(self._exit)  # runs before JAX's own, which would wait for the others
      self._leaver.start()  # now: at the interpreter's shutdown no thread can be started
      for target in (self._watch, self._watch_coordinator):
        threading.Thread(target=target, daemon=True, name=target.__name__).start()

  @property
  def first(self) -> bool:
    """Whether this is process 0, which writes what is written once."""
    return self.index == 0

  # ----------------------------------------------------------------- agreeing

  def gather(self, value: Any) -> list[Any]:
    """Every process's JSON `value`, by process index; blocks until all have called."""
    if self.count == 1:
      return [value]
    self._gathers += 1
    prefix = f"{_GATHER}{self._gathers}/"
    self._client.key_value_set(prefix + str(self.index), json.dumps(value))
    while True:  # polled, so that signal handlers run
      found = self._client.key_value_dir_get(prefix)
      if len(found) == self.count:
        break
      time.sleep(0.05)
    values = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in found}
    return [values[i] for i in range(self.count)]

  def barrier(self) -> None:
    """Blocks until all processes have called it."""
    self.gather(None)

  def check_equal(self, facts: dict[str, Any]) -> None:
    """Raises UserError, on every process, naming a host and field that differ from process 0.

    From then on a silent process is taken for lost. (Before, one may train a tokenizer for an
    hour, which holds Python's lock.)
    """
    everyone = self.gather({"host": self._state["host"], "facts": facts})
    reference = everyone[0]
    for index, other in enumerate(everyone):
      differing = differences(reference["facts"], other["facts"])
      if differing:
        path, ours, theirs = differing[0]
        more = f" (and {len(differing) - 1} more fields)" if len(differing) > 1 else ""
        raise UserError(
          f"the processes were not started alike: {path} is {theirs!r} on process {index} "
          f"({other['host']}) and {ours!r} on process 0 ({reference['host']}){more}; start all "
          "processes with the same command, code and data"
        )
    self._watching = True

  # ------------------------------------------------------------------ leaving

  @contextlib.contextmanager
  def together(self) -> Iterator[None]:
    """What ends the block in this process ends the job in all of them.

    With EXIT_RETRY where a collective or the coordination service failed, which is what a lost
    peer looks like; else the exception propagates, and the other processes leave with EXIT_ERROR.
    """
    try:
      yield
    except Exception as e:
      peers_failed = self.count > 1 and is_failure_of_peers(e)
      if isinstance(e, (UserError, OSError)) and not peers_failed:
        self._announce(EXIT_ERROR, str(e))
        raise
      if self.count > 1:
        # A collective fails at once where a peer dies; who it was shows in the missing beats.
        say_here(
          f"process {self.index}: {type(e).__name__}: {first_line(e)}; waiting up to "
          f"{self.timeout_s:g} s to see whether a peer is gone"
        )
        time.sleep(self.timeout_s + 3 * self._interval)
        while self._exit_code is not None:  # another thread knows better, and is leaving
          time.sleep(1)
      if peers_failed:
        lost = self._who_is_lost()
        if not lost:
          traceback.print_exc()
        self.give_up(lost or f"a collective failed: {first_line(e)}")
      self._announce(EXIT_ERROR, f"{type(e).__name__}: {first_line(e)}")
      raise

  def finish(self, code: int) -> int:
    """Waits, for a bounded time, until all processes have finished; returns `code`."""
    if self.count > 1:
      self._exit_code = code
      self._publish(code=code, done=True)
      self._linger()
    return code

  def leave(self, code: int, why: str) -> NoReturn:
    """Tells the others and exits at once, from any thread, without any shutdown."""
    self._announce(code, why)
    self._quit(code)

  def give_up(self, why: str) -> NoReturn:
    """Dumps the stacks of all threads and leaves with EXIT_RETRY."""
    self._dump(why)
    self.leave(EXIT_RETRY, why)

  def _announce(self, code: int, why: str) -> None:
    if self.count > 1 and self._exit_code is None:
      self._exit_code = code
      self._publish(code=code, why=why, lost=[i for i in list(self._silent) if self._is_lost(i)])
      self._linger()

  def _linger(self) -> None:
    """Process 0 serves the key-value store: it goes last, if the others come to an end."""
    deadline = time.monotonic() + (self.timeout_s if self.first else 0)
    while time.monotonic() < deadline:
      peers = self._peers()
      lost = {i for entry in (self._state, *peers.values()) for i in entry.get("lost", ())}
      if all("code" in peer or index in lost for index, peer in peers.items()):
        time.sleep(0.3)  # for those that have yet to read this process's entry
        return
      time.sleep(0.1)

  def _exit(self) -> None:
    if self._exit_code is not None:
      self._quit(self._exit_code)

  def _quit(self, code: int) -> NoReturn:
    """Exits at once: the actions of `before_leaving` get a second, as a file system may hang."""
    if self._leaver.ident is None:
      self._leaver.start()
    self._leaving.set()
    self._leaver.join(1.0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _act_before_leaving(self) -> None:
    self._leaving.wait()
    for action in self.before_leaving:
      action()

  # ----------------------------------------------------------------- watching

  @property
  def _interval(self) -> float:
    return min(self.timeout_s / 10, 5.0)

  def _publish(self, **news) -> None:
    with self._publishing:
      self._state.update(news)
      self._beat += 1
      with contextlib.suppress(Exception):  # an unreachable store is _watch_coordinator's matter
        self._client.key_value_set(
          f"{_ENTRY}{self.index}",
          json.dumps({"beat": self._beat, **self._state}),
          allow_overwrite=True,
        )

  def _peers(self) -> dict[int, dict[str, Any]]:
    """The other processes' entries; empty where the store cannot be reached."""
    try:
      found = self._client.key_value_dir_get(_ENTRY)
    except Exception:
      return {}
    self._answered = time.monotonic()
    entries = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in found}
    return {i: entry for i, entry in entries.items() if i != self.index}

  def _watch(self) -> None:
    """Publishes beats; leaves when a peer has left, or has been silent for too long."""
    last_seen: dict[int, tuple[int, float]] = {}
    rounds = Rounds(self.timeout_s / 2)
    while True:
      self._publish()
      peers = self._peers()
      now, suspended = time.monotonic(), rounds.suspended()
      for index, peer in peers.items():
        if peer.get("done"):
          continue
        if self._exit_code is None and "code" in peer:
          self._follow(index, peer)
        beat, since = last_seen.get(index, (0, now))
        if peer["beat"] != beat or suspended:
          beat, since = last_seen[index] = (peer["beat"], now)
        self._silent[index], self._peer_hosts[index] = now - since, peer["host"]
        if self._watching and self._is_lost(index) and self._exit_code is None:
          self.give_up(self._who_is_lost())
      time.sleep(self._interval)

  def _is_lost(self, index: int) -> bool:
    return self._silent.get(index, 0.0) > self.timeout_s

  def _who_is_lost(self) -> str:
    return "; ".join(
      f"lost process {index} ({self._peer_hosts[index]}): no sign of life for "
      f"{self._silent[index]:.0f} s"
      for index in list(self._silent)  # which other threads add to
      if self._is_lost(index)
    )

  def _follow(self, index: int, peer: dict[str, Any]) -> NoReturn:
    time.sleep(0.5)  # so that this process's own failure is reported first
    if self._exit_code is None:
      word = "" if peer["code"] > 128 else "error: "  # a signal is not an error
      say_here(
        f"{word}process {self.index} leaves because process {index} ({peer['host']}) did: "
        f"{peer['why']}"
      )
      if peer["code"] == EXIT_RETRY:
        faulthandler.dump_traceback(all_threads=True)
      self.leave(peer["code"], peer["why"])
    time.sleep(self.timeout_s)
    self._quit(self._exit_code)

  def _watch_coordinator(self) -> None:
    """Leaves when the store has not answered for too long; its calls may hang."""
    rounds = Rounds(self.timeout_s / 2)
    while True:
      time.sleep(self._interval)
      now = time.monotonic()
      if rounds.suspended():
        self._answered = now
      if now - self._answered > self.timeout_s and self._exit_code is None:
        self._give_up_alone(
          f"{self._lost_coordinator()}: no answer for {now - self._answered:.0f} s"
        )

  def _aborted(self) -> None:
    """JAX's client aborts the process when the coordinator goes away, or reports a lost peer."""
    if self._exit_code is not None:
      self._quit(self._exit_code)
    if not _reachable(self._coordinator):
      self._give_up_alone(self._lost_coordinator())
    elif self._who_is_lost():
      self._give_up_alone(self._who_is_lost())

  def _lost_coordinator(self) -> str:
    return f"lost process 0, the coordinator at {self._coordinator}"

  def _give_up_alone(self, why: str) -> NoReturn:
    """As `give_up`, where the other processes cannot be reached."""
    self._dump(why)
    self._quit(EXIT_RETRY)

  def _dump(self, why: str) -> None:
    say_here(
      f"error: process {self.index}: {why}; exit code {EXIT_RETRY}: run the same command "
      "again. Stacks of this process:"
    )
    faulthandler.dump_traceback(all_threads=True)


class Signals:
  """A word from every process to all at every step, as a collective that nobody waits for.

  It says whether a stop was asked for, so that all processes stop after the same step, and
  what the process drew, which must be equal everywhere.
  """

  def __init__(self, hosts: Hosts, mesh: jax.sharding.Mesh):
    self._alone = hosts.count == 1
    self._devices = mesh.devices.flatten()
    self._spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._share = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def send(self, stop: bool, draw: int = 0) -> jax.Array | None:
    """Starts the exchange; all processes must call it. `draw` is a uint32."""
    if self._alone:
      return None
    word = np.array([[stop, draw]], np.uint32)
    shape = (len(self._devices), 2)
    return self._share(jax.make_array_from_callback(shape, self._spread, lambda _: word))

  def read(self, sent: jax.Array | None, step: int) -> bool | None:
    """Whether any process asked to stop; None if there is only one.

    Raises:
      UserError: if the processes drew differently at `step`.
    """
    if sent is None:
      return None
    stops, draws = np.asarray(sent).T
    for device, draw in zip(self._devices, draws):
      if draw != draws[0]:
        raise UserError(
          f"process {device.process_index} drew another granularity at step {step} "
          f"than process {self._devices[0].process_index}; start all processes with "
          "the same code and config"
        )
    return bool(stops.any())

  def any(self, stop: bool) -> bool:
    """Whether any process asks to stop now; waits for all."""
    agreed = self.read(self.send(stop), 0)
    return stop if agreed is None else agreed


# ------------------------------------------------------------------- joining


def join(
  coordinator: str | None, num_processes: int | None, process_id: int | None, timeout_s: float
) -> Hosts:
  """Joins the job this process is part of.

  By the arguments where given (all three); else by what a TPU slice, Slurm or Open MPI
  tells its processes; a lone machine joins nothing. Call it before JAX's first use.

  Args:
    coordinator: host:port of process 0.
    timeout_s: how long a silent peer is waited for.

  Raises:
    UserError: for incomplete or impossible arguments.
  """
  given = {
    "--coordinator": coordinator,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if timeout_s <= 0:
    raise UserError(f"peer_timeout_s={timeout_s} must be positive")
  if len(missing) == 3:
    if processes_around() <= 1:
      return Hosts(timeout_s=timeout_s)
    where: dict[str, Any] = {}
  elif missing:
    raise UserError(
      f"{' and '.join(missing)} missing: --coordinator, --num_processes and "
      "--process_id go together (on TPU slices, Slurm and Open MPI leave all three "
      "out)"
    )
  else:
    assert coordinator is not None and num_processes is not None and process_id is not None
    _check_place(coordinator, num_processes, process_id)
    if num_processes == 1:
      return Hosts(timeout_s=timeout_s)
    where = {
      "coordinator_address": coordinator,
      "num_processes": num_processes,
      "process_id": process_id,
      "cluster_detection_method": "deactivate",
    }
  try:
    # JAX's own check for silent peers aborts the process: ours must come first.
    jax.distributed.initialize(
      **where,
      heartbeat_timeout_seconds=int(3 * timeout_s) + 10,
      shutdown_timeout_seconds=int(timeout_s) + 1,
    )
  except RuntimeError as e:
    say_here(
      f"error: could not join the other processes ({first_line(e)}); are all of them "
      f"started, and is the coordinator {coordinator or ''} reachable? Exit code "
      f"{EXIT_RETRY}: run the same command again"
    )
    os._exit(EXIT_RETRY)
  from jax._src.distributed import global_state  # the store has no public name

  return Hosts(
    global_state.process_id,
    global_state.num_processes,
    timeout_s,
    global_state.client,
    global_state.coordinator_address or "",
  )


def _check_place(coordinator: str, num_processes: int, process_id: int) -> None:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal():
    raise UserError(f"--coordinator={coordinator!r} is not host:port, e.g. 10.0.0.1:8476")
  if num_processes < 1 or not 0 <= process_id < num_processes:
    raise UserError(
      f"--process_id={process_id} with --num_processes={num_processes}: ids run from "
      "0 to num_processes - 1"
    )


def processes_around(env=os.environ) -> int:
  """How many processes the surrounding TPU slice, Slurm step or Open MPI job has; else 1."""
  if "SLURM_STEP_NODELIST" in env:
    return int(env.get("SLURM_NTASKS", 1))
  if "OMPI_COMM_WORLD_SIZE" in env:
    return int(env["OMPI_COMM_WORLD_SIZE"])
  if env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
    return 1
  slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
  workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
  if workers:
    return slices * len(workers.split(","))
  if any(glob.glob(device) for device in ("/dev/accel*", "/dev/vfio/[0-9]*")):
    from jax._src.clusters import GceTpuCluster  # asks the machine's metadata server

    if GceTpuCluster.is_env_present():
      return GceTpuCluster.get_process_count()
  return 1


# ----------------------------------------------------------------- utilities


def is_failure_of_peers(e: BaseException | None) -> bool:
  """Whether an exception, or one that led to it, is what a lost peer or network looks like.

  That is JAX's own error of a collective or of the coordination service, but not where its
  status says that the program itself is at fault: out of memory, say. It may be wrapped: Orbax
  raises others from it.
  """
  while e is not None and not isinstance(e, UserError):
    if isinstance(e, jax.errors.JaxRuntimeError):
      return not str(e).startswith(_OWN_FAULTS)
    if isinstance(e, ConnectionError):
      return True
    e = e.__cause__ or e.__context__
  return False


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
  """(path, old value, new value) of every leaf that differs between two JSON trees."""
  if isinstance(old, dict) and isinstance(new, dict):
    return [
      d
      for key in sorted(old.keys() | new.keys())
      for d in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    ]
  return [] if old == new else [(path, old, new)]


def _reachable(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
      return True
  except OSError:
    return False


def _on_abort(handler):
  """Calls `handler` when a thread of this process, of whatever language, aborts.

  Python's own signal handlers run later, on the main thread; an abort does not wait.

  Returns:
    An object to keep while the handler is wanted.
  """
  function_type = ctypes.CFUNCTYPE(None, ctypes.c_int)

  @function_type
  def handle(signum):
    handler()  # where it returns, the abort continues

  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, function_type]
  libc.signal.restype = ctypes.c_void_p
  libc.signal(int(signal.SIGABRT), handle)
  return handle
