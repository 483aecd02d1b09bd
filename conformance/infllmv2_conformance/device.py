"""Choose the device of a run, and notice when it is lost."""

from __future__ import annotations

import gc

import torch

from .capabilities import Capabilities
from .errors import UsageError

TYPES = ("cpu", "cuda")


class DeviceError(UsageError):
    """The device that was asked for cannot be used."""


class DeviceLostError(BaseException):
    """The CUDA context is broken for good; whatever runs on it now fails.

    It is no `Exception`, so that Hypothesis does not go on with it to shrink the case.

    Args:
        failure: how the implementation failed.
    """

    def __init__(self, failure: BaseException) -> None:
        super().__init__(str(failure))
        self.failure = failure


def choose_device(capabilities: Capabilities, wanted: str | None) -> torch.device:
    """Return the wanted device, or else the first claimed one that is there.

    Raises:
        DeviceError: it is not claimed, or not there.
    """
    claimed = capabilities.devices
    if wanted and wanted not in TYPES:
        raise DeviceError(f"device must be one of {', '.join(TYPES)}, but is {wanted!r}")
    if wanted and wanted not in claimed:
        raise DeviceError(f"the implementation does not claim {wanted}, only {', '.join(claimed)}")
    there = [d for d in ((wanted,) if wanted else claimed) if d == "cpu" or _has_cuda()]
    if not there:
        raise DeviceError("the run needs cuda, but torch finds no CUDA device here")
    return torch.device(there[0])


def use_share(worker: int) -> None:
    """Give the workers of a parallel run, counted from 0, a GPU each, as far as there are any."""
    if _has_cuda():
        torch.cuda.set_device(worker % torch.cuda.device_count())


def is_lost() -> bool:
    """Say whether a CUDA error has broken this process's context."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def free_memory() -> None:
    """Give unused GPU memory back, after a failure that may have taken it all."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _has_cuda() -> bool:
    return torch.cuda.is_available()
