"""Call an implementation on a side stream of CUDA while streams are busy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .candidate import Candidate
from .guards import poison

SHORT, LONG = 20_000_000, 400_000_000
"""Clock cycles that a stream is kept busy for: about 10 ms, and 0.2 s."""
LATE_ARGUMENTS = (LONG, 0)
"""Cycles of the side and the default stream: work that is launched elsewhere starts too early."""
BUSY_DEFAULT = (SHORT, LONG)
"""Work that is launched on the default stream, after waiting for the arguments, ends too late."""


def on_busy_streams(
    candidate: Candidate, function: str, given: dict[str, Any], busy: tuple[int, int]
) -> Any:
    """Call a function on a side stream and return a copy of its result.

    The arguments hold NaN until the side stream comes to fill them in, and the side stream copies
    the result as soon as it has done what was queued there. Work in another stream that does not
    wait for the side stream, or that the side stream does not wait for, shows.

    Args:
        candidate: the implementation.
        function: the contract function.
        given: its arguments.
        busy: `LATE_ARGUMENTS` or `BUSY_DEFAULT`.
    """
    side, default = torch.cuda.Stream(), torch.cuda.default_stream()
    tensors = {n: x for n, x in given.items() if isinstance(x, Tensor)}
    lent = {n: x.clone() for n, x in tensors.items()}
    for x in lent.values():
        if x.is_floating_point():  # integers stay: garbage in lengths would end the process
            poison(x, torch.nan)
    torch.cuda.synchronize()
    for stream, cycles in zip((side, default), busy, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)  # pyright: ignore[reportPrivateUsage]
    with torch.cuda.stream(side):
        for name, x in tensors.items():
            lent[name].copy_(x, non_blocking=True)
        result = candidate.call_unfinished(function, **(given | lent))
        parts = result if isinstance(result, tuple) else (result,)
        copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in parts)
    torch.cuda.synchronize()
    return copies if isinstance(result, tuple) else copies[0]
