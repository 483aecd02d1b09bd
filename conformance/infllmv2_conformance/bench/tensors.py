"""Draw the tensors of a workload on its device, fast at a million tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infllmv2_reference.layout import cu_seqlens_of

from .workloads import Workload

CORRELATION = 0.97
"""Of one token's q or k with the next one's, as `cases.py` draws the regime "correlated"."""
FORGOTTEN = 1e-12
"""A share of the past that float32 cannot hold beside the present."""
_CHECKSUM_ELEMENTS = 1 << 24


@dataclass
class Tensors:
    """Hold packed queries, keys and values, and how they are packed.

    Args:
        q: `[total_q, HQ, D]`.
        k: `[total_k, HK, D]`.
        v: `[total_k, HK, D]`.
        cu_seqlens_q: int32 `[batch + 1]`.
        cu_seqlens_k: int32 `[batch + 1]`.
        max_seqlen_q: T.
        max_seqlen_k: S.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def lengths(self) -> dict[str, Tensor | int]:
        """Return the four arguments that describe the packing."""
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return {name: getattr(self, name) for name in names}

    @property
    def bytes(self) -> int:
        """Return the memory of q, k and v."""
        return sum(x.numel() * x.element_size() for x in (self.q, self.k, self.v))


def draw(workload: Workload, device: torch.device) -> Tensors:
    """Draw q, k and v; the same numbers every time on the same kind of device.

    Values are independent normal numbers. Queries and keys are too ("random"), or follow a
    stationary AR(1) process along the tokens ("correlated").
    """
    shape, batch = workload.shape, workload.batch
    dtype = getattr(torch, workload.dtype)
    generator = torch.Generator(device).manual_seed(workload.seed)

    def packed(tokens: int, heads: int, correlated: bool) -> Tensor:
        result = torch.empty(batch * tokens, heads, shape.head_dim, dtype=dtype, device=device)
        for sequence in range(batch):
            rows = slice(sequence * tokens, (sequence + 1) * tokens)
            for head in range(heads):  # one at a time: float32 takes twice the memory
                size = (tokens, shape.head_dim)
                noise = torch.randn(size, generator=generator, device=device)
                result[rows, head] = (correlate(noise) if correlated else noise).to(dtype)
        return result

    correlated = workload.inputs == "correlated"
    lengths_q, lengths_k = [workload.queries] * batch, [workload.length] * batch
    return Tensors(
        q=packed(workload.queries, shape.query_heads, correlated),
        k=packed(workload.length, shape.kv_heads, correlated),
        v=packed(workload.length, shape.kv_heads, correlated=False),
        cu_seqlens_q=cu_seqlens_of(lengths_q, device),
        cu_seqlens_k=cu_seqlens_of(lengths_k, device),
        max_seqlen_q=workload.queries,
        max_seqlen_k=workload.length,
    )


def correlate(noise: Tensor, correlation: float = CORRELATION) -> Tensor:
    """Turn independent normal numbers `[tokens, ...]` into a stationary AR(1) process.

    `x[0] = e[0]` and `x[t] = r x[t-1] + sqrt(1 - r^2) e[t]`. The sum over the past doubles its
    reach in every pass, until what lies further back is forgotten: ten passes, not a loop over t.
    """
    x = noise * (1 - correlation**2) ** 0.5
    x[:1] = noise[:1]
    reach = 1
    while reach < len(x) and correlation**reach > FORGOTTEN:
        longer = x.clone()
        longer[reach:].add_(x[:-reach], alpha=correlation**reach)
        x, reach = longer, 2 * reach
    return x


def swap_heads(x: Tensor, axis: int = 1) -> None:
    """Reverse the heads in place: other numbers of the same kind at the same address."""
    x.copy_(x.flip(axis))


def checksum(x: Tensor) -> int:
    """Return a number that changes when an element does, or moves; computed where `x` lies.

    Integers wrap around. Every place has an odd weight, so that no change is lost in that.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = x.detach().reshape(-1).view(kinds[x.element_size()])
    size = min(len(flat), _CHECKSUM_ELEMENTS)
    weights = torch.arange(1, 2 * size, 2, device=x.device).to(flat.dtype)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(flat), _CHECKSUM_ELEMENTS):
        part = flat[start : start + _CHECKSUM_ELEMENTS]
        total = total * 31 + (part * weights[: len(part)]).sum(dtype=torch.int64)
    return int(total)
