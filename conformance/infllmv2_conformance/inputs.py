"""Build the tensors of a case. Every regime says what it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infllmv2_reference.layout import Span, cu_seqlens_of, spans

from .cases import Case
from .memory import remembered


@dataclass(frozen=True)
class Inputs:
    """Hold the packed tensors of a case.

    Args:
        q: `[total_q, HQ, D]`.
        k: `[total_k, HK, D]`.
        v: `[total_k, HK, D]`.
        selection_q: as q, or None without `use_nope`.
        selection_k: as k, or None without `use_nope`.
        cu_seqlens_q: int32 `[batch + 1]`.
        cu_seqlens_k: int32 `[batch + 1]`.
        max_seqlen_q: the longest T.
        max_seqlen_k: the longest S.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    selection_q: Tensor | None
    selection_k: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def spans(self) -> list[Span]:
        """Return the place of every sequence."""
        return list(spans(self.cu_seqlens_q, self.cu_seqlens_k))

    @property
    def lengths(self) -> dict[str, Tensor | int]:
        """Return the four arguments that describe the packing."""
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return {name: getattr(self, name) for name in names}


Rows = slice | Tensor
"""Rows of a packed tensor: a range, or their indices."""


def pick(inputs: Inputs, rows: Sequence[tuple[Rows, Rows]], heads: slice | None = None) -> Inputs:
    """Pack other rows of the same tensors into a batch.

    Args:
        inputs: where the rows are taken from.
        rows: for every new sequence, its rows of the packed queries and of the packed keys.
        heads: key/value heads to keep, with their query heads; all unless given.
    """
    group = inputs.q.shape[1] // inputs.k.shape[1]
    heads = heads or slice(0, inputs.k.shape[1])
    q_heads = slice(heads.start * group, heads.stop * group)
    q_rows, k_rows = [q for q, _ in rows], [k for _, k in rows]

    def take(x: Tensor | None, which: list[Rows], of: slice) -> Tensor | None:
        if x is None:
            return None
        return torch.cat([x[:0, of], *(x[r, of] for r in which)]).contiguous()

    lengths = [
        [r.stop - r.start if isinstance(r, slice) else len(r) for r in which]
        for which in (q_rows, k_rows)
    ]
    tensors = {n: take(getattr(inputs, n), q_rows, q_heads) for n in ("q", "selection_q")}
    tensors |= {n: take(getattr(inputs, n), k_rows, heads) for n in ("k", "v", "selection_k")}
    return Inputs(
        **tensors,  # pyright: ignore[reportArgumentType]
        cu_seqlens_q=cu_seqlens_of(lengths[0], inputs.q.device),
        cu_seqlens_k=cu_seqlens_of(lengths[1], inputs.q.device),
        max_seqlen_q=max(lengths[0], default=0),
        max_seqlen_k=max(lengths[1], default=0),
    )


def build_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the tensors of a case; on every device the same numbers.

    Each sequence is drawn on its own and as if it had only queries with a key of their own
    (prefill): a chunk holds the last T of the rows that prefill would hold.
    """
    packed = [x.to(device, copy=True) for x in _draw(case)]
    q_lengths, k_lengths = [t for t, _ in case.sequences], [s for _, s in case.sequences]
    return Inputs(
        q=packed[0],
        k=packed[1],
        v=packed[2],
        selection_q=packed[3] if case.use_nope else None,
        selection_k=packed[4] if case.use_nope else None,
        cu_seqlens_q=cu_seqlens_of(q_lengths, device),
        cu_seqlens_k=cu_seqlens_of(k_lengths, device),
        max_seqlen_q=max(q_lengths, default=0),
        max_seqlen_k=max(k_lengths, default=0),
    )


@remembered
def _draw(case: Case) -> list[Tensor]:
    """Draw q, k and v of all sequences, packed, and again for the selection with `use_nope`."""
    dtype = getattr(torch, case.dtype)
    fill = _FILLS[case.regime]
    parts: list[tuple[Tensor, ...]] = []
    for index, (num_queries, num_keys) in enumerate(case.sequences):
        draws: list[Tensor] = []
        for which in range(2 if case.use_nope else 1):
            generator = torch.Generator().manual_seed(case.seed * 1009 + index * 31 + which * 7)
            q, k, v = fill(_Source(generator, num_keys, case))
            draws += [q[num_keys - num_queries :], k, v]
        parts.append(tuple(draws))
    heads = (case.query_heads, case.kv_heads, case.kv_heads) * 2
    empty = [torch.zeros(0, h, case.head_dim) for h in heads]
    return [
        torch.cat([empty[i], *(p[i] for p in parts)]).to(dtype).contiguous()
        for i in range(6 if case.use_nope else 3)
    ]


Triple = tuple[Tensor, Tensor, Tensor]


class _Source:
    """Draw numbers of the shapes of one sequence's q, k and v."""

    def __init__(self, generator: torch.Generator, num_keys: int, case: Case) -> None:
        self.generator, self.num_keys, self.dim = generator, num_keys, case.head_dim
        self.heads = (case.query_heads, case.kv_heads, case.kv_heads)

    def normal(self) -> Triple:
        q, k, v = (
            torch.randn(self.num_keys, h, self.dim, generator=self.generator) for h in self.heads
        )
        return q, k, v

    def integers(self, low: int, high: int, heads: int, tokens: int | None = None) -> Tensor:
        shape = (self.num_keys if tokens is None else tokens, heads, self.dim)
        return torch.randint(low, high + 1, shape, generator=self.generator).float()


def _normal(draw: _Source) -> Triple:
    """Independent standard normal numbers: every block is about as good as any other."""
    return draw.normal()


def _peaked(draw: _Source) -> Triple:
    """Logits with a standard deviation of 8: few tokens carry the softmax."""
    q, k, v = draw.normal()
    return q * 8, k, v


def _integers(draw: _Source) -> Triple:
    """Small integers: products, sums and means are exact in every dtype, and ties are many."""
    q, k, v = (draw.integers(-1, 1, h) for h in draw.heads)
    return q, k, v * 2


def _needles(draw: _Source) -> Triple:
    """A faint background and a few keys that every query of their head looks for."""
    q, k, v = draw.normal()
    num_keys, group = draw.num_keys, q.shape[1] // k.shape[1]
    direction = torch.randn(1, k.shape[1], draw.dim, generator=draw.generator)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    k = k * 0.1
    if num_keys:
        places = torch.randint(num_keys, (4,), generator=draw.generator)
        k[places] += direction * draw.dim**0.5
    return q * 0.5 + 6 * direction.repeat_interleave(group, dim=1), k, v


def _constant(draw: _Source) -> Triple:
    """All keys equal, logits exact: every score ties, every token weighs the same."""
    _, _, v = draw.normal()
    q = draw.integers(-1, 1, draw.heads[0])
    k = draw.integers(-1, 1, draw.heads[1], tokens=1).expand(draw.num_keys, -1, -1)
    return q, k, v


def _correlated(draw: _Source) -> Triple:
    """Neighbouring tokens are alike (AR(1), coefficient 0.97), as in real text."""
    q, k, v = draw.normal()
    for x in (q, k):
        for t in range(1, draw.num_keys):
            x[t] = 0.97 * x[t - 1] + (1 - 0.97**2) ** 0.5 * x[t]
    return q, k, v


def _huge(draw: _Source) -> Triple:
    """Logits in the hundreds and values in the thousands: naive exponentials overflow."""
    q, k, v = draw.normal()
    return q * 16, k * 16, v * 2000


def _tiny(draw: _Source) -> Triple:
    """Numbers near the small end of float16: nothing may be flushed or rounded away."""
    q, k, v = draw.normal()
    return q * 1e-3, k * 1e-3, v * 1e-3


def _indexed(draw: _Source) -> Triple:
    """Token j's value is positive in channel j mod D and 0 elsewhere: each token can be told."""
    q, k, v = draw.normal()
    tokens = torch.arange(draw.num_keys)
    v = torch.zeros_like(v)
    v[tokens, :, tokens % draw.dim] = (1 + (tokens % 7) / 8)[:, None]
    return q * 0.5, k, v


_FILLS: dict[str, Callable[[_Source], Triple]] = {
    "normal": _normal,
    "peaked": _peaked,
    "integers": _integers,
    "needles": _needles,
    "constant": _constant,
    "correlated": _correlated,
    "huge": _huge,
    "tiny": _tiny,
    "indexed": _indexed,
}
