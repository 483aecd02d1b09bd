"""Does one window per block find a planted needle as well as five overlapping ones do?"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from data import attended_tokens, background, generator, half_of_the_weight, towards
from infllmv2_reference import (
    SparseConfig,
    compress_for_selection,
    compress_keys,
    select_by_windows,
)

HEADS, GROUP, DIM, SCALE = 4, 8, 32, 1.0
METHODS = {
    "one_stage": replace(SparseConfig.one_stage(), dense_len=-1),
    "three_stage": replace(SparseConfig.minicpm4(), dense_len=-1),
}
FULL = {
    "contexts": [4096, 8192, 16384, 32768, 65536, 131072],
    "lengths": [1, 2, 4, 8, 16],
    "looking": [1, 2, 8],
    "offsets": list(range(0, 64, 4)),
    "trials": 128,
}
SMALL = {"contexts": [8192], "lengths": [1, 8], "looking": [2], "offsets": [0, 60], "trials": 8}
OFFSET_LENGTH = 8


def run(
    contexts: list[int], lengths: list[int], looking: list[int], offsets: list[int], trials: int
) -> dict[str, Any]:
    """Return the recall by context, by looking heads, and by offset in the block."""
    results: dict[str, Any] = {}
    for name, drift in (("white", 0.0), ("drifting", 0.25)):
        results[name] = {
            s: _by_method(_recalls(s, lengths, trials, drift, looking=1)) for s in contexts
        }
    middle = contexts[len(contexts) // 2]
    results["looking"] = {
        heads: _by_method(_recalls(middle, lengths, trials, 0.25, heads)) for heads in looking
    }
    results["offset"] = {
        offset: _by_method(_recalls(middle, [OFFSET_LENGTH], trials, 0.25, 1, offset))
        for offset in offsets
    }
    return results


def _by_method(recalls: dict[tuple[str, int], float]) -> dict[str, dict[int, float]]:
    return {m: {length: r for (n, length), r in recalls.items() if n == m} for m in METHODS}


def _recalls(
    num_keys: int,
    lengths: list[int],
    trials: int,
    drift: float,
    looking: int,
    offset: int | None = None,
) -> dict[tuple[str, int], float]:
    """Return the mean recall of every method and length, over `trials` trials.

    Args:
        num_keys: S; the query is the last token's.
        lengths: tokens of the needle.
        trials: a multiple of HEADS: the key/value heads of one call are trials of their own.
        drift: of the background.
        looking: how many heads of the group the needle attracts.
        offset: where in its block the needle begins; anywhere if None.
    """
    random = generator("needles", num_keys, trials, drift, looking, offset)
    sums = dict.fromkeys(product(METHODS, lengths), 0.0)
    for _ in range(trials // HEADS):
        keys = background(random, num_keys, HEADS, DIM, drift)
        q = SCALE * torch.randn(1, HEADS * GROUP, DIM, generator=random)
        places = torch.rand(HEADS, generator=random).tolist()
        windows = {m: compress_for_selection(keys, config) for m, config in METHODS.items()}
        for method, length in sums:
            config = METHODS[method]
            firsts = [_place(u, num_keys, length, offset) for u in places]
            k_c1, k_c2 = _plant(keys, q, firsts, length, looking, windows[method], config)
            selected = select_by_windows(q, k_c1, k_c2, num_keys, config)
            for head, first in enumerate(firsts):
                found = attended_tokens(selected[head, 0], config.block_size, first, length)
                sums[method, length] += found / trials
    return sums


def _place(u: float, num_keys: int, length: int, offset: int | None) -> int:
    """Return the needle's first token, for `u` in 0..1: no token of it in a forced block."""
    config = METHODS["three_stage"]
    size = config.block_size
    begin, end = config.init_blocks * size, num_keys - config.local_blocks * size - length
    first = begin + int(u * (end - begin))
    return first if offset is None else min(first // size * size + offset, end - size + offset)


def _plant(
    keys: Tensor,
    q: Tensor,
    firsts: list[int],
    length: int,
    looking: int,
    windows: tuple[Tensor, Tensor],
    config: SparseConfig,
) -> tuple[Tensor, Tensor]:
    """Return the windows as if a needle stood in every head's keys.

    The needle draws half of the weight of the heads that look for it. Only the windows that touch
    it are compressed again.
    """
    logit = half_of_the_weight(len(keys), length, SCALE)
    k_c1, k_c2 = windows[0].clone(), windows[1].clone()
    for head, first in enumerate(firsts):
        needle = towards(q[0, head * GROUP : head * GROUP + looking], logit)
        for k_c, size, stride in (
            (k_c1, config.kernel_size, config.kernel_stride),
            (k_c2, config.lse_kernel_size, config.lse_kernel_stride),
        ):
            begin, end = max(0, (first - size) // stride + 1), (first + length - 1) // stride + 1
            start = begin * stride
            part = keys[start : (end - 1) * stride + size, head : head + 1].clone()
            part[first - start : first - start + length] += needle
            k_c[begin:end, head] = compress_keys(part, size, stride)[:, 0]
    return k_c1, k_c2
