"""What the assembler makes of the kernels for Hopper GPUs; it needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

SCRIPT = Path(__file__).with_name("hopper_compilation.py")
MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a program may have."""
SPILLED = {"forward": 0, "queries": 0, "keys": 128}
"""Bytes of stack of a thread; the gradients of keys keep a few numbers there, none of a sum."""


@pytest.mark.parametrize(
    ("name", "group", "dim"),
    [("forward", 16, 128), ("queries", 16, 128), ("keys", 16, 128), ("keys", 8, 64)],
)
def test_products_overlap_and_nothing_spills(name: str, group: int, dim: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), name, str(group), str(dim)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernel = json.loads(done.stdout)
    assert not kernel["serialized"], "a product waits for the one before"
    assert kernel["products"] > 0
    assert kernel["copies"] > 0
    assert kernel["shared"] <= MOST_SHARED
    assert kernel["stack"] <= SPILLED[name]
