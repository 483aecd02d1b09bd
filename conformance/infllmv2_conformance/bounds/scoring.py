"""Bounds of stages 2 and 3: the scores of windows and of blocks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.memory import remembered
from infllmv2_reference import SparseConfig, pool_blocks, score_windows
from infllmv2_reference.geometry import num_windows
from infllmv2_reference.score import visible_windows

from .model import FORMATS, Bounded, Precision, drift, dtype_name, relative, stored
from .softmax import (
    Softmax,
    dots,
    exponent_error,
    grouped,
    logit_error,
    query_chunks,
)

_DIVISION_ROUNDINGS = 4
_Windows = tuple[Float[Tensor, "C HK D"], Float[Tensor, "C HK D"] | None]


@remembered
def scores(
    q: Float[Tensor, "T HQ D"],
    k_c1: Float[Tensor, "C HK D"],
    k_c2: Float[Tensor, "C2 HK D"],
    num_keys: int,
    config: SparseConfig,
    arithmetic: Arithmetic,
    slack1: Float[Tensor, "C HK D"] | None = None,
    slack2: Float[Tensor, "C2 HK D"] | None = None,
) -> Bounded:
    """Bound the scores of one sequence's windows.

    Args:
        q: the queries, in the dtype that the implementation saw.
        k_c1: the windows of (l1, s1).
        k_c2: the windows of (l2, s2).
        num_keys: S, the key tokens of the sequence.
        config: window lengths and strides, and which normaliser.
        arithmetic: what the implementation computes in.
        slack1: how far the implementation's K_C1 may be off, from `stored_windows`; nothing unless
            given.
        slack2: the same for K_C2.

    Returns:
        Scores and bounds, `[HK, T, C]`: value -inf and bound 0 where the window is not visible;
        both 0 in rows without a normaliser; bound inf where a score may overflow its format.
    """
    total, parts = len(k_c1), list[Bounded]()
    for rows in query_chunks(len(q), q.shape[1] * max(total, len(k_c2))):
        end = num_keys - len(q) + rows.stop
        c1 = num_windows(end, config.kernel_size, config.kernel_stride)
        c2 = min(num_windows(end, config.lse_kernel_size, config.lse_kernel_stride), len(k_c2))
        first = k_c1[:c1], None if slack1 is None else slack1[:c1]
        second = k_c2[:c2], None if slack2 is None else slack2[:c2]
        part = _score_rows(q[rows], first, second, end, config, arithmetic)
        value = torch.nn.functional.pad(part.value, (0, total - c1), value=-torch.inf)
        parts.append(Bounded(value, torch.nn.functional.pad(part.bound, (0, total - c1))))
    return Bounded(torch.cat([p.value for p in parts], 1), torch.cat([p.bound for p in parts], 1))


def _score_rows(
    q: Float[Tensor, "T HQ D"],
    first: _Windows,
    second: _Windows,
    num_keys: int,
    config: SparseConfig,
    arithmetic: Arithmetic,
) -> Bounded:
    """Bound the scores of some queries, `num_keys` counting up to the last of them."""
    precision = Precision.of(arithmetic, dtype_name(q))
    rows, group = grouped(q, first[0].shape[1]), q.shape[1] // first[0].shape[1]
    exact = config.lse == "exact"
    size, stride = config.kernel_size, config.kernel_stride
    lse_size, lse_stride = config.lse_kernel_size, config.lse_kernel_stride
    visible = visible_windows(len(q), num_keys, size, stride)  # [T, C]
    usable = visible if exact else visible_windows(len(q), num_keys, lse_size, lse_stride)
    x, error = _logits(rows, first, precision)  # [HK, G, T, C]
    pair = (x, error) if exact else _logits(rows, second, precision)
    normaliser = Softmax(*pair, usable[None, None], precision)
    value = score_windows(
        q.double(), first[0].double(), second[0].double(), num_keys, config
    )  # [HK, T, C]
    exponent = exponent_error(x, error, normaliser.reach, precision)
    exponent = exponent + normaliser.lse_error[..., None]
    exponent = exponent + drift(_DIVISION_ROUNDINGS, precision.scalar) + precision.summed(group)
    per_head = (x - normaliser.lse[..., None]).exp().clamp(max=1e300)
    bound = (per_head * relative(exponent)).sum(dim=1) + group * precision.flush  # [HK, T, C]
    bound = stored(value, bound, arithmetic.scores)
    fits = value + bound <= FORMATS[arithmetic.accumulate].largest
    bound = bound.masked_fill(~fits, torch.inf)
    dead = ~visible | normaliser.empty[0, 0][:, None]  # [T, C]
    return Bounded(value, bound.masked_fill(dead, 0.0))


def _logits(
    rows: Float[Tensor, "HK G T D"], windows: _Windows, precision: Precision
) -> tuple[Float[Tensor, "HK G T C"], Float[Tensor, "HK G T C"]]:
    """Return exact logits and the bound of their errors."""
    x = dots(rows, windows[0]) * rows.shape[-1] ** -0.5
    return x, logit_error(rows, windows[0], precision, windows[1])


@remembered
def block_scores(score: Bounded, num_keys: int, config: SparseConfig) -> Bounded:
    """Bound the highest of the scores that overlap each block: `[HK, T, N]`.

    The highest of perturbed numbers lies between the highest lower end and the highest upper end.
    A block without a visible window has value -inf and bound 0.
    """
    value = pool_blocks(score.value, num_keys, config)
    unbounded = score.bound.isinf()
    lower = (score.value - score.bound).masked_fill(unbounded, -torch.inf)
    upper = (score.value + score.bound).masked_fill(unbounded, torch.inf)
    low, high = (pool_blocks(x, num_keys, config) for x in (lower, upper))
    bound = torch.maximum(high - value, value - low).masked_fill(high == torch.inf, torch.inf)
    return Bounded(value, bound.masked_fill(value == -torch.inf, 0.0))
