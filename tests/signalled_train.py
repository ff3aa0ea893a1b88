"""The train program, but a process of it sends itself a signal once it has recorded a step.

PROCESS:STEP:SIGNUM comes first (step 0: while it compiles), train's flags after it. A test that
sent the signal from outside would depend on how fast it reads what the program prints.
"""

import os
import runpy
import sys

import jax

from matformer_jax.training import metrics, trainer

PROCESS, STEP, SIGNUM = map(int, sys.argv.pop(1).split(":"))
record_step, lower = metrics.RunLog.step, trainer.Trainer.lower


def send_at(step):
  if step == STEP and jax.process_index() == PROCESS:
    os.kill(os.getpid(), SIGNUM)


def record_and_send(self, record):
  record_step(self, record)
  send_at(record.step)


def lower_and_send(self, *args):  # in a thread, while the main one waits for it
  send_at(0)
  return lower(self, *args)


metrics.RunLog.step, trainer.Trainer.lower = record_and_send, lower_and_send
runpy.run_module("matformer_jax.train", run_name="__main__", alter_sys=True)
