"""One run to a workdir: the file that says who trains there, and how to tell whether it still does.

The file is made with O_EXCL, moved away with rename and refreshed in place, which holds on
network file systems without flock. A bucket has the first of these alone; there who takes over
looks again after a while, and a holder that finds another's lock leaves. A holder on this machine
is looked up by its process id; one elsewhere shows in its beat, which is watched for a change: no
two clocks are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import pathlib
import socket
import threading
import time
import uuid

from matformer_jax import storage
from matformer_jax.errors import UserError
from matformer_jax.hosts.multihost import EXIT_ERROR, EXIT_RETRY, Hosts, Rounds
from matformer_jax.runtime import say, say_here

LOCK_FILE = "train.lock"
BEAT_S = 10.0  # between two signs of life of a holder
LOST_S = 300.0  # without a beat that got through to a bucket, after which a job leaves
SETTLE_S = 2.0  # after which two who took over a bucket's lock at once see which of them has it
STALE_S = 60.0  # without one, after which a holder on another machine is taken for dead


@dataclasses.dataclass(frozen=True)
class _Holder:
  """Who holds a lock: `machine` and `started` tell apart what host and pid alone do not."""

  host: str
  pid: int
  since: float  # unix time
  machine: str
  started: int | None  # clock ticks after boot
  token: str

  def __str__(self) -> str:
    since = datetime.datetime.fromtimestamp(self.since, datetime.UTC)
    return f"process {self.pid} on {self.host}, since {since:%Y-%m-%d %H:%M:%S} UTC"


@contextlib.contextmanager
def hold(
  workdir: storage.Path,
  hosts: Hosts = Hosts(),
  beat_s: float = BEAT_S,
  stale_s: float = STALE_S,
  flag: str = "--workdir",
  lost_s: float = LOST_S,
) -> Iterator[None]:
  """Holds `workdir` for one job: its process 0 takes the lock, the others wait for that.

  Args:
    workdir: an existing directory.
    hosts: the job. It leaves with EXIT_ERROR if another job takes the lock over.
    beat_s: seconds between beats.
    stale_s: seconds without a beat, after which a holder on another machine counts as dead.
    flag: that gave `workdir`, for errors.
    lost_s: seconds in which a bucket takes no beat, after which the job leaves with EXIT_RETRY: a
      save may wait for it much longer, and the lock may be another's by then.

  Raises:
    UserError: naming the host, process id and start of another job that is alive.
    OSError: if the lock cannot be written.
  """
  kind = _ObjectLock if storage.is_bucket(workdir) else _Lock
  lock = kind(workdir / LOCK_FILE, hosts, beat_s, stale_s, flag, lost_s)
  hosts.before_leaving.append(lock.release)
  failed = False
  try:
    if hosts.first:
      lock.acquire()
    hosts.barrier()
    yield
  except Exception:
    failed = True
    raise
  finally:
    # A job that failed may still be saving in other processes: it leaves, and gives it back then.
    if hosts.count == 1 or not failed:
      lock.release()


class _Lock:
  """In a file of a file system."""

  def __init__(
    self,
    path: storage.Path,
    hosts: Hosts,
    beat_s: float,
    stale_s: float,
    flag: str,
    lost_s: float = math.inf,
  ):
    self._path, self._hosts, self._flag = path, hosts, flag
    self._lost_s = lost_s if storage.is_bucket(path) else math.inf
    self._beat_s, self._stale_s = beat_s, stale_s
    pid = os.getpid()
    self._me = _Holder(
      socket.gethostname(), pid, time.time(), _machine(), _started(pid), uuid.uuid4().hex
    )
    self._beats = 0
    self._released = threading.Event()

  def acquire(self) -> None:
    while not self._create():
      found = self._read()
      if found is not None:
        self._take_over(found)
    threading.Thread(target=self._keep, daemon=True, name="lock").start()

  def release(self) -> None:
    self._released.set()
    with contextlib.suppress(OSError), storage.refusals_ignored():
      if _holder(self._read()) == self._me:
        self._path.unlink()

  def _take_over(self, found: bytes) -> None:
    """Returns once the lock `found` is out of the way. Raises UserError if its holder lives."""
    holder = _holder(found)
    alive = _is_alive(holder) if holder else None
    if alive is None:
      last = self._watch(found)
      alive, holder = last != found, _holder(last) or holder
      if last is None:
        return  # given back meanwhile
    if alive:
      raise self._refusal(holder)
    if self._remove(found):
      say(f"note: took over {self._path} of {holder or 'an unknown process'}, which is gone")

  def _remove(self, found: bytes) -> bool:
    """Takes the lock `found` away; returns whether this process did, and not a faster one."""
    with self._alone():
      if self._read() != found:
        return False
      aside = self._path.with_name(f".{LOCK_FILE}.{self._me.token}")
      try:
        self._path.rename(aside)
        moved = aside.read_bytes()
        aside.unlink()
      except FileNotFoundError:
        return False
      if moved != found:  # only where the file system has no locks
        self._create(moved)
        raise self._refusal(_holder(moved))
    return True

  @contextlib.contextmanager
  def _alone(self):
    """One taker-over at a time, of this machine at least; no guard where flock is not supported."""
    directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
      with contextlib.suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_EX)
      yield
    finally:
      os.close(directory)

  def _watch(self, found: bytes) -> bytes | None:
    """The lock's content once it has changed, or after `stale_s`; None where it is gone."""
    say(
      f"{self._path} is held by {_holder(found) or 'an unknown process'}; waiting up to "
      f"{self._stale_s:g} s to see whether it is alive"
    )
    rounds, since = Rounds(self._stale_s / 2), time.monotonic()
    while time.monotonic() - since <= self._stale_s:
      if (now := self._read()) != found:
        return now
      time.sleep(min(1.0, self._stale_s / 10))
      if rounds.suspended():
        since = time.monotonic()
    return found

  def _refusal(self, holder: _Holder | None) -> UserError:
    return UserError(
      f"{self._flag}={self._path.parent} is in use by another job: {holder or 'unknown'}; stop "
      f"that one or choose another {self._flag} (remove {self._path} if you know that it is gone)"
    )

  def _keep(self) -> None:
    """Beats, until released; a job whose lock is another's by now must not write there."""
    last = time.monotonic()
    while not self._released.wait(self._beat_s):
      with (
        contextlib.suppress(OSError),
        storage.refusals_ignored(),
      ):  # a full disk, say: the next beat may get through
        other = self._beat()
        last = time.monotonic()
        if other is not None and not self._released.is_set():
          why = (
            f"another job took over {self._flag}={self._path.parent}: {other}; it saw no sign "
            f"of life of this one for {self._stale_s:g} s. Nothing that was saved is lost"
          )
          say_here(f"error: {why}")
          self._hosts.leave(EXIT_ERROR, why)
      if time.monotonic() - last > self._lost_s and not self._released.is_set():
        why = (
          f"{self._path.parent} could not be written for {self._lost_s:g} s; what was saved before "
          "is intact: run the same command again once it can be reached"
        )
        say_here(f"error: {why}")
        self._hosts.leave(EXIT_RETRY, why)

  def _beat(self) -> _Holder | None:
    """Shows that this process lives; returns who else holds the lock."""
    self._beats += 1
    try:
      with open(self._path, "rb+", buffering=0) as f:
        found = _holder(f.read())
        if found != self._me:
          return found
        f.seek(0)
        f.write(self._content())
    except FileNotFoundError:  # removed by hand
      if not self._released.is_set():
        self._create()
    return None

  def _content(self) -> bytes:
    # Always of one length, so that it can be written over in place.
    return json.dumps({"beat": f"{self._beats:010d}", **dataclasses.asdict(self._me)}).encode()

  def _create(self, content: bytes | None = None) -> bool:
    """Whether the lock is made, with `content` or this process's own; False if there is one."""
    return storage.create_file(self._path, content or self._content())

  def _read(self) -> bytes | None:
    try:
      return self._path.read_bytes()
    except FileNotFoundError:
      return None


class _ObjectLock(_Lock):
  """In an object of a bucket, which can be made where there is none, and written over."""

  def _remove(self, found: bytes) -> bool:
    if self._read() != found:
      return False
    storage.replace_file(self._path, self._content())
    time.sleep(SETTLE_S)
    if (now := _holder(self._read())) != self._me:
      raise self._refusal(now)
    return True

  def _create(self, content: bytes | None = None) -> bool:
    # The answer to a request that was carried out may be lost; a second one finds its own lock.
    return super()._create(content) or _holder(self._read()) == self._me

  def _beat(self) -> _Holder | None:
    self._beats += 1
    found = self._read()
    if found is None:  # removed by hand
      if not self._released.is_set():
        self._create()
      return None
    holder = _holder(found)
    if holder != self._me:
      return holder
    if not self._released.is_set():
      storage.replace_file(self._path, self._content())
    return None


def _holder(content: bytes | None) -> _Holder | None:
  """None for a lock that does not say: made a moment ago, or by a process that died just then."""
  try:
    entries = json.loads(content or b"")
    entries.pop("beat")
    return _Holder(**entries)
  except (ValueError, TypeError, KeyError, AttributeError):
    return None


def _is_alive(holder: _Holder) -> bool | None:
  """Whether the holder's process runs; None where this machine cannot tell."""
  if holder.machine != _machine():
    return None
  try:
    os.kill(holder.pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass  # another user's
  started = _started(holder.pid)
  if started is None and holder.started is not None:
    return None
  return started == holder.started  # else the pid is another process's by now


def _machine() -> str:
  """What process ids are unique in: this boot of this machine, and this container."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return socket.gethostname()


def _started(pid: int) -> int | None:
  """When a process started, in clock ticks after boot; None where the system does not tell.

  A process that has ended and was not waited for yet has not started: 0.
  """
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return 0 if fields[0] in "ZX" else int(fields[19])
  except (OSError, ValueError, IndexError):
    return None
