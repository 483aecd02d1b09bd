"""The stages as torch operators, `torch.ops.infllmv2_triton.*`, for `torch.compile`.

None of them looks at the values of a tensor on the host. Operators take numbers, so a config
travels as a list of them. In `select` its `dense_len` holds: shorter sequences get -1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from infllmv2_impls.packing import Lengths, Windows
from infllmv2_reference.config import SparseConfig

from . import compress, select
from .device import unit_stride

_LSE = ("exact", "approximate")
_POOLING = ("overlap", "paper_eq7")
_LENGTHS = "SymInt max_seqlen_q, SymInt max_seqlen_k, int[] config"
_SCORING = (
    "(Tensor q, Tensor k_c1, Tensor k_c2, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    f"Tensor cu_seqlens_c1, Tensor cu_seqlens_c2, {_LENGTHS}) -> Tensor"
)
_FROM_SCORES = f"(Tensor scores, Tensor cu_seqlens_q, Tensor cu_seqlens_k, {_LENGTHS}) -> Tensor"


def encode(config: SparseConfig, dense_len: int) -> list[int]:
    """Return what the operators take as `config`, with another `dense_len`."""
    return [
        config.block_size,
        config.kernel_size,
        config.kernel_stride,
        config.init_blocks,
        config.window_size,
        config.topk,
        dense_len,
        _LSE.index(config.lse),
        config.lse_kernel_size,
        config.lse_kernel_stride,
        config.local_blocks,
        _POOLING.index(config.pooling),
    ]


@functools.lru_cache
def _decode(*numbers: int) -> SparseConfig:
    block, size, stride, init, window, topk, dense, lse, size2, stride2, local, pooling = numbers
    return SparseConfig(
        block_size=block,
        kernel_size=size,
        kernel_stride=stride,
        init_blocks=init,
        window_size=window,
        topk=topk,
        dense_len=dense,
        lse=_LSE[lse],
        lse_kernel=(size2, stride2),
        local_override=local,
        pooling=_POOLING[pooling],
    )


@torch.library.custom_op("infllmv2_triton::compress_keys", mutates_args=())
def compress_keys(
    k: Tensor, cu_seqlens_k: Tensor, kernel_size: int, kernel_stride: int
) -> tuple[Tensor, Tensor]:
    """Compute stage 1: `[total_k // kernel_stride, HK, D]` and `cu_seqlens_c`."""
    return compress.compress_keys(k, cu_seqlens_k, kernel_size, kernel_stride)


@compress_keys.register_fake
def _(
    k: Tensor, cu_seqlens_k: Tensor, kernel_size: int, kernel_stride: int
) -> tuple[Tensor, Tensor]:
    del kernel_size
    windows = k.new_empty(k.shape[0] // kernel_stride, k.shape[1], k.shape[2])
    return windows, torch.empty_like(cu_seqlens_k)


def _windows(
    k_c1: Tensor, k_c2: Tensor, cu_seqlens_c1: Tensor, cu_seqlens_c2: Tensor, c: SparseConfig
) -> tuple[Windows, Windows]:
    return (
        Windows(unit_stride(k_c1), cu_seqlens_c1, c.kernel_size, c.kernel_stride),
        Windows(unit_stride(k_c2), cu_seqlens_c2, c.lse_kernel_size, c.lse_kernel_stride),
    )


def _scoring_operator(
    name: str,
    stages: Callable[[Tensor, Windows, Windows, Lengths, SparseConfig], Tensor],
    columns: Callable[[Lengths, SparseConfig], int],
    dtype: torch.dtype,
) -> CustomOpDef:
    """Define an operator that begins with scores and returns `[HK, total_q, columns]`."""

    def run(q: Tensor, k_c1: Tensor, k_c2: Tensor, *rest: Any) -> Tensor:
        ends_q, ends_k, ends_c1, ends_c2, max_seqlen_q, max_seqlen_k, numbers = rest
        config = _decode(*numbers)
        lengths = Lengths(ends_q, ends_k, max_seqlen_q, max_seqlen_k)
        c1, c2 = _windows(k_c1, k_c2, ends_c1, ends_c2, config)
        return stages(unit_stride(q), c1, c2, lengths, config)

    def fake(q: Tensor, k_c1: Tensor, k_c2: Tensor, *rest: Any) -> Tensor:
        del k_c2
        ends_q, ends_k, _, _, max_seqlen_q, max_seqlen_k, numbers = rest
        lengths = Lengths(ends_q, ends_k, max_seqlen_q, max_seqlen_k)
        shape = k_c1.shape[1], q.shape[0], columns(lengths, _decode(*numbers))
        return q.new_empty(shape, dtype=dtype)

    operator = torch.library.custom_op(
        f"infllmv2_triton::{name}", run, mutates_args=(), schema=_SCORING
    )
    operator.register_fake(fake)
    return operator


def _block_operator(
    name: str,
    stage: Callable[[Tensor, Lengths, SparseConfig], Tensor],
    columns: Callable[[Lengths, SparseConfig], int],
    dtype: torch.dtype,
) -> CustomOpDef:
    """Define an operator that begins with stored scores and returns `[HK, total_q, columns]`."""

    def run(scores: Tensor, *rest: Any) -> Tensor:
        *lengths, numbers = rest
        return stage(unit_stride(scores), Lengths(*lengths), _decode(*numbers))

    def fake(scores: Tensor, *rest: Any) -> Tensor:
        *lengths, numbers = rest
        shape = *scores.shape[:2], columns(Lengths(*lengths), _decode(*numbers))
        return scores.new_empty(shape, dtype=dtype)

    operator = torch.library.custom_op(
        f"infllmv2_triton::{name}", run, mutates_args=(), schema=_FROM_SCORES
    )
    operator.register_fake(fake)
    return operator


def _budget(_: Lengths, config: SparseConfig) -> int:
    return config.budget


score_windows = _scoring_operator(
    "score_windows",
    select.score_windows,
    lambda lengths, config: select.padded(lengths.most_windows(config)),
    torch.float32,
)
score_blocks = _scoring_operator(
    "score_blocks",
    select.score_blocks,
    lambda lengths, config: select.padded(lengths.most_blocks(config)),
    torch.float32,
)
select_by_windows = _scoring_operator("select", select.select, _budget, torch.int32)
pool_blocks = _block_operator("pool_blocks", select.pool_blocks, Lengths.most_blocks, torch.float32)
select_blocks = _block_operator("select_blocks", select.select_blocks, _budget, torch.int32)
