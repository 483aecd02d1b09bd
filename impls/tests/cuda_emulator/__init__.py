"""Run the CUDA kernels on a CPU, slowly: compiled as C++ by g++, every thread a fiber.

`INFLLMV2_EMULATOR_ORDER=-1` runs the threads of a block in the opposite order, which shows many a
missing barrier.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
from torch import Tensor

from infllmv2_impls.cupy import launch
from infllmv2_impls.cupy.compiling import CUDA, Kernel

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++20", "-O2", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden", "-w",
    "-fno-strict-aliasing", "-fcf-protection=none", "-fno-ipa-reference", "-fno-stack-protector",
)  # fmt: skip
KINDS = {np.dtype(np.uintp): "p", np.dtype(np.int32): "i", np.dtype(np.float32): "f"}
KINDS |= {np.dtype(np.int64): "l"}
CACHE = Path(tempfile.gettempdir()) / f"infllmv2-emulated-{os.getuid()}"
_LOCK = threading.Lock()


def is_available() -> bool:
    """Return whether the emulator can work here."""
    return shutil.which("g++") is not None and os.uname().machine == "x86_64"


def install() -> None:
    """Let `launch` run kernels in the emulator from now on."""
    if not is_available():
        raise RuntimeError("the CUDA emulator needs g++ on x86-64")
    launch.backend = Emulator()


class Emulator:
    """Run kernels on tensors of the CPU."""

    device_type = "cpu"

    def check(self) -> None:
        """Raise nothing: `install` has looked."""

    def run(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        on: Tensor,
        values: tuple[np.generic, ...],
    ) -> None:
        """Run a kernel and wait for it; arguments of the wrong type are an error."""
        library, signature = _load(kernel)
        kinds = "".join(KINDS.get(value.dtype, "?") for value in values)
        if kinds != signature:
            raise TypeError(f"{kernel.name} takes the arguments {signature}, but it gets {kinds}")
        cells = [np.array([value]) for value in values]
        pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
        order = int(os.environ.get("INFLLMV2_EMULATOR_ORDER", "1"))
        with _LOCK:
            error = library.emulator_run(
                (ctypes.c_uint * 3)(*grid), threads, ctypes.c_size_t(shared_bytes), order, pointers
            )
        if error:
            raise RuntimeError(f"{kernel.name}: {error.decode()}")


@functools.cache
def _load(kernel: Kernel) -> tuple[ctypes.CDLL, str]:
    """Return the library of a kernel, and the kinds of its arguments."""
    library = ctypes.CDLL(str(_build(kernel)))
    library.emulator_run.restype = ctypes.c_char_p
    text = ctypes.create_string_buffer(256)
    library.emulator_signature(text)
    return library, text.value.decode()


def _build(kernel: Kernel) -> Path:
    sources = [CUDA / kernel.file, *sorted(CUDA.glob("*.cuh")), *sorted(HERE.glob("*.[hc]*"))]
    parts = [source.read_text() for source in sources]
    parts += [kernel.name, *FLAGS, *kernel.options()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = CACHE / f"{kernel.name}-{digest}.so"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        command = [
            "g++", *FLAGS, "-DINFLLMV2_EMULATED", *kernel.options(),
            f'-DINFLLMV2_FILE="{kernel.file}"', f"-DINFLLMV2_KERNEL={kernel.name}",
            f"-I{HERE}", f"-I{CUDA}", "-o", str(temporary), str(HERE / "launcher.cpp"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"g++ cannot compile {kernel.name} of {kernel.file}:\n{done.stderr}")
        os.replace(temporary, path)
    return path
