"""The same kernel with a common bug: it walks over whole blocks, and forgets the rest."""

import torch
from torch.nn.functional import scaled_dot_product_attention as my_kernel

capabilities = {
    "dtypes": ["float16", "bfloat16", "float32"],
    "returns_lse": False,
    "skips_unselected": False,
    "validates": [],
    "longest_context": 2048,
}


def attend(*, q, k, v, selected, cu_seqlens_q, cu_seqlens_k, block_size, **_):
    """Attend the selected blocks, one sequence at a time."""
    out, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q_ends) - 1):
        rows, keys = slice(*q_ends[i : i + 2]), slice(*k_ends[i : i + 2])
        tokens = torch.arange(keys.stop - keys.start, device=q.device)
        positions = tokens[len(tokens) - (rows.stop - rows.start) :, None]  # [T, 1]
        tokens = tokens[: len(tokens) // block_size * block_size]  # the bug: S // B blocks
        keys = slice(keys.start, keys.start + len(tokens))
        chosen = (selected[:, rows, :, None] == tokens // block_size).any(2)  # [HK, T, S]
        mask = (chosen & (tokens <= positions)).repeat_interleave(group, 0)  # [HQ, T, S]
        heads = (q[rows], *(x[keys].repeat_interleave(group, 1) for x in (k, v)))
        result = my_kernel(*(x.transpose(0, 1) for x in heads), attn_mask=mask)  # [HQ, T, D]
        empty = ~mask.any(-1, keepdim=True)  # nothing to attend: 0, whatever the kernel makes of it
        out[rows] = result.masked_fill(empty, 0.0).transpose(0, 1)
    return out, None
