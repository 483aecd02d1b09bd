"""The CUDA kernels of the `infllm_v2` package (OpenBMB/infllmv2_cuda_impl) behind the contract.

The package scores, pools and attends; selecting is left to its users, so it is not offered here.
Its kernels are built for one shape of model: bfloat16, head dim 128, 16 query heads per key/value
head, blocks of 64, windows of (32, 16), and (128, 64) for the normaliser.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from infllmv2_reference.config import SparseConfig
from infllmv2_reference.layout import cu_seqlens_of, lengths_of, spans, window_lengths

try:
    import infllm_v2
except ImportError as error:
    raise ImportError(
        "infllmv2_impls.adapters.infllm_v2 needs the package infllm_v2, which is built from source "
        "with CUDA for compute capability 8.0 or 9.0: clone "
        "https://github.com/OpenBMB/infllmv2_cuda_impl with its submodules and run "
        "`pip install -e . --no-build-isolation` in it"
    ) from error

if "cu_seqlens_v" not in inspect.signature(infllm_v2.infllmv2_attn_stage1).parameters:
    raise ImportError(
        "infllmv2_impls.adapters.infllm_v2 needs a version of infllm_v2 whose infllmv2_attn_stage1 "
        "takes cu_seqlens_v (the approximate normaliser); the installed one is older"
    )

HEAD_DIM, GROUP, BLOCK_SIZE = 128, 16, 64

CAPABILITIES: dict[str, Any] = {
    "devices": ("cuda",),
    "dtypes": ("bfloat16",),
    "head_dims": (HEAD_DIM,),
    "group_sizes": (GROUP,),
    "block_sizes": (BLOCK_SIZE,),
    "windows": ((32, 16),),
    "lse_modes": ("approximate",),
    "pooling_modes": ("overlap",),
    "empty_sequences": False,
    "gradients": True,
    "returns_selection": False,
    "skips_unselected": True,
    "deterministic": False,  # the forward is; the backward as called here adds atomically
    "batch_invariant": False,
    "validates": (),
    "longest_context": 1 << 17,  # the longest that its README reports
    "arithmetic": {
        "accumulate": "float32",
        "products": "ieee",
        "probabilities": "input",
        "scores": "bfloat16",
    },
}


class InfllmV2Implementation:
    """Offer the stages that the package has; see `infllmv2_conformance.protocol` for the shapes."""

    capabilities = CAPABILITIES

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
        """Score windows: bfloat16 `[HK, total_q, C]`, 0 where the kernel sees none."""
        del cu_seqlens_k, max_seqlen_q, max_seqlen_k
        _check_config(config)
        _check_model(q, k_c1)
        longest_q = max(lengths_of(cu_seqlens_q), default=0)
        columns = max(lengths_of(cu_seqlens_c1), default=0)
        if columns == 0:
            return q.new_zeros(k_c1.shape[1], len(q), 0)
        return infllm_v2.infllmv2_attn_stage1(
            q,
            k_c1,
            k_c2,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_c1,
            cu_seqlens_v=cu_seqlens_c2,
            max_seqlen_q=longest_q,
            max_seqlen_k=columns,
            causal=longest_q > 1,  # its users decode without the mask, which is wrong for one query
        )[:, : len(q)]

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
        """Pool scores `[HK, total_q, C]` into blocks `[HK, total_q, N]`, none of them forced.

        The kernel reads every window of a sequence, so invisible ones are set to -inf here.
        """
        del max_seqlen_q, max_seqlen_k
        _check_config(config)
        windows = torch.arange(scores.shape[2], device=scores.device)
        visible = windows < _visible_counts(cu_seqlens_q, cu_seqlens_k, config)  # [total_q, C]
        scores = scores.masked_fill(~visible, -torch.inf)
        return _pool(scores, cu_seqlens_q, cu_seqlens_k, 0, -1, config)

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
        """Score and pool as the package's users do: `[HK, total_q, N]`, forced blocks infinite."""
        scores = self.score_windows(
            q=q,
            k_c1=k_c1,
            k_c2=k_c2,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            cu_seqlens_c1=cu_seqlens_c1,
            cu_seqlens_c2=cu_seqlens_c2,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            config=config,
        )
        init, local = config.init_blocks, config.local_blocks - 1  # the kernel forces one more
        return _pool(scores, cu_seqlens_q, cu_seqlens_k, init, local, config)

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
        """Attend the selected blocks: `[total_q, HQ, D]` and LSE `[total_q, HQ]`."""
        _require("block_size", block_size, BLOCK_SIZE)
        _check_model(q, k)
        out, lse, _ = infllm_v2.infllmv2_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal=True,
            return_attn_probs=True,
            topk_idx=selected.contiguous(),  # its address alone reaches the kernel
        )
        lse = lse.unflatten(1, (len(q), -1))  # [HK, total_q, G]: a group's heads are rows in there
        lse = lse.transpose(0, 1).flatten(1)  # [total_q, HQ]
        return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # it marks empty rows by +inf


IMPLEMENTATION = InfllmV2Implementation()


def _pool(
    scores: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    init_blocks: int,
    local_blocks: int,
    config: SparseConfig,
) -> Tensor:
    """Call the pooling kernel; a negative `local_blocks` forces none of them."""
    counts = window_lengths(cu_seqlens_k, config.kernel_size, config.kernel_stride)
    return infllm_v2.max_pooling_1d_varlen(
        scores.contiguous(),
        cu_seqlens_q,
        cu_seqlens_of(counts, device=scores.device),
        cu_seqlens_k.diff() - cu_seqlens_q.diff(),
        max(lengths_of(cu_seqlens_q), default=0),
        scores.shape[2],
        local_blocks=local_blocks,
        init_blocks=init_blocks,
        block_size=config.block_size,
        stride=config.kernel_stride,
    )


def _visible_counts(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, config: SparseConfig) -> Tensor:
    """Count the windows that each query sees: `[total_q, 1]`."""
    device = cu_seqlens_q.device
    positions = [
        torch.arange(s.num_keys - s.num_queries, s.num_keys, device=device)
        for s in spans(cu_seqlens_q, cu_seqlens_k)
    ]
    ends = torch.cat(positions)[:, None] + 1
    return ((ends - config.kernel_size) // config.kernel_stride + 1).clamp(min=0)


def _check_config(config: SparseConfig) -> None:
    _require("config.block_size", config.block_size, BLOCK_SIZE)
    _require("config.kernel_size", config.kernel_size, 32)
    _require("config.kernel_stride", config.kernel_stride, 16)
    _require("config.lse", config.lse, "approximate")
    _require("config.lse_kernel_size", config.lse_kernel_size, 128)
    _require("config.lse_kernel_stride", config.lse_kernel_stride, 64)
    _require("config.pooling", config.pooling, "overlap")


def _check_model(q: Tensor, k: Tensor) -> None:
    """Raise on what the kernels take without complaint and get wrong."""
    _require("the dtype of q", q.dtype, torch.bfloat16)
    _require("the head dim", q.shape[2], HEAD_DIM)
    _require("the group size", q.shape[1] / k.shape[1], GROUP)


def _require(name: str, value: object, must: object) -> None:
    if value != must:
        raise ValueError(f"{name} must be {must} for infllm_v2, but it is {value}")
