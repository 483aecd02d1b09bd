"""Bad input, through the eager implementation: an error that names the argument."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from infllmv2_impls.eager import IMPLEMENTATION
from infllmv2_reference import SparseConfig, compress_for_selection
from infllmv2_reference.layout import cu_seqlens_of

TINY = SparseConfig(
    block_size=8, kernel_size=4, kernel_stride=2, window_size=8, topk=3, dense_len=-1
)
LENGTHS = [40, 1, 90]
PACKED = {
    "cu_seqlens_q": cu_seqlens_of(LENGTHS),
    "cu_seqlens_k": cu_seqlens_of(LENGTHS),
    "max_seqlen_q": 90,
    "max_seqlen_k": 90,
}


def tokens(heads: int) -> torch.Tensor:
    return torch.ones(sum(LENGTHS), heads, 8, dtype=torch.float64)


def windows() -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for i in (0, 1):
        parts = [compress_for_selection(tokens(2)[:n], TINY)[i] for n in LENGTHS]
        result[f"k_c{i + 1}"] = torch.cat(parts)
        result[f"cu_seqlens_c{i + 1}"] = cu_seqlens_of([len(x) for x in parts])
    return result


def attend_arguments() -> dict[str, Any]:
    selected = torch.zeros(2, sum(LENGTHS), 1, dtype=torch.int32)
    q, k, v = tokens(6), tokens(2), tokens(2)
    return {"q": q, "k": k, "v": v, "selected": selected, **PACKED, "block_size": 8}


BAD_ATTEND = {
    "q must have shape": {"q": torch.zeros(131, 8)},
    "q must be a tensor": {"q": [1.0]},
    "q must be torch.float16": {"q": torch.zeros(131, 6, 8, dtype=torch.int64)},
    "k must be torch.float64": {"k": torch.zeros(131, 2, 8)},
    "k must be on cpu": {"k": torch.zeros(131, 2, 8, dtype=torch.float64, device="meta")},
    "k.shape[2] must be": {"k": torch.zeros(131, 2, 9, dtype=torch.float64)},
    "q must have a positive multiple": {"q": torch.zeros(131, 5, 8, dtype=torch.float64)},
    "q.shape[0] must be": {
        "q": torch.zeros(130, 6, 8, dtype=torch.float64),
        "selected": torch.zeros(2, 130, 1, dtype=torch.int32),
    },
    "v.shape must be": {"v": torch.zeros(130, 2, 8, dtype=torch.float64)},
    "selected must be torch.int32": {"selected": torch.zeros(2, 131, 1, dtype=torch.int64)},
    "selected.shape[0] must be": {"selected": torch.zeros(1, 131, 1, dtype=torch.int32)},
    "selected must hold": {"selected": torch.full((2, 131, 1), 5, dtype=torch.int32)},
    "selected must be strictly": {"selected": torch.zeros(2, 131, 2, dtype=torch.int32)},
    "cu_seqlens_q must be torch.int32": {"cu_seqlens_q": torch.tensor([0, 40, 41, 131])},
    "cu_seqlens_k must start": {"cu_seqlens_k": torch.tensor([0, 41, 40, 131]).int()},
    "cu_seqlens_k must be on": {"cu_seqlens_k": torch.zeros(4, dtype=torch.int32, device="meta")},
    "cu_seqlens_q must give": {"cu_seqlens_q": torch.tensor([0, 41, 42, 131]).int()},
    "max_seqlen_q must be": {"max_seqlen_q": 89},
    "max_seqlen_k must be an int": {"max_seqlen_k": 90.0},
    "block_size must be": {"block_size": 0},
}


@pytest.mark.parametrize("message", BAD_ATTEND)
def test_bad_attend(message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        IMPLEMENTATION.attend(**{**attend_arguments(), **BAD_ATTEND[message]})
    assert message in str(error.value)


def test_bad_scoring_and_config() -> None:
    q, k = tokens(6), tokens(2)
    fused: dict[str, Any] = {"q": q, **windows(), **PACKED, "config": TINY}
    lengths = fused["cu_seqlens_c1"].clone()
    lengths[-1] += 1
    for bad, message in (
        ({"cu_seqlens_c1": lengths}, "cu_seqlens_c1 must count the complete windows"),
        ({"k_c2": fused["k_c2"][:-1]}, "k_c2 must have at least"),
        ({"k_c1": fused["k_c1"].float()}, "k_c1 must be torch.float64"),
        ({"config": {}}, "config must be a SparseConfig"),
    ):
        for name in ("score_windows", "score_blocks", "select"):
            with pytest.raises((ValueError, TypeError), match=message):
                getattr(IMPLEMENTATION, name)(**{**fused, **bad})
    scores = torch.zeros(2, len(q), 43)
    with pytest.raises(ValueError, match="scores must have at least 44 columns for 90 keys"):
        IMPLEMENTATION.pool_blocks(scores=scores, **PACKED, config=TINY)
    for use_nope, extra in ((True, {}), (False, {"selection_q": q})):
        c = replace(TINY, use_nope=use_nope)
        with pytest.raises(ValueError, match="selection_q must be"):
            IMPLEMENTATION.attention(q=q, k=k, v=k, **PACKED, config=c, **extra)
