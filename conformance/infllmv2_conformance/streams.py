"""Call an implementation on a side stream while other streams are busy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .candidate import Candidate
from .guards import poison

SIDE_CYCLES = 40_000_000
"""How long the side stream is busy before the arguments arrive there: some 20 ms."""
DEFAULT_CYCLES = 400_000_000
"""How long the default stream is busy: longer than everything on the side stream takes."""


def on_busy_streams(candidate: Candidate, function: str, given: dict[str, Any]) -> Any:
    """Call a function on a side stream of CUDA and return a copy of its result.

    The arguments hold NaN until the side stream comes to fill them in, and the result is copied by
    the side stream. Work that is launched on the default stream, or on one of its own without
    waiting, either reads NaN or comes too late.
    """
    side, default = torch.cuda.Stream(), torch.cuda.default_stream()
    tensors = {n: x for n, x in given.items() if isinstance(x, Tensor)}
    lent = {n: x.clone() for n, x in tensors.items()}
    for x in lent.values():
        if x.is_floating_point():
            poison(x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(default):
        _stay_busy(DEFAULT_CYCLES)
    with torch.cuda.stream(side):
        _stay_busy(SIDE_CYCLES)
        for name, x in tensors.items():
            lent[name].copy_(x, non_blocking=True)
        result = candidate.call_unfinished(function, **(given | lent))
        parts = result if isinstance(result, tuple) else (result,)
        copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in parts)
    torch.cuda.synchronize()
    return copies if isinstance(result, tuple) else copies[0]


def _stay_busy(cycles: int) -> None:
    """Let the current stream wait, without work and without the CPU."""
    torch.cuda._sleep(cycles)  # pyright: ignore[reportPrivateUsage]
