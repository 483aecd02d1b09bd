"""The functions of the contract: check the arguments, then work sequence by sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_impls import checks
from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_blocks, num_windows
from infllmv2_reference.layout import cu_seqlens_of, lengths_of

from . import blocks, windows
from .attend import attend
from .cache import EagerCache
from .places import Place, packed_places

CAPABILITIES: dict[str, Any] = {
    "devices": ("cpu", "cuda"),
    "dtypes": ("float16", "bfloat16", "float32", "float64"),
    "lse_modes": ("exact", "approximate"),
    "lse_ratios": None,
    "pooling_modes": ("overlap", "paper_eq7"),
    "gradients": True,
    "use_nope": True,
    "deterministic": True,
    "batch_invariant": False,  # BLAS picks other kernels, with other bits, for other shapes
    "validates": ("shapes", "dtypes", "devices", "cu_seqlens", "selected", "config"),
    "arithmetic": {
        "accumulate": "float32",
        "products": "ieee",
        "probabilities": "float32",
        "scores": "float32",
    },
}


class EagerImplementation:
    """Offer every function of the contract; see `infllmv2_conformance.protocol` for the shapes.

    Sums, scores and LSE are float32, float64 for float64 inputs.
    """

    capabilities = CAPABILITIES

    @torch.no_grad()
    def compress_keys(
        self,
        *,
        k: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_k: int,
        kernel_size: int,
        kernel_stride: int,
    ) -> tuple[Tensor, Tensor]:
        """Mean-pool keys `[total_k, HK, D]` into windows `[total_c, HK, D]`; add `cu_seqlens_c`."""
        checks.check_compress(k, cu_seqlens_k, max_seqlen_k, kernel_size, kernel_stride)
        counts = [num_windows(n, kernel_size, kernel_stride) for n in lengths_of(cu_seqlens_k)]
        ends, key_ends = cu_seqlens_of(counts), cu_seqlens_k.tolist()
        result = k.new_empty(sum(counts), *k.shape[1:])
        for i, end in enumerate(ends.tolist()[1:]):
            keys = k[key_ends[i] : key_ends[i + 1]]
            result[end - counts[i] : end] = windows.compress(keys, kernel_size, kernel_stride)
        return result, ends.to(k.device)

    @torch.no_grad()
    def score_windows(
        self,
        *,
        q: Tensor,
        k_c1: Tensor,
        k_c2: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        cu_seqlens_c1: Tensor,
        cu_seqlens_c2: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        config: SparseConfig,
    ) -> Tensor:
        """Score windows: `[HK, total_q, C]`, -inf where invisible."""
        lengths = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_c1, cu_seqlens_c2)
        checks.check_scoring(q, k_c1, k_c2, *lengths, max_seqlen_q, max_seqlen_k, config)
        places = packed_places(cu_seqlens_q, cu_seqlens_k, config)
        columns = max((place.num_windows for place in places), default=0)
        return blocks.score_sequences(q, k_c1, k_c2, places, columns, config, pooled=False)

    @torch.no_grad()
    def pool_blocks(
        self,
        *,
        scores: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        config: SparseConfig,
    ) -> Tensor:
        """Pool scores `[HK, total_q, C]` into blocks: `[HK, total_q, N]`."""
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        checks.check_scores("scores", scores, *lengths, config)
        places = packed_places(cu_seqlens_q, cu_seqlens_k, config)
        return blocks.pool_sequences(scores, places, _most_blocks(places, config), config)

    @torch.no_grad()
    def select_blocks(
        self,
        *,
        block_scores: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        config: SparseConfig,
    ) -> Tensor:
        """Select by block scores `[HK, total_q, N]`: int32 `[HK, total_q, K]`."""
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        checks.check_scores("block_scores", block_scores, *lengths, config)
        return blocks.select_sequences(
            block_scores, packed_places(cu_seqlens_q, cu_seqlens_k), config
        )

    @torch.no_grad()
    def score_blocks(
        self,
        *,
        q: Tensor,
        k_c1: Tensor,
        k_c2: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        cu_seqlens_c1: Tensor,
        cu_seqlens_c2: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        config: SparseConfig,
    ) -> Tensor:
        """Score and pool in chunks, without all window scores at once: `[HK, total_q, N]`."""
        lengths = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_c1, cu_seqlens_c2)
        checks.check_scoring(q, k_c1, k_c2, *lengths, max_seqlen_q, max_seqlen_k, config)
        places = packed_places(cu_seqlens_q, cu_seqlens_k, config)
        columns = _most_blocks(places, config)
        return blocks.score_sequences(q, k_c1, k_c2, places, columns, config, pooled=True)

    @torch.no_grad()
    def select(
        self,
        *,
        q: Tensor,
        k_c1: Tensor,
        k_c2: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        cu_seqlens_c1: Tensor,
        cu_seqlens_c2: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        config: SparseConfig,
    ) -> Tensor:
        """Score, pool and select in chunks: int32 `[HK, total_q, K]`."""
        lengths = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_c1, cu_seqlens_c2)
        checks.check_scoring(q, k_c1, k_c2, *lengths, max_seqlen_q, max_seqlen_k, config)
        selected = _no_selection(q, k_c1.shape[1], config)
        for place in packed_places(cu_seqlens_q, cu_seqlens_k, config):
            blocks.select_sequence(q, k_c1, k_c2, place, config, selected)
        return selected

    def attend(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selected: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        block_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Attend the blocks `selected`: `out` `[total_q, HQ, D]` and `lse` `[total_q, HQ]`."""
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        checks.check_attend(q, k, v, selected, *lengths, block_size)
        places = packed_places(cu_seqlens_q, cu_seqlens_k)
        return attend(q, k, v, selected, places, [], block_size)

    def attention(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        config: SparseConfig,
        selection_q: Tensor | None = None,
        selection_k: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the whole forward: `out`, `lse` and `selected`, -1 in dense sequences."""
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        checks.check_attention(q, k, v, *lengths, config, selection_q, selection_k)
        sparse, dense = _switch(packed_places(cu_seqlens_q, cu_seqlens_k), config)
        selection_q = q if selection_q is None else selection_q
        selection_k = k if selection_k is None else selection_k
        selected = _no_selection(q, k.shape[1], config)
        with torch.no_grad():
            for place in sparse:
                keys = selection_k[place.keys]
                blocks.select_by_keys(selection_q, keys, place, config, selected)
        return *attend(q, k, v, selected, sparse, dense, config.block_size), selected

    def new_cache(
        self,
        *,
        batch: int,
        max_seqlen_k: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        config: SparseConfig,
    ) -> EagerCache:
        """Return an empty cache for `batch` sequences of at most `max_seqlen_k` tokens each."""
        checks.check_new_cache(batch, max_seqlen_k, num_kv_heads, head_dim, dtype, config)
        return EagerCache.empty(
            batch, max_seqlen_k, (num_kv_heads, head_dim), dtype, device, config
        )

    @torch.no_grad()
    def append(
        self,
        *,
        cache: EagerCache,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        selection_k: Tensor | None = None,
    ) -> None:
        """Append new tokens `[total, HK, D]` to the sequences of `cache`, in place."""
        stored = cache.keys.flatten(0, 1)
        limits = (stored, cache.lengths, cache.capacity, cache.config)
        checks.check_append(k, v, cu_seqlens, max_seqlen, selection_k, *limits)
        ends = cu_seqlens.tolist()
        for i in range(len(ends) - 1):
            rows = slice(ends[i], ends[i + 1])
            cache.append(i, k[rows], v[rows], None if selection_k is None else selection_k[rows])

    def decode(
        self,
        *,
        cache: EagerCache,
        q: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        selection_q: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from the last `T_i` tokens of every sequence; returns as `attention`."""
        config, keys, values = cache.config, cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
        limits = (keys, cache.lengths, config)
        checks.check_decode(q, cu_seqlens_q, max_seqlen_q, selection_q, *limits)
        sparse, dense = _switch(cache.places(lengths_of(cu_seqlens_q)), config)
        selection_q = q if selection_q is None else selection_q
        selected = _no_selection(q, keys.shape[1], config)
        k_c1, k_c2 = cache.k_c1.flatten(0, 1), cache.k_c2.flatten(0, 1)
        with torch.no_grad():
            for place in sparse:
                blocks.select_sequence(selection_q, k_c1, k_c2, place, config, selected)
        return *attend(q, keys, values, selected, sparse, dense, config.block_size), selected

    def reset(self, *, cache: EagerCache, lengths: list[int]) -> None:
        """Cut every sequence of `cache` back to its first `lengths[i]` tokens, in place."""
        checks.check_reset(lengths, cache.lengths)
        cache.lengths = list(lengths)  # windows in use are counted from the lengths

    def cached_windows(self, *, cache: EagerCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `k_c1, cu_seqlens_c1, k_c2, cu_seqlens_c2`, packed copies."""
        return cache.packed_windows()


def _switch(places: list[Place], config: SparseConfig) -> tuple[list[Place], list[Place]]:
    """Part the sequences into sparse and dense ones (decision D8)."""
    sparse = [place for place in places if config.is_sparse(place.num_keys)]
    return sparse, [place for place in places if not config.is_sparse(place.num_keys)]


def _no_selection(q: Tensor, num_kv_heads: int, config: SparseConfig) -> Tensor:
    shape = num_kv_heads, len(q), config.budget
    return torch.full(shape, -1, dtype=torch.int32, device=q.device)


def _most_blocks(places: list[Place], config: SparseConfig) -> int:
    return max((num_blocks(place.num_keys, config.block_size) for place in places), default=0)


IMPLEMENTATION = EagerImplementation()
"""What `infllmv2_conformance.loading` finds under the name `eager`."""
