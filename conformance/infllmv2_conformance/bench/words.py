"""Words and numbers of the command line, for a command that starts without torch."""

from __future__ import annotations

INPUTS = ("random", "correlated")
"""Kinds of queries and keys; `tensors.py` says what they are."""
TASKS = ("forward", "backward", "decode")
SHAPE_NAMES = ("minicpm4", "mha16", "gqa8", "tiny")
"""`workloads.py` says what they are."""
FAIL_ABOVE = 0.10
"""A slow-down by more than this fails; `docs/benchmarks.md` says why it is this number."""
