from __future__ import annotations

from itertools import pairwise

import pytest

from infllmv2_conformance.bench.counts import FUNCTIONS, Ceilings, Count, count, floor
from infllmv2_conformance.bench.workloads import SHAPES, Workload
from infllmv2_conformance.masks import competing_blocks, visible_blocks
from infllmv2_reference.geometry import num_selected, num_windows, overlapping_windows
from infllmv2_reference.layout import Span
from infllmv2_reference.score import visible_windows

TINY = SHAPES["tiny"]
CASES = [
    Workload(TINY, 200, 12, dtype="float32"),
    Workload(TINY, 333, 8, dtype="float32"),
    Workload(TINY, 40, 12, dtype="float32"),  # fewer windows than a K_C2 window needs
    Workload(TINY, 200, 12, task="decode", batch=3, dtype="float32"),
]


class Brute:
    """Count by explicit masks of one sequence."""

    def __init__(self, w: Workload) -> None:
        self.w, self.c = w, w.config
        self.span = Span(0, slice(0, w.queries), slice(0, w.length))
        c = self.c
        self.seen1 = visible_windows(w.queries, w.length, c.kernel_size, c.kernel_stride)
        self.seen2 = visible_windows(w.queries, w.length, c.lse_kernel_size, c.lse_kernel_stride)
        self.visible = visible_blocks(self.span, c)
        self.competing = competing_blocks(self.span, c)
        self.heads, self.groups = w.shape.query_heads * w.batch, w.shape.kv_heads * w.batch

    def competing_windows(self) -> int:
        total = 0
        c = self.c
        for t in range(self.w.queries):
            touching = set()
            for block in self.competing[t].nonzero().flatten().tolist():
                span = overlapping_windows(block, c.block_size, c.kernel_size, c.kernel_stride)
                touching |= set(range(*span))
            total += len(touching & set(self.seen1[t].nonzero().flatten().tolist()))
        return total

    def attended(self) -> int:
        c, total = self.c, 0
        for p in range(self.w.length - self.w.queries, self.w.length):
            chosen = num_selected(p, c.block_size, c.init_blocks, c.local_blocks, c.budget)
            blocks = [*range(chosen - 1), p // c.block_size]  # the own block is always among them
            tokens = {b * c.block_size + i for b in blocks for i in range(c.block_size)}
            total += sum(token <= p for token in tokens)
        return total


@pytest.mark.parametrize("w", CASES, ids=str)
def test_counts_are_those_of_explicit_masks(w):
    brute, dim = Brute(w), w.shape.head_dim
    windows = int(brute.seen1.sum())
    scored, normaliser = brute.competing_windows(), int(brute.seen2.sum())
    pairs = brute.attended()
    assert count("attend", w).exps == pairs * brute.heads
    assert count("attend", w).flop == 4 * dim * pairs * brute.heads
    assert count("attend.backward", w).flop == 10 * dim * pairs * brute.heads
    assert count("select", w).flop == 2 * dim * (scored + normaliser) * brute.heads
    assert count("score_windows", w).exps == (windows + normaliser) * brute.heads
    both = count("select", w).flop + count("attend", w).flop
    assert count("attention", w).flop == count("decode", w).flop == both
    rows = w.queries * w.batch
    pooled = (windows + int(brute.visible.sum())) * brute.groups * 4
    assert count("pool_blocks", w).bytes == pooled
    chosen = rows * w.shape.kv_heads * w.budget * 4
    ranked = int(brute.competing.sum()) * brute.groups * 4
    assert count("select_blocks", w).bytes == ranked + chosen
    dense = sum(range(w.length - w.queries + 1, w.length + 1))
    assert count("dense", w).flop == 4 * dim * dense * brute.heads


def test_bytes_are_those_of_the_tensors():
    w = CASES[0]
    q, kv = 200 * 4 * 32 * 4, 200 * 2 * 32 * 4
    lse, selected = 200 * 4 * 4, 200 * 2 * 12 * 4
    c1 = num_windows(200, 8, 4) * 2 * 32 * 4
    assert count("dense", w).bytes == 2 * q + 2 * kv + lse
    assert count("attend", w).bytes == 2 * q + 2 * kv + lse + selected
    assert count("attend.backward", w).bytes == 4 * q + 4 * kv + lse + selected
    assert count("compress_keys", w).bytes == kv + c1
    assert count("score_windows", w, score_bytes=2).bytes < count("score_windows", w).bytes


def test_the_released_model_has_the_known_floors():
    """320 n^2 operations and 1.25 n^2 exponentials to score; 5.24 and 6.29 MB to decode at 128k."""
    n = 1 << 17
    prefill = Workload(SHAPES["minicpm4"], n, 96)
    scores = count("score_windows", prefill)
    assert scores.flop / n**2 == pytest.approx(320, rel=1e-2)
    assert scores.exps / n**2 == pytest.approx(1.25, rel=1e-2)
    step = Workload(SHAPES["minicpm4"], n, 96, task="decode")
    assert count("decode", step).bytes == pytest.approx(5.24e6 + 6.29e6, rel=1e-2)
    assert count("dense", step).bytes == pytest.approx(134.2e6, rel=1e-2)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_longer_sequences_are_more_work(function):
    works = [count(function, Workload(SHAPES["minicpm4"], n, 96)) for n in (4096, 16384, 65536)]
    for less, more in pairwise(works):
        if function != "append":
            assert more.bytes > less.bytes
        assert more.flop >= less.flop


def test_the_floor_is_the_slowest_of_what_was_measured():
    work = Count(flop=100, bytes=100, exps=100)
    assert floor(work, Ceilings(10.0, 20.0, 5.0)) == (20.0, "exps")
    assert floor(work, Ceilings(10.0, 20.0, None)) == (10.0, "bytes")
    assert floor(work, Ceilings()) == (0.0, "")


def test_exact_normalisers_need_every_window():
    w = CASES[1]
    exact = count("select", w)

    class Exact(Workload):
        @property
        def config(self):
            from dataclasses import replace

            return replace(super().config, lse="exact")

    w = Exact(w.shape, w.length, w.budget, dtype="float32")
    windows = int(visible_windows(w.length, w.length, 8, 4).sum())
    assert count("select", w).exps == windows * w.shape.query_heads
    assert exact.exps != count("select", w).exps
