"""Evaluation on public tasks by EleutherAI's lm-eval, the harness (Section 4.1, B.2)."""
