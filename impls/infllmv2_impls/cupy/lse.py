"""The normaliser of stage 2: per query and head, the logsumexp of its logits over visible windows.

Logarithms are to the base 2, with `scale * log2(e)` folded into the logits.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from infllmv2_impls.packing import Lengths, Windows, num_slots
from infllmv2_reference.geometry import num_windows

from .launch import Kernel, launch
from .tuning import lse_tile, num_parts, padded_group

LOG2_E = math.log2(math.e)


def window_lse(
    q: Tensor,
    windows: Windows,
    lengths: Lengths,
    block_size: int,
    covered: int = 0,
    dense_len: int = -1,
) -> Tensor:
    """Return the LSE to the base 2 over visible windows, in parts: float32 `[parts, total_q, HQ]`.

    Args:
        q: queries `[total_q, HQ, D]`, `aligned` to pairs of channels.
        windows: those of K_C1 or K_C2, `aligned` to 8 channels.
        lengths: of the batch.
        block_size: B.
        covered: rows with at most so many visible blocks may stay unwritten: they select them all.
        dense_len: rows of sequences of fewer keys may stay unwritten.

    Returns:
        Numbers whose logsumexp over the parts is the LSE; -inf for none.
    """
    (total_q, num_heads, head_dim), num_kv_heads = q.shape, windows.means.shape[1]
    group = num_heads // num_kv_heads
    tile = lse_tile(head_dim, group, lengths.max_seqlen_q)
    slots = num_slots(total_q, lengths.batch, tile.tokens)
    most = num_windows(lengths.max_seqlen_k, windows.size, windows.stride)
    parts = num_parts(slots * num_kv_heads, -(-most // tile.windows))
    lse = torch.empty((parts, total_q, num_heads), dtype=torch.float32, device=q.device)
    kernel = Kernel(
        "lse.cu",
        "lse_kernel",
        (
            ("BF16", int(q.dtype == torch.bfloat16)),
            ("GROUP", group),
            ("GROUP_PAD", padded_group(group)),
            ("D", head_dim),
            ("SIZE", windows.size),
            ("STRIDE", windows.stride),
            ("BLOCK", block_size),
            ("WARPS", tile.warps),
            ("TILE_WINDOWS", tile.windows),
            ("ROW_TILES", tile.row_tiles),
            ("STAGES", tile.stages),
            ("RESIDENT", tile.resident),
        ),
    )
    launch(
        kernel,
        (slots, num_kv_heads, parts),
        32 * tile.warps,
        tile.shared_bytes,
        q,
        q,
        windows.means,
        lse,
        lengths.ends_q,
        lengths.ends_k,
        windows.starts,
        lengths.batch,
        total_q,
        dense_len,
        covered,
        np.int64(q.stride(0)),
        np.int64(q.stride(1)),
        windows.means.stride(0),
        np.int64(windows.means.stride(1)),
        LOG2_E * head_dim**-0.5,
    )
    return lse
