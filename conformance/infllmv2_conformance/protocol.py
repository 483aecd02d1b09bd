"""The contract: what an implementation may offer, and what it claims.

An implementation is any object or module with a mapping `capabilities` and any subset of the
functions of `Implementation`. It need not import this package. Tensors are packed (`layout.py` of
the reference says how); shape letters are those of the reference, with `total_q` and `total_k` the
tokens of all sequences together, and `batch` the sequences.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from infllmv2_reference import SparseConfig

Function = Literal[
    "compress_keys",
    "score_windows",
    "pool_blocks",
    "select_blocks",
    "score_blocks",
    "select",
    "attend",
    "attention",
    "new_cache",
    "append",
    "decode",
    "reset",
    "cached_windows",
]


class Implementation(Protocol):
    """List every function that an implementation may offer; each one is optional.

    All arguments are passed by keyword, with the names given here. `cu_seqlens_*` are int32
    `[batch + 1]` on the device of the tensors; `max_seqlen_*` are host integers, at least the
    longest sequence. Sequence i has `T_i` queries at the last positions of its `S_i >= T_i` keys;
    empty sequences and `T_i = 0` are legal. Inputs are not modified, and every element of a result
    that the contract defines is written.
    """

    capabilities: Any
    """A mapping with the fields of `Capabilities`, or one itself."""

    def compress_keys(
        self,
        *,
        k: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_k: int,
        kernel_size: int,
        kernel_stride: int,
    ) -> tuple[Tensor, Tensor]:
        """Mean-pool `k` `[total_k, HK, D]` into windows.

        Returns:
            The windows of all sequences `[total_c, HK, D]` in the dtype of `k`, packed, and their
            `cu_seqlens_c` int32 `[batch + 1]`. Rows behind `cu_seqlens_c[-1]` may be anything.
        """
        ...

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
        """Score the windows `k_c1` for the queries `q` `[total_q, HQ, D]`.

        Returns:
            `[HK, total_q, C]` with `C` at least the windows of the longest sequence. Entries of
            invisible windows, and columns behind a sequence's own windows, may be anything.
        """
        ...

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
        """Pool `scores` `[HK, total_q, C]`; entries of invisible windows are arbitrary.

        Returns:
            `[HK, total_q, N]` in the dtype of `scores`, with `N` at least the blocks of the longest
            sequence; -inf where no visible window overlaps the block. Blocks behind the query's own
            may be anything.
        """
        ...

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
        """Select by `block_scores` `[HK, total_q, N]`; forced and future entries are arbitrary.

        Returns:
            int32 `[HK, total_q, config.budget]`: block ids of the query's own sequence, strictly
            ascending, then -1.
        """
        ...

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
        """Compute `pool_blocks(score_windows(...))`; forced blocks may hold anything as well."""
        ...

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
        """Compute `select_blocks(score_blocks(...))`, free among blocks it cannot tell apart."""
        ...

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
    ) -> tuple[Tensor, Tensor | None]:
        """Attend the blocks `selected`, int32 `[HK, total_q, K]`, ascending and then -1.

        Returns:
            `out` `[total_q, HQ, D]` in the dtype of `q`, and `lse` float32 `[total_q, HQ]` (natural
            logarithm) or None if `capabilities` says `returns_lse=False`. With `gradients=True`,
            `out` is differentiable by q, k and v.
        """
        ...

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
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute the whole forward; each sequence is dense or sparse by its own length.

        Returns:
            `out` and `lse` as in `attend`, and the selection as in `select`, or None if
            `capabilities` says `returns_selection=False`. Rows of dense sequences hold anything.
        """
        ...

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
    ) -> Any:
        """Return an empty cache for `batch` sequences of at most `max_seqlen_k` tokens each."""
        ...

    def append(
        self,
        *,
        cache: Any,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        selection_k: Tensor | None = None,
    ) -> None:
        """Append new tokens, packed, to the sequences of `cache`, which is modified in place."""
        ...

    def decode(
        self,
        *,
        cache: Any,
        q: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        selection_q: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attend from the last `T_i` tokens of every sequence; returns as `attention`."""
        ...

    def reset(self, *, cache: Any, lengths: list[int]) -> None:
        """Cut every sequence of `cache` back to its first `lengths[i]` tokens, in place."""
        ...

    def cached_windows(self, *, cache: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the cache's `k_c1, cu_seqlens_c1, k_c2, cu_seqlens_c2`, packed."""
        ...
