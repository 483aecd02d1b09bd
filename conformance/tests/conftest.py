"""Implementations written to a file, and the command run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Infllmv2 = Callable[..., "subprocess.CompletedProcess[str]"]

TEMPLATE = """
import ctypes, os, pathlib, sys, time
from infllmv2_impls.eager import IMPLEMENTATION as EAGER

BEGUN = pathlib.Path(__file__).with_suffix(".begun")

def first_time():
    if BEGUN.exists():
        return False
    BEGUN.touch()
    return True

{at_import}

class Fake:
    capabilities = EAGER.capabilities

    def compress_keys(self, **given):
        {before}
        windows, cu_seqlens = EAGER.compress_keys(**given)
        return {result}
"""


@pytest.fixture
def write_fake(tmp_path: Path) -> Callable[..., str]:
    """Write an implementation that offers `compress_keys` alone; return how to name it."""

    def write(
        before: str = "pass", result: str = "windows, cu_seqlens", at_import: str = ""
    ) -> str:
        code = TEMPLATE.format(before=before, result=result, at_import=at_import)
        (tmp_path / "fake.py").write_text(code)
        return "fake.py:Fake"

    return write


@pytest.fixture
def environment() -> dict[str, str]:
    """Environment of a child: our packages importable, nothing of the pytest that runs here."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COLUMNS"))}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return env | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def infllmv2(tmp_path: Path, environment: dict[str, str]) -> Infllmv2:
    """Run the command in an empty folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "infllmv2_conformance", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return run
