"""Serves every size of a trained language model over HTTP, by OpenAI's API.

  python -m matformer_jax.serve --workdir=runs/quickstart --port=8000

One universal model is in memory, and a request chooses its size by the name of the model: `name:M`,
`name:M*2+L*2`, `name:0.6x`, `name:15ms`, or `name` alone, which leaves it to the load. Requests run
together, each at its own size. A page to try it is at /.

SIGTERM and Ctrl-C let what is running finish, and end with exit code 0.
"""

from __future__ import annotations

import os

from absl import flags

from matformer_jax import cli, runtime, storage
from matformer_jax.errors import UserError, import_extra
from matformer_jax.loading import LanguageModel, load

KEY_VARIABLE = "MATFORMER_API_KEY"
_PACKAGES = ("fastapi", "jinja2", "prometheus_client", "uvicorn")


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  for package in _PACKAGES:
    import_extra(package, "the server", "serve")
  from matformer_jax.serving import api, server
  from matformer_jax.serving.engine import Engine
  from matformer_jax.serving.gate import is_loopback

  key = _API_KEY.value or os.environ.get(KEY_VARIABLE, "")
  local = is_loopback(_HOST.value)
  if not local and not key:
    raise UserError(
      f"--host={_HOST.value} can be reached from other machines: give a key that clients must "
      f"send, in {KEY_VARIABLE} or --api_key, or leave --host out"
    )
  if not key.isprintable() or not key.isascii():
    raise UserError(f"the key in {KEY_VARIABLE} or --api_key must be printable ASCII")
  settings = api.Settings(
    name=_NAME.value or storage.absolute(storage.path(workdir)).name.replace(":", "-"),
    api_key=key,
    local_only=local,
    max_body=_MAX_BODY.value,
    timeout=_TIMEOUT.value,
  )
  runtime.enable_compilation_cache()
  with server.listen(_HOST.value, _PORT.value) as listening:
    model = load(workdir, _STEP.value, LanguageModel)
    if (_MAX_LENGTH.value or 0) > model.config.seq_len:
      runtime.warn(
        f"--max_length={_MAX_LENGTH.value} is more than the {model.config.seq_len} tokens of the "
        "model's context: texts longer than that will be poor"
      )
    engine = Engine(
      model,
      slots=_SLOTS.value,
      max_length=_MAX_LENGTH.value,
      queue_limit=_QUEUE_LIMIT.value,
      policy=_POLICY.value,
    )
    try:
      app = api.make_app(engine, model, settings)
      ready = f"serving {settings.name} ({workdir}) at {server.url(listening)}"
      connections = 4 * (_SLOTS.value + _QUEUE_LIMIT.value)
      say = lambda: runtime.say(ready)
      server.Server(app, _GRACE.value, say, connections).run(sockets=[listening])
    finally:
      engine.close(timeout=0.0)


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained or extracted model.")
  _STEP = cli.define_step()
  _NAME = flags.DEFINE_string("name", None, "Of the model; default the directory's.")
  _HOST = flags.DEFINE_string("host", "127.0.0.1", "Address; one that is not loopback needs a key.")
  _PORT = flags.DEFINE_integer(
    "port", 8000, "0 takes a free one.", lower_bound=0, upper_bound=65535
  )
  _API_KEY = flags.DEFINE_string(
    "api_key", None, f"What clients must send; better in {KEY_VARIABLE}, which others cannot see."
  )
  _SLOTS = flags.DEFINE_integer("slots", 8, "Requests that run together.", lower_bound=1)
  _MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Prompt and new tokens, at most; default the context.", lower_bound=2
  )
  _QUEUE_LIMIT = flags.DEFINE_integer(
    "queue_limit", 256, "Requests that wait for a slot; more are refused.", lower_bound=1
  )
  _MAX_BODY = flags.DEFINE_integer("max_body", 2**20, "Bytes of a request.", lower_bound=1)
  _TIMEOUT = flags.DEFINE_float("timeout", 300.0, "Seconds for an answer.", lower_bound=0.1)
  _GRACE = flags.DEFINE_float(
    "grace", 60.0, "Seconds to finish what is running at the end.", lower_bound=0.0
  )
  _POLICY = flags.DEFINE_bool(
    "policy", True, "Requests that name no size get smaller ones as the queue grows."
  )
  cli.run(main)
