"""The train program, but a process of it sends itself a signal once it has recorded a step.

PROCESS:STEP:SIGNUM comes first, train's flags after it. A test that sent the signal from outside
would depend on how fast it reads what the program prints.
"""

import os
import runpy
import sys

import jax

from matformer_jax.training import metrics

PROCESS, STEP, SIGNUM = map(int, sys.argv.pop(1).split(":"))
record_step = metrics.RunLog.step


def record_and_send(self, record):
  record_step(self, record)
  if record.step == STEP and jax.process_index() == PROCESS:
    os.kill(os.getpid(), SIGNUM)


metrics.RunLog.step = record_and_send
runpy.run_module("matformer_jax.train", run_name="__main__", alter_sys=True)
