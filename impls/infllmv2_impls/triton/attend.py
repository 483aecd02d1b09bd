"""`attend`: softmax attention over the selected blocks, in Triton, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_impls import checks
from infllmv2_impls.triton.attend_operator import attend_operator
from infllmv2_impls.triton.device import INTERPRETED, check_runs_on

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 96, 128, 256)
MOST_HEADS = 32
BLOCK_SIZES = (16, 32, 48, 64, 128)

CAPABILITIES: dict[str, Any] = {
    # The interpreter runs on the CPU, and its bfloat16 products are wrong. On a GPU float32 works,
    # but without tensor cores: its kernels take long to compile, and nobody should want them.
    "devices": ("cpu",) if INTERPRETED else ("cuda",),
    "dtypes": ("float16", "float32") if INTERPRETED else ("bfloat16", "float16"),
    # In this order the suite, which walks through the lists in step, meets every kind of kernel:
    # blocks of 64 with 16 and 8 heads per kv head, blocks of 128 with 32.
    "head_dims": (64, 128, 256, 96),
    "group_sizes": (2, 16, 1, 7, 8, 32, 4),
    "block_sizes": BLOCK_SIZES,
    "gradients": True,
    "deterministic": True,
    "batch_invariant": False,
    "validates": ("shapes", "dtypes", "devices"),
    "arithmetic": {
        "accumulate": "float32",
        "products": "ieee",
        "probabilities": "input",
        "scores": "float32",
    },
}


def attend(
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
    dense_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend the tokens up to each query's position in the blocks that it selected.

    Args:
        q: `[total_q, HQ, D]`, float16, bfloat16 or float32.
        k: `[total_k, HK, D]`; HQ / HK is at most 32.
        v: as `k`.
        selected: int32 `[HK, total_q, K]`: ascending blocks of the row's own sequence, then -1.
        cu_seqlens_q: int32 `[batch + 1]`.
        cu_seqlens_k: int32 `[batch + 1]`; the queries of a sequence are its last tokens.
        max_seqlen_q: at least the longest sequence of queries.
        max_seqlen_k: at least the longest sequence of keys.
        block_size: B: 16, 32, 48, 64 or 128.
        dense_len: sequences with fewer keys attend everything up to each query, and their rows of
            `selected` are not read (decision D8); None for no such sequence.

    Returns:
        `out` in the dtype of `q`, and `lse` `[total_q, HQ]`, float32, the natural logarithm. Both
        are differentiable by `q`, `k` and `v`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device or a size is; values on the device are not looked at.
    """
    checks.check_attend_form(
        q, k, v, selected, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size,
        dtypes=DTYPES,
    )  # fmt: skip
    _check_support(q, k, block_size)
    return attend_operator(
        q, k, v, selected, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size,
        max(dense_len or 0, 0),
    )  # fmt: skip


def _check_support(q: Tensor, k: Tensor, block_size: int) -> None:
    """Raise unless there is a kernel for these sizes, on this device."""
    check_runs_on("q", q)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, but it is {block_size}")
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"q must have a head dim of {HEAD_DIMS}, but it has {q.shape[2]}")
    group = q.shape[1] // k.shape[1]
    if group > MOST_HEADS:
        raise ValueError(f"q must have at most {MOST_HEADS} heads per kv head, but it has {group}")


class AttendAlone:
    """Offer `attend` and nothing else, to be checked by itself."""

    capabilities = CAPABILITIES

    def attend(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        """Attend the selected blocks: `[total_q, HQ, D]` and LSE `[total_q, HQ]`."""
        return attend(**arguments)


IMPLEMENTATION = AttendAlone()
