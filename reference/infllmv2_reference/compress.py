"""Stage 1: mean-pool the keys into windows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .geometry import num_windows


def compress_keys(
    keys: Float[Tensor, "S HK D"], kernel_size: int, kernel_stride: int
) -> Float[Tensor, "C HK D"]:
    """Replace every complete window of keys by its mean.

    `K_C[c] = mean(keys[c*s : c*s + l])` for every `c` with `c*s + l <= S`. Keys after the last
    complete window take no part. K_C1 is this with (l1, s1), K_C2 with (l2, s2).

    >>> keys = torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0]).reshape(5, 1, 1)
    >>> compress_keys(keys, kernel_size=2, kernel_stride=2).flatten()
    tensor([1., 5.])

    Args:
        keys: the keys of one sequence, of any floating dtype.
        kernel_size: l, tokens in one window.
        kernel_stride: s, tokens from one window to the next.

    Returns:
        One mean per window, accumulated in float32 or wider and stored in the dtype of `keys`.

    Free: the order of summation.

    Source: Eq. 4.
    """
    num_keys, num_kv_heads, head_dim = keys.shape
    if num_windows(num_keys, kernel_size, kernel_stride) == 0:
        return keys.new_empty(0, num_kv_heads, head_dim)
    wide = torch.promote_types(keys.dtype, torch.float32)
    windows = keys.unfold(0, kernel_size, kernel_stride)  # [C, HK, D, l]: the complete ones
    return windows.to(wide).mean(dim=-1).to(keys.dtype)  # [C, HK, D]
