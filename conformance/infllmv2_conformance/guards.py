"""Guards against results that are right by accident: poisoned memory, red zones, fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ALLOCATIONS: set[Any] = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
}
_PRIMED_BYTES = (1 << 19,) * 16 + (1 << 25,) * 2
_RED_ZONE_ELEMENTS = 4096
_RED_ZONE_INTEGER = 1 << 30


class PoisonedMemory(TorchFunctionMode):
    """Fill what `torch.empty` and its kin return, so that an element left unwritten shows.

    Allocations from compiled extensions are not seen; on CUDA, blocks of the caching allocator are
    overwritten beforehand, so that these most likely hold the number too.

    Args:
        fill: what floating memory holds; integers get a number derived from it.
        device: where the implementation allocates.
    """

    def __init__(self, fill: float, device: torch.device) -> None:
        super().__init__()
        self.fill = fill
        if device.type == "cuda":
            blocks = [torch.full((n // 4,), fill, device=device) for n in _PRIMED_BYTES]
            del blocks

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` and overwrite what it allocated."""
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and isinstance(result, Tensor):
            poison(result, self.fill)
        return result


def poison(x: Tensor, fill: float) -> None:
    """Overwrite a tensor in place: floating ones with `fill`, integers with a matching number."""
    if x.is_floating_point():
        x.fill_(fill)
    elif x.dtype != torch.bool:
        x.fill_(0 if fill == fill else torch.iinfo(x.dtype).max // 2)


class RedZone:
    """Copy a tensor into the middle of a larger allocation that is filled with NaN.

    Args:
        x: what is copied; `tensor` is the contiguous copy.
    """

    def __init__(self, x: Tensor) -> None:
        self.size = x.numel()
        fill = torch.nan if x.is_floating_point() else _RED_ZONE_INTEGER
        shape = (self.size + 2 * _RED_ZONE_ELEMENTS,)
        self.buffer = torch.full(shape, fill, dtype=x.dtype, device=x.device)
        middle = self.buffer[_RED_ZONE_ELEMENTS : _RED_ZONE_ELEMENTS + self.size]
        middle.copy_(x.reshape(-1))
        self.tensor = middle.view(x.shape)

    def intact(self) -> bool:
        """Say whether the memory around the tensor still holds what it was filled with."""
        zones = (
            self.buffer[:_RED_ZONE_ELEMENTS],
            self.buffer[_RED_ZONE_ELEMENTS + self.size :],
        )
        if self.buffer.is_floating_point():
            return all(bool(zone.isnan().all()) for zone in zones)
        return all(bool((zone == _RED_ZONE_INTEGER).all()) for zone in zones)


def fingerprint(x: Tensor) -> str:
    """Return a digest of a tensor's form and of every bit of its elements."""
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    form = f"{tuple(x.shape)} {x.stride()} {x.dtype} {x.device}"
    return hashlib.blake2b(data, digest_size=16).hexdigest() + form
