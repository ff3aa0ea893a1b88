"""The train program, but a process of it sends itself a signal at a chosen moment.

PROCESS:MOMENT:SIGNUM comes first, train's flags after it. MOMENT is a step, once it is recorded, or
a name below, when that is called for the n-th time. A test that sent the signal from outside would
depend on how fast it reads what the program prints.
"""

import os
import runpy
import sys

import jax

from matformer_jax.checkpoints import checkpoint, replicas
from matformer_jax.hosts import multihost
from matformer_jax.tasks import language
from matformer_jax.training import metrics, trainer

MOMENTS = {
  "compiling": (trainer.Trainer, "lower", 1),  # in a thread, while the main one waits for it
  "gathering": (multihost.Hosts, "gather", 2),  # while it starts
  "saving": (checkpoint.Writer, "save", 3),
  "comparing": (replicas, "check", 3),
  "evaluating": (language.LanguageModeling, "evaluate", 2),
}

process, moment, signum = sys.argv.pop(1).split(":")


def send() -> None:
  if jax.process_index() == int(process):
    os.kill(os.getpid(), int(signum))


if moment.isdecimal():
  record_step = metrics.RunLog.step

  def record_and_send(self, record):
    record_step(self, record)
    if record.step == int(moment):
      send()

  metrics.RunLog.step = record_and_send
else:
  owner, name, count = MOMENTS[moment]
  original = getattr(owner, name)
  calls = 0

  def send_and_call(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
      send()
    return original(*args, **kwargs)

  setattr(owner, name, send_and_call)

runpy.run_module("matformer_jax.train", run_name="__main__", alter_sys=True)
