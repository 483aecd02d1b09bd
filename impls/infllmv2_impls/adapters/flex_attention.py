"""PyTorch's FlexAttention behind the contract: one call per sequence, with a block mask.

`IMPLEMENTATION` is the compiled kernel and needs CUDA; `UNCOMPILED` is the same call without
`torch.compile`, which materialises all scores and runs anywhere. Neither stands in for the other.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from infllmv2_impls import checks
from infllmv2_reference.layout import spans

TILE = 128
"""Queries and keys in one tile of the block mask; the kernel's own tiles must divide it."""

RECOMPILE_LIMIT = 256
"""Head dims, groups, dtypes and block sizes are compiled in; beyond the limit the call raises."""

_AUX = {"return_aux": flex.AuxRequest(lse=True)} if hasattr(flex, "AuxRequest") else None
_WITH_LSE: dict[str, Any] = _AUX or {"return_lse": True}
_ARITHMETIC = {
    "accumulate": "float32",
    "products": "ieee",
    "probabilities": "input",
    "scores": "float32",
}
_COMMON: dict[str, Any] = {
    "skips_unselected": False,
    "deterministic": True,
    "batch_invariant": False,
    "validates": ("shapes", "dtypes", "devices", "cu_seqlens", "config"),
    "arithmetic": _ARITHMETIC,
}

COMPILED_CAPABILITIES: dict[str, Any] = {
    **_COMMON,
    "devices": ("cuda",),
    "gradients": True,
    "dtypes": ("float16", "bfloat16", "float32"),
    "head_dims": (16, 32, 64, 128, 256),
    "group_sizes": (1, 2, 4, 8, 16, 32),  # the kernel for few queries takes powers of two only
}
UNCOMPILED_CAPABILITIES: dict[str, Any] = {
    **_COMMON,
    "devices": ("cpu", "cuda"),
    "gradients": False,  # FlexAttention has no backward on a CPU; it raises there
    "dtypes": ("float16", "bfloat16", "float32", "float64"),
    "longest_context": 1 << 14,  # all scores, HQ * T * S, several times in float32
}


class FlexImplementation:
    """Offer `attend`; see `infllmv2_conformance.protocol` for the shapes.

    Args:
        run: `flex_attention`, compiled or not.
        capabilities: what it claims.
    """

    def __init__(self, run: Callable[..., Any], capabilities: dict[str, Any]) -> None:
        self.run = run
        self.capabilities = capabilities

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
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        dtypes = tuple(getattr(torch, name) for name in self.capabilities["dtypes"])
        checks.check_attend(q, k, v, selected, *lengths, block_size, dtypes=dtypes)
        if q.device.type not in self.capabilities["devices"]:
            devices = " or ".join(self.capabilities["devices"])
            raise ValueError(f"q must be on {devices} here, but it is on {q.device}")
        wide = torch.promote_types(q.dtype, torch.float32)
        outs, lses = [q[:0]], [q.new_empty(0, q.shape[1], dtype=wide)]
        for span in spans(cu_seqlens_q, cu_seqlens_k):
            if span.num_queries:
                rows, keys = span.queries, span.keys
                chosen = chosen_blocks(selected[:, rows], span.num_keys, block_size)
                mask = block_mask(chosen, q.shape[1], span.num_keys, block_size)
                batch = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
                out, lse = self.run(*batch, block_mask=mask, enable_gqa=True, **_WITH_LSE)
                outs.append(out[0].transpose(0, 1))  # [T, HQ, D]
                lses.append((lse if _AUX is None else lse.lse)[0].T)  # [T, HQ]
        return torch.cat(outs), torch.cat(lses)


@functools.cache
def compiled() -> Callable[..., Any]:
    """Return the compiled kernel; importing this module alone does not load the compiler."""
    return torch.compile(flex.flex_attention, dynamic=True, fullgraph=True)


def run_compiled(*args: Any, **kwargs: Any) -> Any:
    """Call the compiled kernel; raise rather than run uncompiled beyond the recompile limit."""
    kernel = compiled()
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return kernel(*args, **kwargs)


def run_uncompiled(*args: Any, **kwargs: Any) -> Any:
    """Call FlexAttention without its kernel, and without its warning that there is none."""
    with warnings.catch_warnings():
        message = "flex_attention called without torch.compile"
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
        return flex.flex_attention(*args, **kwargs)


def chosen_blocks(selected: Tensor, num_keys: int, block_size: int) -> Tensor:
    """Turn indices `[HK, T, K]`, -1 for none, into flags `[HK, T, N]`."""
    num_blocks = -(-num_keys // block_size)
    chosen = selected.new_zeros(*selected.shape[:2], num_blocks + 1, dtype=torch.bool)
    chosen.scatter_(2, selected.long() % (num_blocks + 1), True)  # -1 goes to the last one
    return chosen[..., :num_blocks].contiguous()


def block_mask(chosen: Tensor, num_heads: int, num_keys: int, block_size: int) -> flex.BlockMask:
    """Build the mask of one sequence from flags `[HK, T, N]`, without a `[HQ, T, S]` mask.

    A tile is visited if any of its queries chose a block that overlaps it; `admits` decides there.
    """
    num_kv_heads, num_queries, num_blocks = chosen.shape
    group, device = num_heads // num_kv_heads, chosen.device
    positions = torch.arange(num_keys - num_queries, num_keys, device=device)

    def admits(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch
        return chosen[head // group, query, key // block_size] & (key <= positions[query])

    rows, columns = -(-num_queries // TILE), -(-num_keys // TILE)
    padded = torch.nn.functional.pad(chosen, (0, 0, 0, rows * TILE - num_queries))
    by_tile = padded.unflatten(1, (rows, TILE)).any(dim=2)  # [HK, rows, N]
    starts = torch.arange(num_blocks, device=device)[:, None] * block_size
    tiles = torch.arange(columns, device=device) * TILE
    overlap = (starts < tiles + TILE) & (starts + block_size > tiles)  # [N, columns]
    visited = (by_tile.float() @ overlap.float() > 0).repeat_interleave(group, dim=0)[None]
    order = visited.int().argsort(dim=-1, descending=True, stable=True).int()
    return flex.BlockMask.from_kv_blocks(
        visited.sum(dim=-1, dtype=torch.int32),
        order,
        BLOCK_SIZE=TILE,
        mask_mod=admits,
        seq_lengths=(num_queries, num_keys),
    )


IMPLEMENTATION = FlexImplementation(run_compiled, COMPILED_CAPABILITIES)
UNCOMPILED = FlexImplementation(run_uncompiled, UNCOMPILED_CAPABILITIES)
