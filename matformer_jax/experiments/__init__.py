"""The paper's tables and figures, each one command, at any size.

An experiment only calls the package's own programs and prints every call, so that each step
can be repeated by hand. An interrupted experiment resumes when it is run again: training
continues from its checkpoint, and embeddings on disk are reused.
"""
