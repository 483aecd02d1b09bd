"""Launch kernels on the device of their tensors and on torch's current stream, without waiting."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .compiling import Kernel, architecture, cubin_file, import_cupy

__all__ = [
    "Kernel",
    "backend",
    "capability",
    "check_runs_here",
    "check_runs_on",
    "encode_tensor_map",
    "launch",
]

Grid = tuple[int, int, int]
Argument = Tensor | bool | int | float | np.generic | None
_ALWAYS_SHARED = 48 << 10
"""Bytes of dynamic shared memory that a kernel may have without asking."""


class Backend(Protocol):
    """Run kernels somewhere."""

    device_type: str

    def check(self) -> None:
        """Raise RuntimeError unless kernels can run here."""
        ...

    def capability(self, device: torch.device | None) -> tuple[int, int]:
        """Return the compute capability of a device, or of the current one."""
        ...

    def encode_tensor_map(self, *arguments: Any) -> int:
        """Describe a tensor to the copy engine, as the driver's `cuTensorMapEncodeTiled` does."""
        ...

    def run(
        self,
        kernel: Kernel,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        on: Tensor,
        values: tuple[np.generic, ...],
    ) -> None:
        """Run a kernel; `values` are its arguments, pointers as `uintp`."""
        ...


class CupyBackend:
    """Run kernels on CUDA devices; a kernel is compiled and loaded at its first use."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._loaded: dict[tuple[Kernel, int], Any] = {}
        self._shared: dict[tuple[Kernel, int], int] = {}

    def check(self) -> None:
        """Raise RuntimeError unless torch finds a device that is new enough, and CuPy works."""
        if not torch.cuda.is_available():
            raise RuntimeError("the CuPy kernels need a CUDA device, and torch finds none")
        architecture(torch.cuda.get_device_capability())
        import_cupy()

    def capability(self, device: torch.device | None) -> tuple[int, int]:
        """Ask torch."""
        return torch.cuda.get_device_capability(device)

    def encode_tensor_map(self, *arguments: Any) -> int:
        """Let the driver do it."""
        return _driver().cuTensorMapEncodeTiled(*arguments)

    def run(
        self,
        kernel: Kernel,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        on: Tensor,
        values: tuple[np.generic, ...],
    ) -> None:
        """Launch a kernel on the device of `on`, on torch's current stream there."""
        cupy, index = import_cupy(), on.device.index
        stream = torch.cuda.current_stream(on.device).cuda_stream
        with cupy.cuda.Device(index):
            function = self._function(kernel, index, shared_bytes)
            with _external_stream(cupy, stream):
                function(grid, (threads, 1, 1), values, shared_mem=shared_bytes)

    def _function(self, kernel: Kernel, index: int, shared_bytes: int) -> Any:
        """Return the function of a kernel on the current device, allowed so much shared memory."""
        key = (kernel, index)
        if key not in self._loaded:
            arch = architecture(torch.cuda.get_device_capability(index), kernel.hopper)
            module = import_cupy().RawModule(path=str(cubin_file(kernel, arch)))
            self._loaded[key] = module.get_function(kernel.name)
            self._shared[key] = _ALWAYS_SHARED
        function = self._loaded[key]
        if shared_bytes > self._shared[key]:
            _check_shared(kernel, shared_bytes)
            function.max_dynamic_shared_size_bytes = shared_bytes
            self._shared[key] = shared_bytes
        return function


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check_shared(kernel: Kernel, shared_bytes: int) -> None:
    """Raise RuntimeError unless the current device has so much shared memory for a block."""
    most = import_cupy().cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    if shared_bytes > most:
        macros = " ".join(kernel.options())
        raise RuntimeError(
            f"{kernel.name} with {macros} needs {shared_bytes} bytes of shared memory, and this "
            f"device has {most} for a block"
        )


class _Stream:
    """Offer a stream by the protocol that CuPy takes it by."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def _external_stream(cupy: Any, pointer: int) -> Any:
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Stream(pointer))
    return cupy.cuda.ExternalStream(pointer)


backend: Backend = CupyBackend()
"""Where kernels run; tests put an emulator here."""


def launch(
    kernel: Kernel, grid: Grid, threads: int, shared_bytes: int, on: Tensor, *arguments: Argument
) -> None:
    """Launch a kernel, unless its grid is empty.

    Args:
        kernel: what to launch.
        grid: blocks along x, y and z.
        threads: threads of a block, all along x.
        shared_bytes: dynamic shared memory of a block.
        on: a tensor on the device to launch on.
        arguments: a tensor becomes its pointer, None a null pointer, an int int32, `numpy.int64`
            int64, a float float32; a structure, as `numpy.void`, is passed by value.

    Raises:
        OverflowError: an int does not fit into int32.
        ValueError: the grid is larger than a device allows.
    """
    if 0 in grid:
        return
    if grid[0] >= 1 << 31 or max(grid[1:]) >= 1 << 16:
        raise ValueError(f"grid must be at most (2**31 - 1, 65535, 65535), but it is {grid}")
    values = tuple(_value(argument) for argument in arguments)
    backend.run(kernel, grid, threads, shared_bytes, on, values)


def capability(device: torch.device | None = None) -> tuple[int, int]:
    """Return the compute capability of a device, or of the current one."""
    return backend.capability(device)


def encode_tensor_map(*arguments: Any) -> int:
    """Describe a tensor to the copy engine, as the driver's `cuTensorMapEncodeTiled` does."""
    return backend.encode_tensor_map(*arguments)


def check_runs_here() -> None:
    """Raise RuntimeError unless kernels can run here."""
    backend.check()


def check_runs_on(name: str, x: Tensor) -> None:
    """Raise ValueError unless the kernels can work on the argument `x`."""
    if x.device.type != backend.device_type:
        raise ValueError(f"{name} must be on {backend.device_type}, but it is on {x.device}")


def _value(argument: Argument) -> np.generic:
    """Return an argument as the scalar that a kernel takes."""
    if argument is None:
        return np.uintp(0)
    if isinstance(argument, Tensor):
        return np.uintp(argument.data_ptr())
    if isinstance(argument, np.generic):
        return argument
    if isinstance(argument, float):
        return np.float32(argument)
    return np.int32(argument)
