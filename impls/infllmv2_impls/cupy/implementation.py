"""The functions of the contract: check what the host can see, then launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from infllmv2_impls import checks
from infllmv2_impls.packing import Lengths, Windows
from infllmv2_reference.config import SparseConfig

from . import attend as attend_stage
from . import compress, select, whole
from .cache import CupyCache
from .compiling import architecture
from .launch import capability, check_runs_here, check_runs_on
from .rows import unit_stride

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 32, 96, 256)
MOST_HEADS = 32
"""The largest group of heads that share a kv head."""

CAPABILITIES: dict[str, Any] = {
    "devices": ("cuda",),
    "dtypes": tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES),
    "head_dims": HEAD_DIMS,
    "group_sizes": (2, 1, 16, 7, 4, 8, 32),
    "block_sizes": (16, 64, 32, 128, 48),  # any other size of block, too, but for `attend`
    "lse_modes": ("exact", "approximate"),
    "pooling_modes": ("overlap", "paper_eq7"),
    "gradients": False,
    "use_nope": True,
    "deterministic": True,
    "batch_invariant": False,  # few queries are spread over more blocks, which sum otherwise
    "validates": ("dtypes", "devices", "config"),  # all else needs a look at the device
    "arithmetic": {
        "accumulate": "float32",
        "products": "ieee",
        "probabilities": "input",
        "scores": "float32",
    },
}


class CupyImplementation:
    """Offer the functions of the contract; see `infllmv2_conformance.protocol` for the shapes.

    Raises:
        RuntimeError: there is no CUDA device that is new enough, or no CuPy.
    """

    capabilities: ClassVar[dict[str, Any]] = CAPABILITIES
    kernels: ClassVar[attend_stage.Kernels] = "auto"

    def __init__(self) -> None:
        check_runs_here()

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
        """Mean-pool keys `[total_k, HK, D]` into windows `[rows, HK, D]`; add `cu_seqlens_c`.

        There are `total_k // kernel_stride` rows; those behind the last window are not written.
        """
        sizes = (max_seqlen_k, kernel_size, kernel_stride)
        checks.check_compress(k, cu_seqlens_k, *sizes, dtypes=DTYPES, values=False)
        check_runs_on("k", k)
        _check_head_dim("k", k)
        return compress.compress_keys(k, cu_seqlens_k, kernel_size, kernel_stride)

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
        """Score windows: `[HK, total_q, C]`, unwritten behind the visible ones."""
        lengths = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_c1, cu_seqlens_c2)
        bounds = (max_seqlen_q, max_seqlen_k)
        return _score(select.score_windows, q, k_c1, k_c2, *lengths, *bounds, config)

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
        """Pool float32 scores `[HK, total_q, C]` into blocks: `[HK, total_q, N]`."""
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _check_scores("scores", scores, *lengths, config)
        return select.pool_blocks(unit_stride(scores), Lengths(*lengths), config)

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
        """Select by float32 block scores `[HK, total_q, N]`: int32 `[HK, total_q, K]`."""
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _check_scores("block_scores", block_scores, *lengths, config)
        return select.select_blocks(unit_stride(block_scores), Lengths(*lengths), config)

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
        """Score the blocks that compete: `[HK, total_q, N]`, anything at others."""
        lengths = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_c1, cu_seqlens_c2)
        bounds = (max_seqlen_q, max_seqlen_k)
        return _score(select.score_blocks, q, k_c1, k_c2, *lengths, *bounds, config)

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
        """Score, pool and select, in scratch memory of a bounded size: int32 `[HK, total_q, K]`."""
        lengths = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_c1, cu_seqlens_c2)
        bounds = (max_seqlen_q, max_seqlen_k)
        return _score(select.select, q, k_c1, k_c2, *lengths, *bounds, config)

    @torch.no_grad()
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
        return attend_stage.attend(
            q=q,
            k=k,
            v=v,
            selected=selected,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            block_size=block_size,
            kernels=self.kernels,
        )

    @torch.no_grad()
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
        selection = (selection_q, selection_k)
        checks.check_attention(q, k, v, *lengths, config, *selection, dtypes=DTYPES, values=False)
        _check_heads(q, k.shape[1])
        check_runs_on("q", q)
        return whole.attention(q, k, v, *lengths, config, *selection, self.kernels)

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
    ) -> CupyCache:
        """Return an empty cache for `batch` sequences of at most `max_seqlen_k` tokens each."""
        sizes = (batch, max_seqlen_k, num_kv_heads, head_dim)
        checks.check_new_cache(*sizes, dtype, config, dtypes=DTYPES)
        tail = (num_kv_heads, head_dim)
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {HEAD_DIMS}, but it is {head_dim}")
        cache = CupyCache.empty(batch, max_seqlen_k, tail, dtype, device, config)
        check_runs_on("device", cache.lengths)
        return cache

    @torch.no_grad()
    def append(
        self,
        *,
        cache: CupyCache,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        selection_k: Tensor | None = None,
    ) -> None:
        """Append new tokens `[total, HK, D]` to the sequences of `cache`, in place.

        The caller keeps every sequence within the cache's `max_seqlen_k`.
        """
        limits = (cache.keys, [0] * cache.batch, cache.capacity, cache.config)
        checks.check_append(k, v, cu_seqlens, max_seqlen, selection_k, *limits, values=False)
        cache.append(k, v, selection_k, cu_seqlens, max_seqlen)

    @torch.no_grad()
    def decode(
        self,
        *,
        cache: CupyCache,
        q: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        selection_q: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from the last `T_i` tokens of every sequence; returns as `attention`."""
        limits = (cache.keys, [0] * cache.batch, cache.config)
        checks.check_decode(q, cu_seqlens_q, max_seqlen_q, selection_q, *limits, values=False)
        _check_heads(q, cache.keys.shape[1])
        return whole.decode(cache, q, cu_seqlens_q, max_seqlen_q, selection_q, self.kernels)

    def reset(self, *, cache: CupyCache, lengths: list[int]) -> None:
        """Cut every sequence of `cache` back to its first `lengths[i]` tokens, in place."""
        checks.check_reset(lengths, cache.lengths.tolist())
        cache.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))

    def cached_windows(self, *, cache: CupyCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `k_c1, cu_seqlens_c1, k_c2, cu_seqlens_c2`, packed copies."""
        return cache.packed_windows()


class CupyPortable(CupyImplementation):
    """Use the kernels for every GPU, also where those for Hopper GPUs would be taken."""

    kernels: ClassVar[attend_stage.Kernels] = "portable"


class CupyHopper(CupyImplementation):
    """Use the kernels for Hopper GPUs, also where few queries make others faster.

    Raises:
        RuntimeError: as `CupyImplementation`, or the device is no Hopper GPU.
    """

    kernels: ClassVar[attend_stage.Kernels] = "hopper"
    capabilities: ClassVar[dict[str, Any]] = {
        **CAPABILITIES,
        "head_dims": (64, 128),
        "group_sizes": (16, 8, 32),
        "block_sizes": (64, 128),
    }

    def __init__(self) -> None:
        super().__init__()
        architecture(capability(), hopper=True)


def _score(
    stage: Callable[..., Tensor], q: Tensor, k_c1: Tensor, k_c2: Tensor, *rest: Any
) -> Tensor:
    """Check the arguments of a function that begins with scores, and call its stage."""
    checks.check_scoring(q, k_c1, k_c2, *rest, dtypes=DTYPES, values=False)
    _check_heads(q, k_c1.shape[1])
    check_runs_on("q", q)
    ends_q, ends_k, ends_c1, ends_c2, max_seqlen_q, max_seqlen_k, config = rest
    c1 = Windows(k_c1, ends_c1, config.kernel_size, config.kernel_stride)
    c2 = Windows(k_c2, ends_c2, config.lse_kernel_size, config.lse_kernel_stride)
    bounds = Lengths(ends_q, ends_k, max_seqlen_q, max_seqlen_k)
    return stage(q, c1, c2, bounds, _always_sparse(config))


@functools.lru_cache
def _always_sparse(config: SparseConfig) -> SparseConfig:
    """Return a config for a stage alone, which works on dense sequences as well."""
    return replace(config, dense_len=-1)


def _check_scores(name: str, scores: Tensor, *rest: Any) -> None:
    checks.check_scores(name, scores, *rest, dtypes=(torch.float32,), values=False)
    check_runs_on(name, scores)


def _check_heads(q: Tensor, num_kv_heads: int) -> None:
    """Raise unless there are kernels for the head dim and the group."""
    _check_head_dim("q", q)
    if q.shape[1] // num_kv_heads > MOST_HEADS:
        raise ValueError(
            f"q must have at most {MOST_HEADS} heads for each of {num_kv_heads} key/value heads, "
            f"but it has {q.shape[1]}"
        )


def _check_head_dim(name: str, x: Tensor) -> None:
    if x.shape[2] not in HEAD_DIMS:
        dims = ", ".join(map(str, sorted(HEAD_DIMS)))
        raise ValueError(f"{name} must have a head dim of {dims}, but it has {x.shape[2]}")
