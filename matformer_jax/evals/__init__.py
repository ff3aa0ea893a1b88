"""Evaluations. `lm`: loss and consistency of granularities; `bigram`: a baseline."""
