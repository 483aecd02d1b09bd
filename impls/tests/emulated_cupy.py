"""The CuPy implementation in the emulator: `infllmv2 check impls/tests/emulated_cupy.py:impl`.

`:hopper` has the kernels for Hopper GPUs, `:impl` those for every GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent))

import cuda_emulator

from infllmv2_impls.cupy import CupyHopper, CupyPortable

cuda_emulator.install(capability=(9, 0))


class EmulatedCupy(CupyPortable):
    """Claim the CPU."""

    capabilities: ClassVar[dict[str, Any]] = {**CupyPortable.capabilities, "devices": ("cpu",)}


class EmulatedHopper(CupyHopper):
    """Claim the CPU."""

    capabilities: ClassVar[dict[str, Any]] = {**CupyHopper.capabilities, "devices": ("cpu",)}


impl = EmulatedCupy()
hopper = EmulatedHopper()
