"""Real text that every machine has: the sources of the installed Python packages.

A file per package, so that `data.validation_fraction` holds out whole packages: what is measured
is never a neighbour of what is trained on. A file that several packages carry, such as a vendored
library, is taken once. Files with other characters than ASCII's are left out: every character
needs an entry in the vocabulary, and those of these models have room for a few hundred.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import hashlib
import importlib.metadata
import pathlib
import zlib

from matformer_jax import runtime, storage
from matformer_jax.data import text_sources
from matformer_jax.errors import UserError

SUFFIXES = {".py", ".md", ".rst"}
LARGEST_FILE = 500_000  # bytes; what is larger was generated
LEAST_LETTERS = 0.5  # of a file's characters, without spaces; what has fewer is a table of numbers
LEAST_COMPRESSED = 0.12  # of a file's bytes; what shrinks to less says the same again and again
LARGEST_PACKAGE = 3_000_000  # bytes, so that no package is most of the text
DONE = "packages.tsv"


def write(directory: pathlib.Path, limit: int = 0) -> str:
  """Writes the text, where it is not there yet; returns it as a `data.source`.

  Args:
    directory: gets PACKAGE.txt files, and packages.tsv, which lists them.
    limit: bytes of text, about, from evenly spread packages' beginnings; 0 takes everything.

  Raises:
    UserError: if there is hardly any text.
  """
  source = f"text:{directory}/*.txt"
  if (directory / DONE).exists():
    return source
  directory.mkdir(parents=True, exist_ok=True)
  packages = dict(_packages())
  share = min(LARGEST_PACKAGE, limit // max(len(packages), 1) or LARGEST_PACKAGE)
  seen: set[bytes] = set()
  rows = []
  for name, files in sorted(packages.items()):
    text = "".join(_texts(files, seen, share))
    if text:
      (directory / f"{name}.txt").write_text(text, encoding="utf-8")
      rows.append(f"{name}\t{len(text.encode())}\n")
  total = sum(int(row.split("\t")[1]) for row in rows)
  if len(rows) < 20:
    raise UserError(f"only {len(rows)} installed packages have sources to read as text; need 20")
  storage.replace_file(directory / DONE, "".join(rows).encode())
  runtime.say(f"{directory}: {total / 1e6:.1f} MB of text from {len(rows)} installed packages")
  return source


def _packages() -> Iterator[tuple[str, list[pathlib.Path]]]:
  """(name, files) of the standard library and of everything installed."""
  yield "python", text_sources.library_files()[1]
  for distribution in importlib.metadata.distributions():
    files = [
      pathlib.Path(str(distribution.locate_file(f)))
      for f in distribution.files or ()
      if f.suffix in SUFFIXES
    ]
    yield distribution.name.lower(), sorted(files)


def _is_table(text: str) -> bool:
  """Whether it is data rather than code or prose; so is an empty file."""
  dense = "".join(text.split())
  compressed = zlib.compress(text.encode(), 1)
  return sum(map(str.isalpha, dense)) <= LEAST_LETTERS * len(dense) or len(
    compressed
  ) < LEAST_COMPRESSED * len(text)


def _texts(files: Iterable[pathlib.Path], seen: set[bytes], share: int) -> Iterator[str]:
  """The files' text up to a number of bytes, without those seen before."""
  for path in files:
    try:
      raw = path.read_bytes()
      text = raw.decode("ascii")
    except (OSError, UnicodeDecodeError):
      continue
    digest = hashlib.sha256(b"".join(raw.split())).digest()  # spaces and line ends make no copy
    if len(raw) > LARGEST_FILE or digest in seen or _is_table(text):
      continue
    seen.add(digest)
    yield text.rstrip() + "\n\n"
    share -= len(raw)
    if share <= 0:
      return
