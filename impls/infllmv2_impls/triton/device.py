"""Where kernels run: on the device and stream of their tensors, or in Triton's interpreter."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 stood when this was imported; kernels are bound to it for good."""

HOW_TO_INTERPRET = "set TRITON_INTERPRET=1 before Python starts to run the kernels on a CPU, slowly"


def launching_on(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of `x` current: Triton launches on the current device and its stream."""
    return torch.cuda.device_of(x)


def unit_stride(x: Tensor) -> Tensor:
    """Return `x`, copied if its last axis is strided; kernels take all other strides."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def check_runs_here() -> None:
    """Raise RuntimeError unless there is a device for the kernels."""
    if not INTERPRETED and not torch.cuda.is_available():
        raise RuntimeError(
            f"the Triton kernels need a CUDA device, and torch finds none; {HOW_TO_INTERPRET}"
        )


def check_runs_on(name: str, x: Tensor) -> None:
    """Raise ValueError unless the kernels can work on the argument `x`."""
    wanted = "cpu" if INTERPRETED else "cuda"
    if x.device.type != wanted:
        why = "TRITON_INTERPRET is set" if INTERPRETED else HOW_TO_INTERPRET
        raise ValueError(f"{name} must be on {wanted}, but it is on {x.device} ({why})")
