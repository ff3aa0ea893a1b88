"""A GCS server on loopback, which the real clients talk to without credentials."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import itertools
import re
import socket
import threading
import urllib.parse

import gcp_storage_emulator.exceptions
import gcp_storage_emulator.handlers.buckets
import gcp_storage_emulator.server
import gcp_storage_emulator.storage

BUCKET = "bucket"
FAULTS = (429, 500, 503)


class Gcs:
  """A GCS server in this process, with what can go wrong.

  Attributes:
    env: for programs that shall use it.
    fail_every: of that many requests one is answered with 429, 500 or 503 in turn; 0: none.
    refusing: the one status that all requests get, if any.
    stall: called before each request with its method and path.
  """

  def __init__(self):
    self.fail_every, self.requests = 0, 0
    self.refusing: int | None = None
    self.stall = lambda method, path: None
    self._lock, self._codes = threading.RLock(), itertools.cycle(FAULTS)
    self._objects = gcp_storage_emulator.storage.Storage(use_memory_fs=True)
    gcp_storage_emulator.handlers.buckets.create_bucket(BUCKET, self._objects)
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      self._port = s.getsockname()[1]
    url = f"http://127.0.0.1:{self._port}"
    self.env = {
      "STORAGE_EMULATOR_HOST": url,
      "TENSORSTORE_GCS_HTTP_URL": url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks Google what kind of bucket it is
    }
    self._server = None

  def start(self) -> None:
    """Begins to answer, with the objects that it had."""
    handler = functools.partial(_Handler, self)
    self._server = _Server(("127.0.0.1", self._port), handler)
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def stop(self) -> None:
    """Refuses connections from now on."""
    server, self._server = self._server, None
    if server is not None:
      server.shutdown()
      server.server_close()

  def next_fault(self) -> int | None:
    """The status that a request gets instead of its answer."""
    self.requests += 1
    if self.refusing:
      return self.refusing
    return next(self._codes) if self.fail_every and self.requests % self.fail_every == 0 else None

  @contextlib.contextmanager
  def alone(self):
    """The objects, for one request at a time."""
    with self._lock:
      yield self._objects


class _Server(http.server.ThreadingHTTPServer):
  request_queue_size = 128  # of 5, a batch's requests wait a second to connect again


class _Handler(gcp_storage_emulator.server.RequestHandler):
  def __init__(self, gcs: Gcs, *args):
    self._gcs = gcs
    super().__init__(gcs._objects, *args)

  def _answer(self, method: str) -> None:
    body = self.rfile.read(int(self.headers.get("content-length") or 0))
    self.rfile = io.BytesIO(body)
    self._gcs.stall(method, self.path)
    with self._gcs.alone() as objects:
      self._generation = _generation(self.path, body, objects)
      code = self._gcs.next_fault() or _precondition(self.path, self._generation)
      if code is None:
        gcp_storage_emulator.server.Router(self).handle(method)
        return
    self.send_response(code)
    self.send_header("Content-Length", "0")
    self.end_headers()

  def end_headers(self):
    """With what the emulator leaves out, and preconditions refer to."""
    if self._generation != "0":
      self.send_header("x-goog-generation", self._generation)
    super().end_headers()

  do_GET = functools.partialmethod(_answer, "GET")
  do_POST = functools.partialmethod(_answer, "POST")
  do_PUT = functools.partialmethod(_answer, "PUT")
  do_PATCH = functools.partialmethod(_answer, "PATCH")
  do_DELETE = functools.partialmethod(_answer, "DELETE")


def _generation(path: str, body: bytes, objects) -> str:
  """Of the object that a request is about; 0 where there is none."""
  url = urllib.parse.urlparse(path)
  query = urllib.parse.parse_qs(url.query)
  in_path, in_body = re.search(r"/o/([^/]+)$", url.path), re.search(rb'"name": *"([^"]+)"', body)
  if in_path:
    name = urllib.parse.unquote(in_path.group(1))
  elif "name" in query:
    name = query["name"][0]
  else:
    name = in_body.group(1).decode() if in_body else ""
  try:
    return objects.get_file_obj(BUCKET, name)["generation"]
  except gcp_storage_emulator.exceptions.NotFound:
    return "0"


def _precondition(path: str, generation: str) -> int | None:
  """The status of a request whose `ifGeneration...` does not hold."""
  query = urllib.parse.parse_qs(urllib.parse.urlparse(path).query)
  if query.get("ifGenerationMatch", [generation]) != [generation]:
    return 412
  return 304 if query.get("ifGenerationNotMatch") == [generation] else None
