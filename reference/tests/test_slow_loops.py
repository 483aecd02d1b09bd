"""Every stage against slow loops over Python floats, written from the formulas, on random inputs.

Nothing here is shared with the reference: visibility, overlap and forced blocks are worked out from
sets of tokens again, so that a mistake would have to be made twice.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, inf, log, sqrt

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infllmv2_reference import SparseConfig, attention
from infllmv2_reference.pipeline import compress_for_selection
from infllmv2_reference.pool import pool_blocks
from infllmv2_reference.score import score_windows

BASE = SparseConfig(
    block_size=4, kernel_size=2, kernel_stride=1, window_size=4, topk=3, dense_len=-1
)
CONFIGS = {
    "approximate": BASE,
    "exact": replace(BASE, lse="exact"),
    "one stage": replace(BASE, kernel_size=4, kernel_stride=4, lse="exact"),
    "odd": replace(BASE, block_size=3, kernel_size=5, kernel_stride=2, window_size=3, topk=4),
    "many spare": replace(BASE, init_blocks=0, window_size=0, topk=3, lse_kernel=(5, 3)),
    "short local": replace(BASE, local_override=1),
}
HEADS, KV_HEADS, DIM = 4, 2, 2

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def compress(keys: list[Vector], size: int, stride: int) -> dict[tuple[int, ...], Vector]:
    """Return the mean key of every complete window, named by its tokens (Eq. 4)."""
    starts = range(0, len(keys), stride)
    spans = [tuple(range(start, start + size)) for start in starts if start + size <= len(keys)]
    return {span: [sum(keys[t][d] for t in span) / size for d in range(DIM)] for span in spans}


def score(
    q: list[Vector], keys: list[Vector], position: int, config: SparseConfig
) -> dict[tuple[int, ...], float]:
    """Return the score of every visible window, summed over the heads of a group (Eq. 5, 6, 8)."""
    windows = compress(keys[: position + 1], config.kernel_size, config.kernel_stride)
    normaliser = windows
    if config.lse == "approximate":
        shape = config.lse_kernel or (4 * config.kernel_size, 4 * config.kernel_stride)
        normaliser = compress(keys[: position + 1], *shape)
    scores = dict.fromkeys(windows, 0.0)
    for head in q:
        denominator = sum(exp(dot(head, k) / sqrt(DIM)) for k in normaliser.values())
        for window, k in windows.items():
            scores[window] += exp(dot(head, k) / sqrt(DIM)) / denominator if denominator else 0.0
    return scores


def pool(scores: dict[tuple[int, ...], float], position: int, block_size: int) -> list[float]:
    """Return the best score of the windows that share a token with each visible block (Eq. 7)."""
    blocks = [range(b, b + block_size) for b in range(0, position + 1, block_size)]
    return [max((s for w, s in scores.items() if {*w} & {*b}), default=-inf) for b in blocks]


def select(block_scores: list[float], config: SparseConfig) -> list[int]:
    """Take forced blocks, then one best block after another, the earlier of equals (Eq. 2, 3)."""
    visible = list(range(len(block_scores)))
    local = config.local_override or config.window_size // config.block_size + 1
    chosen = {*visible[: config.init_blocks], *visible[-local:]}
    while len(chosen) < min(config.budget, len(visible)):
        rest = [b for b in visible if b not in chosen]
        chosen.add(next(b for b in rest if block_scores[b] == max(block_scores[r] for r in rest)))
    return sorted(chosen)


def attend(
    q: Vector, keys: list[Vector], values: list[Vector], tokens: list[int]
) -> tuple[Vector, float]:
    """Return softmax attention over `tokens`, and the logarithm of its denominator (Eq. 1)."""
    weights = {t: exp(dot(q, keys[t]) / sqrt(DIM)) for t in tokens}
    total = sum(weights.values())
    out = [sum(w * values[t][d] for t, w in weights.items()) / total for d in range(DIM)]
    return out, log(total)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(num_keys=st.integers(1, 32), num_queries=st.integers(1, 8), seed=st.integers(0, 2**31))
@example(num_keys=32, num_queries=32, seed=0)
def test_reference_agrees_with_slow_loops(
    config: SparseConfig, num_keys: int, num_queries: int, seed: int
) -> None:
    num_queries = min(num_queries, num_keys)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(tokens, heads, DIM, generator=generator, dtype=torch.float64)
        for tokens, heads in ((num_queries, HEADS), (num_keys, KV_HEADS), (num_keys, KV_HEADS))
    )
    windows = score_windows(q, *compress_for_selection(k, config), num_keys, config)
    blocks = pool_blocks(windows, num_keys, config)
    out, lse, selected = attention(q, k, v, config)
    assert selected is not None
    group = HEADS // KV_HEADS
    for kv_head in range(KV_HEADS):
        keys, values = k[:, kv_head].tolist(), v[:, kv_head].tolist()
        heads = range(kv_head * group, (kv_head + 1) * group)
        for row in range(num_queries):
            position = num_keys - num_queries + row
            scores = score([q[row, h].tolist() for h in heads], keys, position, config)
            visible = list(scores.values())
            actual = windows[kv_head, row].tolist()
            assert actual[: len(visible)] == pytest.approx(visible, rel=1e-12)
            assert set(actual[len(visible) :]) <= {-inf}
            block_scores = pool(scores, position, config.block_size)
            actual = blocks[kv_head, row].tolist()
            assert actual[: len(block_scores)] == pytest.approx(block_scores, rel=1e-12)
            chosen = select(actual[: len(block_scores)], config)  # the reference's, to the last bit
            assert [b for b in selected[kv_head, row].tolist() if b >= 0] == chosen
            tokens = [t for t in range(position + 1) if t // config.block_size in chosen]
            for head in heads:
                expected, expected_lse = attend(q[row, head].tolist(), keys, values, tokens)
                assert out[row, head].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-13)
                assert lse[row, head].item() == pytest.approx(expected_lse, rel=1e-12, abs=1e-13)
