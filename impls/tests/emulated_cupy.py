"""The CuPy implementation in the emulator: `infllmv2 check impls/tests/emulated_cupy.py:impl`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cuda_emulator  # noqa: E402
from infllmv2_impls.cupy import CupyImplementation  # noqa: E402

cuda_emulator.install()


class EmulatedCupy(CupyImplementation):
    """Claim the CPU."""

    capabilities: dict[str, Any] = {**CupyImplementation.capabilities, "devices": ("cpu",)}


impl = EmulatedCupy()
