"""Runs programs of the package in forks of itself: what they import has been imported once.

Reads a request a line, {"module", "args", "env", "timeout", "streams"}, and answers with the exit
code, or null after the timeout. It never uses JAX itself, so that a fork finds it as a new
process would: no devices, no threads, flags not yet parsed.
"""

import importlib
import json
import os
import runpy
import signal
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


def child(request) -> None:
  """Becomes the program; does not return."""
  code = 1
  try:
    for fd, path in zip((1, 2), request["streams"]):
      file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
      os.dup2(file, fd)
      os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"])
    sys.argv = [request["module"], *request["args"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    code = 0
  except SystemExit as e:
    if isinstance(e.code, str):
      print(e.code, file=sys.stderr)
    code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
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


def main() -> None:
  for name in LIBRARIES:
    importlib.import_module(name)
  for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
      os.setsid()
      child(request)
    answer = None
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(pid, signal.SIGKILL))
    signal.alarm(int(request["timeout"]))
    _, status = os.waitpid(pid, 0)
    if signal.alarm(0) > 0:
      answer = os.waitstatus_to_exitcode(status)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
