"""Rows as kernels take them: a last axis of unit stride, loaded several channels at a time."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

MOST_CHANNELS = 8
"""Halves of the widest load, 16 bytes."""


def unit_stride(x: Tensor) -> Tensor:
    """Return `x`, copied if its last axis is strided; kernels take all other strides."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def vector_of(*rows: Tensor) -> int:
    """Return how many channels can be loaded at once from all rows `[rows, heads, D]`."""
    common = MOST_CHANNELS
    for x in rows:
        common = math.gcd(common, x.shape[2], x.stride(0), x.stride(1))
        common = math.gcd(common, x.data_ptr() // x.element_size())
    return common


def int64(x: int) -> np.int64:
    """Return a number that `launch` hands to a kernel as int64."""
    return np.int64(x)
