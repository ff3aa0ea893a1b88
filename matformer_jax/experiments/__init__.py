"""The paper's tables and figures, each one command, at any size.

An experiment only calls the package's own programs and prints every call, so that each step
can be repeated by hand. Run again after a kill, it goes on: training resumes, and
embeddings that exist are kept.
"""
