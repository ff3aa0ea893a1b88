"""Directories of this machine and of buckets, by one kind of path.

Paths of this machine are `pathlib`'s, as users and tests know them; `gs://` and `s3://` are
`etils.epath`'s, which has the same methods and which Orbax takes. What a bucket lacks is done here:

  rename    `move` copies and deletes; what must appear at once is one object, written last
  append    a `Staging` directory of this machine, copied to the bucket at every checkpoint
  lock      `create_file` makes an object only where there is none
  listing   never cached, since other processes write there too
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import glob
import os
import pathlib
import shutil
import tempfile
import traceback
from typing import Any

# TensorFlow, where it is installed, would reach gs:// by itself, with other errors and settings.
os.environ.setdefault("EPATH_USE_TF", "0")

from etils import epath
from etils.epath import backend
import fsspec.config
import jax

from matformer_jax.errors import UserError, first_line, import_extra

Path = pathlib.Path | epath.Path
SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}  # and the package behind each
_EXTRAS = {"gs": "gcs", "s3": "s3"}
_BLOCK = 2**20

for _protocol in ("gcs", "gs", "s3"):
  fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


def path(text: str | os.PathLike) -> Path:
  """A path of this machine, with ~ expanded, or in a bucket.

  Raises:
    UserError: for a scheme that is not supported, a bucket's name that is missing, or a package
      that is not installed.
  """
  text = os.fspath(text)
  scheme, separator, rest = text.partition("://")
  if not separator or "/" in scheme:
    return pathlib.Path(text).expanduser()
  if scheme not in SCHEMES:
    known = " and ".join(f"{name}://" for name in SCHEMES)
    raise UserError(f"{text!r}: paths are of this machine, or begin with {known}")
  if not rest.partition("/")[0]:
    raise UserError(f"{text!r} names no bucket; give {scheme}://BUCKET/PATH")
  import_extra(SCHEMES[scheme], text, _EXTRAS[scheme])
  return epath.Path(text)


def local(text: str | os.PathLike, name: str) -> pathlib.Path:
  """A path of this machine, with ~ expanded. Raises UserError for any other."""
  if is_bucket(text):
    raise UserError(f"{name}={os.fspath(text)} must be of this machine, and not in a bucket")
  return pathlib.Path(path(text))


def is_bucket(path: str | os.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return os.fspath(path).partition("://")[0] in SCHEMES


def absolute(path: Path) -> Path:
  """As seen from any directory; symbolic links are followed."""
  return path if isinstance(path, epath.Path) else path.resolve()


# -------------------------------------------------------------------- one file


def replace_file(path: Path, content: bytes) -> None:
  """Writes a file at once: others see the old content or the new."""
  if isinstance(path, epath.Path):
    _filesystem(path).pipe_file(os.fspath(path), content)
    return
  temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
  temporary.write_bytes(content)
  temporary.rename(path)


def create_file(path: Path, content: bytes) -> bool:
  """Writes a file where there is none, of all who try one; returns whether that was this one."""
  try:
    if isinstance(path, epath.Path):
      _filesystem(path).pipe_file(os.fspath(path), content, mode="create")
      return True
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
  except FileExistsError:
    return False
  with open(file, "wb", buffering=0) as f:
    f.write(content)
  return True


def read_range(path: Path, start: int, stop: int) -> bytes:
  """Bytes `start` to `stop` of a file."""
  if isinstance(path, epath.Path):
    return _filesystem(path).cat_file(os.fspath(path), start=start, end=stop)
  with open(path, "rb") as f:
    f.seek(start)
    return f.read(stop - start)


def read_ranges(ranges: list[tuple[Path, int, int]]) -> list[bytes]:
  """Ranges of bytes (file, start, stop) of one place, of a bucket all at a time."""
  if not any(isinstance(path, epath.Path) for path, _, _ in ranges):
    return [read_range(*one) for one in ranges]
  paths, starts, stops = map(list, zip(*ranges))
  names = list(map(os.fspath, paths))
  return _filesystem(paths[0]).cat_ranges(names, starts, stops, on_error="raise")


def size(path: Path) -> int:
  """Bytes of a file. Raises FileNotFoundError."""
  return version(path)[0]


def version(path: Path) -> tuple[int, Any]:
  """Bytes of a file, and what changes when it is written. Raises FileNotFoundError."""
  if isinstance(path, epath.Path):
    return _version(_filesystem(path).info(os.fspath(path)))
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns


def _version(info: dict[str, Any]) -> tuple[int, Any]:
  known = (info.get(key) for key in ("generation", "ETag", "etag", "updated"))
  return int(info["size"]), next((str(v) for v in known if v), None)


def blocks(path: Path) -> Iterator[bytes]:
  """A file's content, a MiB at a time."""
  with path.open("rb") as f:
    while block := f.read(_BLOCK):
      yield block


def copy_file(source: Path, target: Path) -> None:
  """Copies a file."""
  if not is_bucket(source) and not is_bucket(target):
    shutil.copyfile(source, target)
    return
  with target.open("wb") as f:
    for block in blocks(source):
      f.write(block)


# ----------------------------------------------------------------- directories


def sizes(path: Path) -> dict[Path, int]:
  """Bytes of a file, or of all files under a directory, in any depth, sorted; {} of nothing."""
  if isinstance(path, epath.Path):
    found = _filesystem(path).find(os.fspath(path), detail=True)
    return {_in_bucket(path, name): int(found[name]["size"]) for name in sorted(found)}
  found = [path] if path.is_file() else sorted(path.rglob("*"))
  return {p: p.stat().st_size for p in found if p.is_file()}


def files(path: Path) -> list[Path]:
  """A file, or all files under a directory, in any depth, sorted."""
  return list(sizes(path))


def matching(pattern: str) -> dict[Path, tuple[int, Any]]:
  """Files whose paths match a pattern, ** for any directories, sorted, with their `version`s.

  Raises:
    UserError: as `path`.
  """
  if not is_bucket(pattern):
    names = glob.glob(os.path.expanduser(pattern), recursive=True)
    found = sorted(pathlib.Path(name) for name in names if os.path.isfile(name))
    return {path: version(path) for path in found}
  root = path(pattern)
  infos = _filesystem(root).glob(pattern, detail=True)
  files = sorted(name for name, info in infos.items() if info["type"] == "file")
  return {_in_bucket(root, name): _version(infos[name]) for name in files}


def _in_bucket(directory: Path, name: str) -> Path:
  """fsspec's name of an object, which has no scheme, as a path."""
  return epath.Path(f"{os.fspath(directory).partition('://')[0]}://{name}")


def move(source: Path, target: Path) -> None:
  """Moves a file or directory; in a bucket each object is copied before all are deleted."""
  if not is_bucket(source):
    source.rename(target)
    return
  filesystem = _filesystem(source)
  found = files(source)
  for file in found:
    inside = os.fspath(file)[len(os.fspath(source)) :]
    filesystem.copy(os.fspath(file), os.fspath(target) + inside)
  for file in found:
    filesystem.rm_file(os.fspath(file))


def remove(directory: Path) -> None:
  """Deletes a directory with all it holds; nothing where there is none."""
  if not isinstance(directory, epath.Path):
    shutil.rmtree(directory, ignore_errors=True)
  elif directory.exists():
    directory.rmtree()


class Staging:
  """A directory of this machine for files that grow; of a bucket, a copy that `sync` brings there.

  Attributes:
    directory: what it stands for.
    local: where to write: `directory` itself, where that is of this machine.
  """

  def __init__(self, directory: Path):
    self.directory, self._sent = directory, {}
    self._temporary = None
    if is_bucket(directory):
      self._temporary = tempfile.TemporaryDirectory(prefix="matformer-")
      self.local = pathlib.Path(self._temporary.name)
    else:
      self.local = pathlib.Path(directory)

  def fetch(self, name: str) -> pathlib.Path:
    """The local path of a file, with the content that it has in the directory, if any."""
    path = self.local / name
    if self._temporary is not None:
      with contextlib.suppress(FileNotFoundError):
        path.write_bytes((self.directory / name).read_bytes())
    return path

  def sync(self) -> None:
    """Copies what has changed since the last time."""
    if self._temporary is None:
      return
    for file in files(self.local):
      state = version(file)
      if self._sent.get(file) != state:
        inside = file.relative_to(self.local).as_posix()
        replace_file(self.directory / inside, file.read_bytes())
        self._sent[file] = state


@contextlib.contextmanager
def local_directory(directory: Path) -> Iterator[pathlib.Path]:
  """A directory to write results into, which exists; copied to a bucket once all are written."""
  staging = Staging(directory)
  staging.local.mkdir(parents=True, exist_ok=True)
  yield staging.local
  staging.sync()


@contextlib.contextmanager
def written_aside(out: Path) -> Iterator[pathlib.Path]:
  """Where to write a new file or directory of this machine, which becomes `out` once it is whole.

  In a bucket its objects appear one by one.

  Args:
    out: does not exist yet, or is an empty directory.
  """
  if isinstance(out, epath.Path):
    with tempfile.TemporaryDirectory(prefix="matformer-") as parent:
      temporary = pathlib.Path(parent) / out.name
      yield temporary
      for file in files(temporary):
        copy_file(file, out / file.relative_to(temporary))
    return
  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
  try:
    yield temporary
    if out.is_dir():
      out.rmdir()
    temporary.rename(out)
  finally:
    remove(temporary)
    temporary.unlink(missing_ok=True)


def local_copy(path: Path) -> pathlib.Path:
  """A file or directory on this machine: itself, or one of a bucket until this process ends."""
  if not isinstance(path, epath.Path):
    return pathlib.Path(path)
  directory = tempfile.TemporaryDirectory(prefix="matformer-")
  _COPIES.append(directory)
  target = pathlib.Path(directory.name) / path.name
  for file in files(path):
    inside = os.fspath(file)[len(os.fspath(path)) :].lstrip("/")
    (target / inside).parent.mkdir(parents=True, exist_ok=True)
    copy_file(file, target / inside)
  return target


_COPIES: list[tempfile.TemporaryDirectory] = []


# ---------------------------------------------------------------------- errors

_CLIENTS = ("gcsfs", "s3fs", "google.auth", "google.api_core", "google.cloud")
_TRANSPORTS = ("aiohttp", "botocore", "aiobotocore", "requests", "urllib3")


def is_refusal(e: BaseException) -> bool:
  """Whether an exception is a bucket's, or of the way there; a file that is missing is none.

  Clients let errors of the network through, and tell some of a bucket as Python's own, such as
  `OSError: Forbidden`.
  """
  if isinstance(e, FileNotFoundError | FileExistsError):
    return False
  of = lambda module, packages: any(f"{module}.".startswith(f"{p}.") for p in packages)
  if of(type(e).__module__, _CLIENTS):
    return True
  frames = (frame for frame, _ in traceback.walk_tb(e.__traceback__))
  return (isinstance(e, OSError) or of(type(e).__module__, _TRANSPORTS)) and any(
    of(frame.f_globals.get("__name__", ""), _CLIENTS) for frame in frames
  )


def is_outage(e: BaseException | None) -> bool:
  """Whether what has failed may work later: a bucket that is down or busy, or the way there.

  JAX's own errors have the same words for what is no bucket's: a lost peer, say.
  """
  causes: list[BaseException] = []
  while e is not None:
    causes.append(e)
    e = e.__cause__
  if any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in causes):
    return False
  for cause in causes:
    if any(words in str(cause) for words in ("UNAVAILABLE", "DEADLINE_EXCEEDED")):
      return True
    if is_refusal(cause):
      code = getattr(cause, "code", None)
      if isinstance(code, int):
        return code in (408, 429) or code >= 500
      transport = type(cause).__module__.partition(".")[0] in _TRANSPORTS
      return transport or isinstance(cause, TimeoutError | ConnectionError)
  return False


@contextlib.contextmanager
def refusals_ignored() -> Iterator[None]:
  """Goes on after what a bucket refused."""
  try:
    yield
  except Exception as e:
    if not is_refusal(e):
      raise


def refusal(e: BaseException) -> UserError:
  """What a bucket refused, as the user's matter."""
  return UserError(
    f"a bucket cannot be reached, or refused ({type(e).__name__}: {first_line(e)}); check its "
    "name, your credentials and the network, and run again. What was saved before is intact"
  )


def _filesystem(path: Path) -> Any:
  """fsspec's, the same that `epath` uses."""
  return backend.fsspec_backend.fs(path)
