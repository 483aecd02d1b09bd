"""The CuPy implementation in the emulator: `infllmv2 check impls/tests/emulated_cupy.py:impl`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent))

import cuda_emulator

from infllmv2_impls.cupy import CupyImplementation

cuda_emulator.install()


class EmulatedCupy(CupyImplementation):
    """Claim the CPU."""

    capabilities: ClassVar[dict[str, Any]] = {
        **CupyImplementation.capabilities,
        "devices": ("cpu",),
    }


impl = EmulatedCupy()
