"""Runs programs in forks of itself: what they import has been imported once.

Reads a request a line from the socket whose number it is given:

  {"target", "args", "env"}, with two file descriptors, for stdout and stderr: answers with the
    process's number. The target is a module or a path.
  {"ended": number}: answers with the exit code, or null while it runs.

It never uses JAX itself, so that a fork finds it as a new process would: no devices, no threads,
flags not yet parsed.
"""

import importlib
import json
import os
import runpy
import socket
import sys
import traceback

LIBRARIES = (
  "matformer_jax",
  "matformer_jax.cli",
  "matformer_jax.plots",
  "matformer_jax.training.loop",
  "matformer_jax.hosts.goodput",
  "matformer_jax.evals.latency",
  "matformer_jax.evals.retrieval",
  "matformer_jax.evals.sizes",
  "matformer_jax.data.store",
  "matformer_jax.models.dynamic",
  "matformer_jax.tasks.classification",
  "matformer_jax.tasks.language",
  "matformer_jax.tpu.hlo",
  "orbax.checkpoint",
  "tensorboardX",
)


def child(request, streams) -> None:
  """Becomes the program; does not return."""
  code = 1
  try:
    os.setsid()
    for number, stream in zip((1, 2), streams):
      os.dup2(stream, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in streams:
      os.close(stream)
    os.environ.update(request["env"])
    target = request["target"]
    sys.argv = [target, *request["args"]]
    if target.endswith(".py"):
      runpy.run_path(target, run_name="__main__")
    else:
      runpy.run_module(target, run_name="__main__", alter_sys=True)
    code = 0
  except SystemExit as e:
    if isinstance(e.code, str):
      print(e.code, file=sys.stderr)
    code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
  except KeyboardInterrupt:
    code = 130
  except BaseException:
    traceback.print_exc()
  finally:
    _leave(code)


def _leave(code: int) -> None:
  """Exits as an interpreter does, exit handlers and all, but for those of the server."""
  try:
    import atexit

    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
  finally:
    os._exit(code)


def preload() -> None:
  """Imports what programs import."""
  for name in LIBRARIES:
    importlib.import_module(name)


def start(request, streams, requests: socket.socket) -> int:
  pid = os.fork()
  if pid == 0:
    requests.close()
    child(request, streams)
  for stream in streams:
    os.close(stream)
  return pid


def ended(pid: int) -> int | None:
  found, status = os.waitpid(pid, os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if found else None


def main() -> None:
  preload()
  requests = socket.socket(fileno=int(sys.argv[1]))
  while True:
    text, streams = b"", []
    while not text.endswith(b"\n"):
      part, received, _, _ = socket.recv_fds(requests, 2**16, 2)
      if not part:
        return
      text, streams = text + part, streams + received
    request = json.loads(text)
    pid = request.get("ended")
    answer = ended(pid) if pid else start(request, streams, requests)
    requests.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
  main()
