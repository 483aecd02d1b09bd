"""Stages 1 to 6 in order, for packed batches and from a cache, with the switch on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_impls.packing import Lengths, Windows
from infllmv2_reference.config import SparseConfig

from .attend import Kernels, attend
from .cache import CupyCache
from .compress import compress_keys
from .select import select


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    config: SparseConfig,
    selection_q: Tensor | None,
    selection_k: Tensor | None,
    kernels: Kernels,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `out`, `lse` and the selection."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if config.is_sparse(max_seqlen_k):
        keys = k if selection_k is None else selection_k
        sizes = (config.kernel_size, config.kernel_stride)
        k_c1, ends_c1 = compress_keys(keys, cu_seqlens_k, *sizes)
        k_c2, ends_c2 = k_c1, ends_c1  # not read with the exact normaliser
        if config.lse == "approximate":
            sizes = (config.lse_kernel_size, config.lse_kernel_stride)
            k_c2, ends_c2 = compress_keys(keys, cu_seqlens_k, *sizes)
        queries = q if selection_q is None else selection_q
        windows = (k_c1, k_c2, ends_c1, ends_c2)
        selected = _select(queries, *windows, *lengths, config, kernels)
    else:
        selected = _nothing(q, k.shape[1], config)
    return *_attend(q, k, v, selected, *lengths, config, kernels), selected


def decode(
    cache: CupyCache,
    q: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    selection_q: Tensor | None,
    kernels: Kernels,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `attention` returns over the tokens of the cache."""
    config = cache.config
    lengths = (*cache.packing(cu_seqlens_q), max_seqlen_q, cache.capacity)
    if config.is_sparse(cache.capacity):
        queries = q if selection_q is None else selection_q
        starts = (cache.window_starts(cache.k_c1), cache.window_starts(cache.k_c2))
        windows = (cache.k_c1, cache.k_c2, *starts)
        selected = _select(queries, *windows, *lengths, config, kernels)
    else:
        selected = _nothing(q, cache.keys.shape[1], config)
    return *_attend(q, cache.keys, cache.values, selected, *lengths, config, kernels), selected


def _select(
    q: Tensor,
    k_c1: Tensor,
    k_c2: Tensor,
    ends_c1: Tensor,
    ends_c2: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    config: SparseConfig,
    kernels: Kernels,
) -> Tensor:
    c1 = Windows(k_c1, ends_c1, config.kernel_size, config.kernel_stride)
    c2 = Windows(k_c2, ends_c2, config.lse_kernel_size, config.lse_kernel_stride)
    lengths = Lengths(ends_q, ends_k, max_seqlen_q, max_seqlen_k)
    return select(q, c1, c2, lengths, config, kernels)


def _nothing(q: Tensor, num_kv_heads: int, config: SparseConfig) -> Tensor:
    shape = num_kv_heads, q.shape[0], config.budget
    return torch.full(shape, -1, dtype=torch.int32, device=q.device)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    config: SparseConfig,
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    return attend(
        q=q,
        k=k,
        v=v,
        selected=selected,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        block_size=config.block_size,
        dense_len=None if config.dense_len < 0 else config.dense_len,
        kernels=kernels,
    )
