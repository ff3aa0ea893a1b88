"""The paper's tables and figures, each one command, at any size: see `__main__`.

  runs        what is trained, many at a time, each once
  families    models of one shape and how they are trained, at three scales
  corpus, images   data that every machine can make
  lab         an experiment's runs, learning rates and kept measurements
  language, scaling, architectures, vision   the experiments; speculation times Table 2
  compare, claims, report   tables, plots and verdicts

`elastify` is a program of its own, about models from outside.
"""
