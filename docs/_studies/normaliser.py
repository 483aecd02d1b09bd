"""How far does the approximate normaliser move the selection?

Only the group can make a difference: one head's normaliser is a factor that its scores share. With
`r_h = exp(lse_exact - lse_approximate)` of head h, the approximate score is
`sum_h r_h w_h` where the exact one is `sum_h w_h`. So everything follows from how far the `r_h` of
a group lie apart: `spread = max_h ln r_h - min_h ln r_h`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data import background, block_weights, generator, half_of_the_weight, towards
from infllmv2_reference import (
    SparseConfig,
    compress_for_selection,
    pool_blocks,
    score_windows,
    select_blocks,
)

HEADS, DIM, LENGTH = 4, 32, 8
APPROXIMATE = replace(SparseConfig.minicpm4(), dense_len=-1)
EXACT = replace(APPROXIMATE, lse="exact")
PER_WINDOW = 4  # windows of K_C1 that begin within one stride of K_C2
FULL = {
    "num_keys": 16384,
    "trials": 64,
    "scales": [0.5, 1.0, 2.0, 4.0],
    "groups": [1, 2, 8],
}
SMALL = {"num_keys": 8192, "trials": 4, "scales": [2.0], "groups": [1, 4]}


def run(num_keys: int, trials: int, scales: list[float], groups: list[int]) -> dict[str, Any]:
    """Return what differs, by kind of input, scale of the queries and size of the group."""
    results: dict[str, Any] = {}
    for kind in ("white", "drifting", "needle"):
        results[kind] = {}
        for scale in scales:
            results[kind][f"scale_{scale:g}".replace(".", "_")] = {
                f"group_{group}": _measure(kind, num_keys, trials, scale, group) for group in groups
            }
    return results


def _measure(kind: str, num_keys: int, trials: int, scale: float, group: int) -> dict[str, float]:
    """Return means over trials, and worst cases, of one condition."""
    random = generator("normaliser", kind, num_keys, trials, scale, group)
    rows: list[dict[str, float]] = []
    for _ in range(trials // HEADS):
        keys = background(random, num_keys, HEADS, DIM, 0.0 if kind == "white" else 0.25)
        q = scale * torch.randn(1, HEADS * group, DIM, generator=random)
        if kind == "needle":
            _plant(keys, q, group, scale, random)
        rows += _compare(keys, q, group)
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    tight = ("regret", "of_logit_bound", "of_key_bound", "flip_minus_spread")
    return mean | {f"worst_{name}": max(row[name] for row in rows) for name in tight}


def _plant(keys: Tensor, q: Tensor, group: int, scale: float, random: torch.Generator) -> None:
    """Give the first head of every group a needle that draws half of its weight."""
    logit = half_of_the_weight(len(keys), LENGTH, scale)
    for head in range(HEADS):
        end = len(keys) - EXACT.local_blocks * EXACT.block_size - LENGTH
        first = int(torch.randint(EXACT.block_size, end, (), generator=random))
        one = q[0, head * group : head * group + 1]
        keys[first : first + LENGTH, head] += towards(one, logit)


def _compare(keys: Tensor, q: Tensor, group: int) -> list[dict[str, float]]:
    """Select with both normalisers and return the measures of every key/value head."""
    k_c1, k_c2 = compress_for_selection(keys, EXACT)
    scores, chosen = [], []
    for config in (EXACT, APPROXIMATE):
        pooled = pool_blocks(score_windows(q, k_c1, k_c2, len(keys), config), len(keys), config)
        scores.append(pooled[:, 0].double())
        chosen.append(select_blocks(pooled, len(keys), config)[:, 0].long())
    measures = []
    for head in range(HEADS):
        queries = q[0, head * group : (head + 1) * group]
        weights = block_weights(queries, keys[:, head], EXACT.block_size)
        row = _difference(scores[0][head], weights, chosen[0][head], chosen[1][head])
        row |= _spread(queries.double(), k_c1[:, head].double(), k_c2[:, head].double())
        row["flip_minus_spread"] = row.pop("flip") - row["spread"]
        measures.append(row)
    return measures


def _difference(
    scores: Tensor, weights: Tensor, exact: Tensor, approximate: Tensor
) -> dict[str, float]:
    """Return how two selections of one row differ, judged by exact scores and dense weights.

    Returns:
        differs: 1 if they do; swapped: blocks of the one that are not in the other; regret: the
        part of the scored blocks' sum of exact scores that is lost; weight_lost: dense softmax
        weight that is lost; flip: `ln` of the largest ratio of the score of a block that only the
        exact selection has to that of one that only the other has.
    """
    dropped = exact[~torch.isin(exact, approximate)]
    taken = approximate[~torch.isin(approximate, exact)]
    own = len(scores) - 1
    free = (exact >= EXACT.init_blocks) & (exact <= own - EXACT.local_blocks)
    lost = float((scores[dropped].sum() - scores[taken].sum()) / scores[exact[free]].sum())
    flip = float((scores[dropped].max() / scores[taken].min()).log()) if len(dropped) else 0.0
    return {
        "differs": float(len(dropped) > 0),
        "swapped": float(len(dropped)),
        "regret": lost,
        "weight_lost": float(weights[dropped].sum() - weights[taken].sum()),
        "flip": flip,
    }


def _spread(q: Tensor, k_c1: Tensor, k_c2: Tensor) -> dict[str, float]:
    """Return how far the `ln r_h` of a group lie apart, and two bounds on it.

    Every window c of K_C1 is assigned to the window d(c) of K_C2 that begins at or before it, the
    last one at the end. With `p` the softmax over K_C2, `r = sum_c p_d(c) exp(x_c - y_d(c))`. So
    `ln r` lies between `ln sum_c p_d(c) exp(-e_c)` and `ln sum_c p_d(c) exp(e_c)` for any
    `e_c >= |x_c - y_d(c)|`: that number itself, or `|q| |k_c - k_d(c)| / sqrt(D)`.
    """
    scale = q.shape[1] ** -0.5
    x, y = q @ k_c1.T * scale, q @ k_c2.T * scale  # [G, C], [G, C2]
    owner = (torch.arange(len(k_c1)) // PER_WINDOW).clamp(max=len(k_c2) - 1)
    weights = y.log_softmax(dim=-1)[:, owner]  # ln p_d(c): [G, C]
    ratios = x.logsumexp(dim=-1) - y.logsumexp(dim=-1)
    spread = float(ratios.max() - ratios.min())
    measures = {"spread": spread}
    by_keys = q.norm(dim=1, keepdim=True) * (k_c1 - k_c2[owner]).norm(dim=1) * scale
    for name, error in (("logit_bound", (x - y[:, owner]).abs()), ("key_bound", by_keys)):
        high, low = ((weights + sign * error).logsumexp(dim=-1) for sign in (1, -1))
        measures[name] = float(high.max() - low.min())
        measures[f"of_{name}"] = spread / measures[name]
    return measures
