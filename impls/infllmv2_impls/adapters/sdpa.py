"""PyTorch's `scaled_dot_product_attention` behind the contract: one call per sequence, masked.

It computes over all keys and masks, so it serves as a baseline, not as a sparse kernel. PyTorch
chooses the backend: on a CPU its flash kernel, on CUDA memory-efficient attention, or the unfused
path for float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infllmv2_impls import checks
from infllmv2_reference.layout import spans

CAPABILITIES: dict[str, Any] = {
    "devices": ("cpu", "cuda"),
    "dtypes": ("float16", "bfloat16", "float32", "float64"),
    "gradients": True,
    "returns_lse": False,
    "skips_unselected": False,
    "deterministic": False,  # the backward of memory-efficient attention adds in any order
    "batch_invariant": False,
    "validates": ("shapes", "dtypes", "devices", "cu_seqlens", "config"),
    "longest_context": 1 << 15,  # the mask takes HK * T * S bytes, and PyTorch widens it
    "arithmetic": {
        "group_sum": "input",
        "accumulate": "float32",
        "products": "ieee",
        "probabilities": "input",
        "scores": "float32",
    },
}


class SdpaImplementation:
    """Offer `attend`; see `infllmv2_conformance.protocol` for the shapes.

    A group is summed outside the kernel: each query head's gradient of k and v is rounded to the
    dtype of the inputs before the sum. (With `enable_gqa` the CPU's flash backward adds the heads
    in that dtype, and memory-efficient attention is not eligible at all.)
    """

    capabilities = CAPABILITIES

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
    ) -> tuple[Tensor, None]:
        """Attend the selected blocks: `[total_q, HQ, D]`, and no LSE."""
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        checks.check_attend(q, k, v, selected, *lengths, block_size)
        outs = [q[:0]]
        for span in spans(cu_seqlens_q, cu_seqlens_k):
            if span.num_queries:
                rows, keys = span.queries, span.keys
                outs.append(_attend(q[rows], k[keys], v[keys], selected[:, rows], block_size))
        return torch.cat(outs), None


IMPLEMENTATION = SdpaImplementation()


def _attend(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, block_size: int) -> Tensor:
    """Attend one sequence `[T, HQ, D]` with the kv heads as batch and the group as heads."""
    group = q.shape[1] // k.shape[1]
    mask = _mask(selected, len(q), len(k), block_size)[:, None]  # [HK, 1, T, S]
    empty = ~mask.any(dim=-1, keepdim=True)  # [HK, 1, T, 1]
    queries = q.unflatten(1, (-1, group)).permute(1, 2, 0, 3)  # [HK, G, T, D]
    keys, values = (x.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    # A row without any token gives NaN in some backends: let it see all, and drop what it saw.
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask | empty)
    return out.masked_fill(empty, 0.0).permute(2, 0, 1, 3).flatten(1, 2)  # [T, HQ, D]


def _mask(selected: Tensor, num_queries: int, num_keys: int, block_size: int) -> Tensor:
    """Say which tokens each query attends: bool `[HK, T, S]`."""
    tokens = torch.arange(num_keys, device=selected.device)
    num_blocks = -(-num_keys // block_size)
    chosen = selected.new_zeros(*selected.shape[:2], num_blocks + 1, dtype=torch.bool)
    chosen.scatter_(2, selected.long() % (num_blocks + 1), True)  # -1 goes to the last, unused one
    causal = tokens <= tokens[num_keys - num_queries :, None]  # [T, S]
    return chosen[:, :, tokens // block_size] & causal
