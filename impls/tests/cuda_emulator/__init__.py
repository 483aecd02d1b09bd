"""Run the CUDA kernels on a CPU, slowly: compiled as C++ by g++, every thread a fiber.

A tensor map of the copy engine holds its numbers as they are, in the order of `Map` in
`hopper_emulator.h`.

`INFLLMV2_EMULATOR_ORDER=-1` runs the threads of a block in the opposite order, which shows many a
missing barrier; any number but 1 and -1 lets them run in a random one.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infllmv2_impls.cupy import launch
from infllmv2_impls.cupy.compiling import CUDA, Kernel

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++20", "-O1", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden", "-w",
    "-fno-strict-aliasing", "-fcf-protection=none", "-fno-ipa-reference", "-fno-stack-protector",
)  # fmt: skip
KINDS: dict[np.dtype[Any], str] = {
    np.dtype(np.uintp): "p",
    np.dtype(np.int32): "i",
    np.dtype(np.int64): "l",
    np.dtype(np.float32): "f",
}
_ITEM_BYTES = {6: 2, 9: 2}
"""Bytes of the CUtensorMapDataType that kernels use: float16 and bfloat16."""
_MAP_MARK = 0x70616D5F726F736E
_INVALID_VALUE = 1
CACHE = Path(tempfile.gettempdir()) / f"infllmv2-emulated-{os.getuid()}"
_LOCK = threading.Lock()


def is_available() -> bool:
    """Return whether the emulator can work here."""
    return shutil.which("g++") is not None and os.uname().machine == "x86_64"


def install(capability: tuple[int, int] = (8, 0)) -> None:
    """Let `launch` run kernels in the emulator from now on."""
    if not is_available():
        raise RuntimeError("the CUDA emulator needs g++ on x86-64")
    launch.backend = Emulator(capability)


class Emulator:
    """Run kernels on tensors of the CPU.

    Args:
        capability: what it calls its compute capability; at 9.0 kernels for Hopper GPUs run, too.
    """

    device_type = "cpu"

    def __init__(self, capability: tuple[int, int] = (8, 0)) -> None:
        self._capability = capability

    def check(self) -> None:
        """Raise nothing: `install` has looked."""

    def capability(self, device: torch.device | None) -> tuple[int, int]:
        """Return what it was told to say."""
        return self._capability

    def encode_tensor_map(self, *arguments: Any) -> int:
        """Write the numbers of a description; refuse what the driver does."""
        target, kind, rank, base, dims, strides, box, steps, *modes = arguments
        base, dims, strides, box, steps = base.value, *map(list, (dims, strides, box, steps))
        interleave, swizzle, _, fill = modes
        refused = (
            kind not in _ITEM_BYTES
            or (rank, steps, interleave, fill) != (3, [1, 1, 1], 0, 0)
            or target.value % 64
            or base % 16
            or not all(0 < dim <= 1 << 32 for dim in dims)
            or any(stride % 16 or not 0 < stride < 1 << 40 for stride in strides)
            or not all(0 < size <= 256 for size in box)
            or box[0] * _ITEM_BYTES[kind] % 16
        )
        if refused:
            return _INVALID_VALUE
        words = (_MAP_MARK, base, _ITEM_BYTES[kind], *dims, *strides, *box, swizzle)
        (ctypes.c_uint64 * 16).from_address(target.value)[: len(words)] = words
        return 0

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
        kinds = "".join(map(_kind, values))
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


def _kind(value: np.generic) -> str:
    """Return the letter that the emulator has for the type of an argument."""
    if isinstance(value, np.void):
        return "t" if value.nbytes == 128 else "?"
    return KINDS.get(value.dtype, "?")


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
