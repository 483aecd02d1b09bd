"""Bounds of stage 1: the mean of a window of keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.memory import remembered
from infllmv2_reference import compress_keys

from .model import Bounded, Precision, dtype_name, relative, stored


def compress(
    k: Float[Tensor, "S HK D"], kernel_size: int, kernel_stride: int, arithmetic: Arithmetic
) -> Bounded:
    """Bound the windows of keys: `gamma mean|k|` for the sum, then one rounding to the dtype of k.

    Args:
        k: the keys of one sequence, in the dtype that the implementation saw.
        kernel_size: l, tokens in one window.
        kernel_stride: s, tokens from one window to the next.
        arithmetic: what the implementation computes in.

    Returns:
        The mean, not rounded, and its bound, `[C, HK, D]`.
    """
    mean = compress_keys(k.double(), kernel_size, kernel_stride)
    error = _mean_error(k, kernel_size, kernel_stride, arithmetic)
    return Bounded(mean, stored(mean, error, dtype_name(k)))


@remembered
def stored_windows(
    k: Float[Tensor, "S HK D"], kernel_size: int, kernel_stride: int, arithmetic: Arithmetic
) -> tuple[Float[Tensor, "C HK D"], Float[Tensor, "C HK D"]]:
    """Return the windows rounded to the dtype of k, and how far honest ones may lie from them.

    The second is 0 where every mean within the error of the sum rounds to the same number.
    """
    mean = compress_keys(k.double(), kernel_size, kernel_stride)
    error = _mean_error(k, kernel_size, kernel_stride, arithmetic)
    middle, low, high = (x.to(k.dtype).double() for x in (mean, mean - error, mean + error))
    return middle, torch.maximum((high - middle).abs(), (low - middle).abs())


def _mean_error(
    k: Float[Tensor, "S HK D"], kernel_size: int, kernel_stride: int, arithmetic: Arithmetic
) -> Float[Tensor, "C HK D"]:
    """Bound the error of a mean before it is stored: l terms, divided or times a rounded 1/l."""
    precision = Precision.of(arithmetic, dtype_name(k))
    sizes = compress_keys(k.double().abs(), kernel_size, kernel_stride)
    exponent = precision.summed(kernel_size, more=1)
    return relative(exponent) * sizes + (kernel_size * precision.flush) * (sizes > 0)
