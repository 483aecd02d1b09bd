"""The arguments of every contract function for a case, from the oracle's earlier stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_reference.score import visible_windows

from .inputs import Inputs
from .oracle import Oracle


def arguments(function: str, inputs: Inputs, oracle: Oracle) -> dict[str, Any]:
    """Return the keyword arguments of one stage function of the contract."""
    config = oracle.config
    if function == "compress_keys":
        return {
            "k": inputs.k,
            "cu_seqlens_k": inputs.cu_seqlens_k,
            "max_seqlen_k": inputs.max_seqlen_k,
            "kernel_size": config.kernel_size,
            "kernel_stride": config.kernel_stride,
        }
    if function in ("score_windows", "score_blocks", "select"):
        k_c1, cu_seqlens_c1 = oracle.packed_windows(0)
        k_c2, cu_seqlens_c2 = oracle.packed_windows(1)
        return {
            "q": inputs.q,
            "k_c1": k_c1,
            "k_c2": k_c2,
            "cu_seqlens_c1": cu_seqlens_c1,
            "cu_seqlens_c2": cu_seqlens_c2,
            **inputs.lengths,
            "config": config,
        }
    if function == "pool_blocks":
        size, stride = config.kernel_size, config.kernel_stride
        rows = [
            s.value.where(visible_windows(span.num_queries, span.num_keys, size, stride), 0.5)
            for s, span in zip(oracle.scores, oracle.spans, strict=True)
        ]  # what stands at invisible windows is arbitrary
        scores = pack_rows(rows, oracle)
        return {"scores": scores, **inputs.lengths, "config": config}
    if function == "select_blocks":
        block_scores = pack_rows([s.value for s in oracle.block_scores], oracle)
        return {"block_scores": block_scores, **inputs.lengths, "config": config}
    if function == "attend":
        selected = pack_rows(list(oracle.selected), oracle, torch.int32, fill=-1)
        return {
            "q": inputs.q,
            "k": inputs.k,
            "v": inputs.v,
            "selected": selected,
            **inputs.lengths,
            "block_size": config.block_size,
        }
    assert function == "attention", function
    extra = {"selection_q": inputs.selection_q, "selection_k": inputs.selection_k}
    return {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        **inputs.lengths,
        "config": config,
        **(extra if config.use_nope else {}),
    }


def pack_rows(
    rows: list[Tensor], oracle: Oracle, dtype: torch.dtype | None = None, fill: float = torch.nan
) -> Tensor:
    """Lay `[HK, T_i, X_i]` end to end as `[HK, total_q, max X]`; `fill` stands behind X_i."""
    width = max((r.shape[-1] for r in rows), default=0)
    total = sum(r.shape[1] for r in rows)
    dtype = dtype or getattr(torch, oracle.arithmetic.scores)
    packed = torch.full((oracle.case.kv_heads, total, width), fill, dtype=dtype)
    start = 0
    for row in rows:
        packed[:, start : start + row.shape[1], : row.shape[2]] = row.to(dtype)
        start += row.shape[1]
    return packed.to(oracle.inputs.q.device)
