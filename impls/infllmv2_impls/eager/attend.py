"""Stage 5: softmax attention over gathered tokens, with a backward that gathers them again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .places import Place, wide_dtype
from .tiles import Sizes, Tile, dense_chunks, sparse_chunks


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    sparse: list[Place],
    dense: list[Place],
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Attend the selected blocks in the `sparse` sequences, and all visible tokens in the `dense`.

    Args:
        q: `[total_q, HQ, D]`.
        k: `[any, HK, D]`; the places say where in it the sequences lie.
        v: as `k`.
        selected: int32 `[HK, total_q, K]`; rows of dense sequences are not read.
        sparse: the sequences that attend their selected blocks.
        dense: the sequences that attend everything up to each query.
        block_size: B.

    Returns:
        `out` in the dtype of `q` and `lse` in float32 or wider; both are differentiable.

    Source: Eq. 1 (decisions D1, D8).
    """
    return _Attend.apply(q, k, v, selected, sparse, dense, block_size)  # type: ignore[return-value]


Sums = tuple[Tensor, Tensor, Tensor]
"""`sum exp(logit - top) v` `[HK, t, G, D]`, `top` and `sum exp(logit - top)` `[HK, t, G]`."""


class _Attend(torch.autograd.Function):
    """Keep only inputs and results for the backward: probabilities are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selected: Tensor,
        sparse: list[Place],
        dense: list[Place],
        block_size: int,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(q.dtype)
        out = q.new_zeros(q.shape, dtype=wide)
        top, total = (q.new_zeros(q.shape[:2], dtype=wide) for _ in range(2))
        for place, chunks in _walk(q, k, selected, sparse, dense, block_size):
            keys, values = (_token_rows(x, place) for x in (k, v))
            for chunk, tiles in chunks:
                rows = place.rows(chunk)
                queries = _by_kv_head(q[rows].to(wide), k.shape[1])
                sums = _empty_sums(queries)
                for tile in tiles:
                    sums = _merge(sums, _forward_tile(queries, keys, values, tile))
                out[rows], top[rows], total[rows] = (_by_query(x) for x in sums)
        total_or_1 = torch.where(total == 0, 1, total)
        out /= total_or_1[..., None]
        ctx.places, ctx.block_size = (sparse, dense), block_size
        ctx.save_for_backward(q, k, v, selected, out, top, total_or_1)
        return out.to(q.dtype, copy=True), top + total.log()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grad_outputs
        q, k, v, selected, out, top, total = ctx.saved_tensors
        sparse, dense = ctx.places
        wide, split = out.dtype, partial(_by_kv_head, num_kv_heads=k.shape[1])
        grad_q = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
        grad_k, grad_v = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
        for place, chunks in _walk(q, k, selected, sparse, dense, ctx.block_size):
            tokens = _token_rows(k, place), _token_rows(v, place)
            grads = _token_rows(grad_k, place), _token_rows(grad_v, place)
            for chunk, tiles in chunks:
                rows = place.rows(chunk)
                grad_rows = grad_out[rows].to(wide)
                shift = grad_lse[rows] - (grad_rows * out[rows]).sum(dim=-1)  # [t, HQ]
                queries = split(q[rows].to(wide)), split(top[rows]), split(total[rows])
                results = split(grad_rows), split(shift)
                for tile in tiles:
                    grad_q[rows] += _by_query(
                        _backward_tile(*queries, *results, *tokens, *grads, tile)
                    )
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), *[None] * 4


def _walk(
    q: Tensor, k: Tensor, selected: Tensor, sparse: list[Place], dense: list[Place], block_size: int
) -> Iterator[tuple[Place, Iterator[tuple[slice, list[Tile]]]]]:
    """Yield every sequence with the chunks of its query rows and their tiles."""
    sizes = Sizes.of(q, k)
    for place in sparse:
        yield place, sparse_chunks(selected[:, place.queries], place, block_size, sizes)
    for place in dense:
        yield place, dense_chunks(place, sizes, q.device)


def _empty_sums(q: Tensor) -> Sums:
    """Return the sums over no token."""
    shape = q.shape[:3]
    return torch.zeros_like(q), q.new_full(shape, -torch.inf), q.new_zeros(shape)


def _forward_tile(q: Tensor, keys: Tensor, values: Tensor, tile: Tile) -> Sums:
    """Sum over one tile for the rows `[HK, t, G, D]`."""
    logits = _logits(q, tile.gather(keys, q.dtype), tile)  # [HK, R, rows * G, L]
    top = logits.amax(dim=-1, keepdim=True)
    weights = logits.sub_(_finite(top)).exp_()
    total = weights.sum(dim=-1)
    values = weights @ tile.gather(values, q.dtype)
    return values.view(q.shape), top.view(q.shape[:3]), total.view(q.shape[:3])


def _merge(a: Sums, b: Sums) -> Sums:
    """Join the sums over two sets of tokens.

    Their logarithms would do, but rounding one of 700 costs a factor of 1 + 4e-5 in float32.
    """
    top = torch.maximum(a[1], b[1])
    shares = [(x - _finite(top)).exp() for x in (a[1], b[1])]
    values = a[0] * shares[0][..., None] + b[0] * shares[1][..., None]
    return values, top, a[2] * shares[0] + b[2] * shares[1]


def _finite(top: Tensor) -> Tensor:
    """Replace the largest logit of no token at all by 0, so that it can be subtracted."""
    return torch.where(top == -torch.inf, 0, top)


def _backward_tile(
    q: Tensor,
    top: Tensor,
    total: Tensor,
    grad_out: Tensor,
    shift: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
    tile: Tile,
) -> Tensor:
    """Add a tile's part to the gradients of keys and values, and return that of `q`.

    With `p = exp(logit - top) / total` and `shift = grad_lse - grad_out . out`:
    `grad_v = p grad_out` and `grad_logit = p (grad_out . v + shift)`.
    """
    grouped = (*tile.tokens.shape[:2], -1)
    k, v = tile.gather(keys, q.dtype), tile.gather(values, q.dtype)  # [HK, R, L, D]
    logits = _logits(q, k, tile)
    weights = logits.sub_(_finite(top).view(*grouped, 1)).exp_().div_(total.view(*grouped, 1))
    weights = weights.masked_fill_(~tile.admitted[:, :, None], 0)
    grad_rows = grad_out.reshape(*grouped, q.shape[-1])
    tile.add_to(grad_values, weights.mT @ grad_rows)
    grad_logits = grad_rows @ v.mT + shift.view(*grouped, 1)
    grad_logits = grad_logits.mul_(weights).mul_(q.shape[-1] ** -0.5)
    tile.add_to(grad_keys, grad_logits.mT @ q.reshape(*grouped, q.shape[-1]))
    return (grad_logits @ k).view(q.shape)


def _logits(q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """Return `scale * q . k` `[HK, R, rows * G, L]`, -inf where not admitted."""
    rows = q.reshape(*k.shape[:2], -1, k.shape[-1])  # [HK, R, rows * G, D]
    logits = (rows @ k.mT).mul_(k.shape[-1] ** -0.5)
    return logits.masked_fill_(~tile.admitted[:, :, None], -torch.inf)


def _token_rows(x: Tensor, place: Place) -> Tensor:
    """Return the tokens of one sequence of `[any, HK, D]` as `[S * HK, D]`."""
    return x[place.keys].reshape(-1, x.shape[2])


def _by_kv_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """Turn rows `[t, HQ, ...]` into contiguous `[HK, t, G, ...]`."""
    return x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).contiguous()


def _by_query(x: Tensor) -> Tensor:
    """Turn `[HK, t, G, ...]` back into rows `[t, HQ, ...]`."""
    return x.transpose(0, 1).flatten(1, 2)
