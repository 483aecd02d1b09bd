"""Which parameter matters how much? One at a time, on the same inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data import attended_tokens, background, block_weights, generator, half_of_the_weight, towards
from infllmv2_reference import SparseConfig, compress_for_selection, select_by_windows

HEADS, GROUP, DIM, SCALE = 4, 8, 32, 1.0
BASE = replace(SparseConfig.minicpm4(), dense_len=-1)
LENGTHS = (2, 8)
FULL = {"num_keys": 32768, "trials": 128}
SMALL = {"num_keys": 8192, "trials": 4}


def variants() -> dict[str, dict[str, SparseConfig]]:
    """Return the configurations by parameter: each differs from the released one in it alone."""
    windows = ((8, 4), (16, 8), (32, 8), (32, 16), (32, 32), (64, 16), (64, 32), (64, 64))
    coarse = ((64, 32), (128, 64), (256, 128), (512, 256))
    return {
        "windows": {
            f"{size}_{stride}": replace(
                BASE, kernel_size=size, kernel_stride=stride, lse_kernel=(128, 64)
            )
            for size, stride in windows
        },
        "coarse": {
            f"{size}_{stride}": replace(BASE, lse_kernel=(size, stride)) for size, stride in coarse
        }
        | {"exact": replace(BASE, lse="exact")},
        "pooling": {"overlap": BASE, "paper_eq7": replace(BASE, pooling="paper_eq7")},
        "budget": {
            str(budget): replace(BASE, topk=budget - BASE.window_size // BASE.block_size)
            for budget in (48, 64, 96, 128, 192)
        },
        "window_size": {  # the budget stays at 96
            str(w): replace(BASE, window_size=w, topk=BASE.budget - w // BASE.block_size)
            for w in (512, 1024, 2048, 4096)
        },
    }


def run(num_keys: int, trials: int) -> dict[str, Any]:
    """Return the recall of two needles and the dense weight that is kept, by variant."""
    tables = variants()
    results: dict[str, Any] = {
        parameter: {name: {} for name in configs} for parameter, configs in tables.items()
    }
    random = generator("sensitivity", num_keys, trials)
    for _ in range(trials // HEADS):
        keys = background(random, num_keys, HEADS, DIM, 0.25)
        q = SCALE * torch.randn(1, HEADS * GROUP, DIM, generator=random)
        places = torch.rand(HEADS, generator=random).tolist()
        for length in LENGTHS:
            firsts = [_place(u, num_keys, length) for u in places]
            planted = _plant(keys, q, firsts, length)
            groups = q[0].split(GROUP)
            weights = [block_weights(groups[h], planted[:, h], 64) for h in range(HEADS)]
            for parameter, configs in tables.items():
                for name, config in configs.items():
                    windows = compress_for_selection(planted, config)
                    selected = select_by_windows(q, *windows, num_keys, config)[:, 0]  # [HK, K]
                    for head, row in enumerate(selected.long()):
                        found = attended_tokens(row, 64, firsts[head], length)
                        sums = results[parameter][name]
                        _count(sums, f"recall_{length}", found / trials)
                        _count(sums, f"weight_{length}", float(weights[head][row].sum()) / trials)
    return results


def _count(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value


def _place(u: float, num_keys: int, length: int) -> int:
    """Return the needle's first token: no variant has it in a forced block."""
    size, local = BASE.block_size, max(c.local_blocks for c in variants()["window_size"].values())
    begin, end = size, num_keys - local * size - length
    return begin + int(u * (end - begin))


def _plant(keys: Tensor, q: Tensor, firsts: list[int], length: int) -> Tensor:
    logit = half_of_the_weight(len(keys), length, SCALE)
    planted = keys.clone()
    for head, first in enumerate(firsts):
        heads = q[0, head * GROUP : head * GROUP + 1]  # one head of the group looks for it
        planted[first : first + length, head] += towards(heads, logit)
    return planted
