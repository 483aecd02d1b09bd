"""Faults that several mutants share: bodies for `Around`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.mutants.model import Edit

Arguments = dict[str, Any]
Body = Callable[[Callable[..., Any], Arguments], Any]


def positions(after: str) -> Edit:
    """Return the edit that places the queries of a sequence otherwise."""
    before = "return torch.arange(self.num_keys - self.num_queries, self.num_keys, device=device)"
    return Edit("places", before, f"return {after}")


def history_of(which: str) -> tuple[Edit, ...]:
    """Return edits that give all sequences of a batch one history.

    Args:
        which: an expression over `every`, the list of the sequences' spans.
    """
    start = "    end1 = end2 = 0\n"
    return (
        Edit(
            "places",
            start,
            f"{start}    global _HISTORY\n    every = list(spans(cu_seqlens_q, cu_seqlens_k))\n"
            f"    _HISTORY = {which} if every else 0\n",
        ),
        positions("torch.arange(_HISTORY, _HISTORY + self.num_queries, device=device)"),
    )


FIRST_HISTORY = history_of("every[0].num_keys - every[0].num_queries")
"""One scalar history for the batch, that of its first sequence."""
LONGEST_HISTORY = history_of("max(s.num_keys for s in every) - max(s.num_queries for s in every)")
"""One scalar history for the batch, max_seqlen_k - max_seqlen_q."""


def shared_scale(*names: str) -> Body:
    """Return a body that scales arguments by a power of two taken from the whole batch.

    In binary arithmetic that changes nothing, unless the batch holds a NaN or an infinity.
    """

    def body(inner: Callable[..., Any], given: Arguments) -> Any:
        for name in names:
            given[name] = rescale(given[name])
        return inner(**given)

    return body


def rescale(x: Tensor) -> Tensor:
    """Divide by a power of two near the largest number, and multiply by it again."""
    if x.numel() == 0 or not x.is_floating_point():
        return x
    scale = torch.exp2(x.detach().double().abs().amax().log2().ceil().clamp(min=-8, max=8))
    return (x.double() / scale * scale).to(x.dtype)


def wrapped_offsets(*names: str) -> Body:
    """Return a body that reads rows of arguments at offsets that overflow.

    They do so at 2^15 instead of 2^31 elements, so that it shows on small cases.
    """

    def body(inner: Callable[..., Any], given: Arguments) -> Any:
        for name in names:
            x: Tensor = given[name]
            row = max(x[:1].numel(), 1)
            rows = torch.arange(len(x), device=x.device)
            given[name] = x[rows % ((1 << 15) // row + 1)] if len(x) else x
        return inner(**given)

    return body


def behind(x: Tensor) -> Tensor | None:
    """Return the element behind the end of a tensor, or None if its storage ends there."""
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    if x.numel() == 0 or last + 1 >= x.untyped_storage().nbytes() // x.element_size():
        return None
    return x.as_strided((1,), (1,), last + 1)
