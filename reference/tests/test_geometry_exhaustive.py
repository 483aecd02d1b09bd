"""Every function of geometry against brute force with explicit sets of tokens.

The brute force here knows windows, blocks and sequences as sets of tokens and nothing else:
windows are made by walking along the sequence, blocks by cutting it up, and every question ("has it
ended?", "do they overlap?") is asked of the sets.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from infllmv2_reference import SparseConfig, select_blocks
from infllmv2_reference.geometry import (
    first_position,
    is_forced,
    num_blocks,
    num_forced,
    num_selected,
    num_visible_windows,
    num_windows,
    overlapping_windows,
    paper_eq7_windows,
    window_span,
)
from infllmv2_reference.score import visible_windows

LENGTH = 330
"""Tokens of the longest sequence tried."""

SHAPES = [  # (l, s, B)
    (32, 16, 64),
    (128, 64, 64),
    (64, 64, 64),
    (8, 4, 16),
    (5, 3, 7),
    (7, 2, 5),
    (10, 4, 6),
    (9, 5, 4),
    (16, 1, 3),
    (3, 3, 2),
    (1, 1, 1),
]
EQ7_SHAPES = [shape for shape in SHAPES if shape[0] % shape[1] == 0 == shape[2] % shape[1]]
WINDOWS = sorted({shape[:2] for shape in SHAPES})
BLOCKS = sorted({shape[2] for shape in SHAPES})


def walk_windows(kernel_size: int, kernel_stride: int, end: int = LENGTH) -> list[frozenset[int]]:
    """Return the windows that begin before `end`, each a set of tokens."""
    windows, start = [], 0
    while start < end:
        windows.append(frozenset(start + i for i in range(kernel_size)))
        start += kernel_stride
    return windows


def cut_blocks(num_keys: int, block_size: int) -> list[set[int]]:
    """Return the blocks of a sequence, each a set of tokens; the last one may be short."""
    blocks: list[set[int]] = []
    for token in range(num_keys):
        if not blocks or len(blocks[-1]) == block_size:
            blocks.append(set())
        blocks[-1].add(token)
    return blocks


@pytest.mark.parametrize(("kernel_size", "kernel_stride"), WINDOWS)
def test_window_spans_are_the_windows(kernel_size: int, kernel_stride: int) -> None:
    for c, window in enumerate(walk_windows(kernel_size, kernel_stride)):
        assert set(range(*window_span(c, kernel_size, kernel_stride))) == window


@pytest.mark.parametrize(("kernel_size", "kernel_stride"), WINDOWS)
def test_num_windows_counts_the_complete_windows(kernel_size: int, kernel_stride: int) -> None:
    windows = walk_windows(kernel_size, kernel_stride)
    for num_keys in range(LENGTH):
        tokens = set(range(num_keys))
        complete = [c for c, window in enumerate(windows) if window <= tokens]
        assert complete == list(range(num_windows(num_keys, kernel_size, kernel_stride)))


@pytest.mark.parametrize(("kernel_size", "kernel_stride"), WINDOWS)
def test_visible_windows_hold_no_token_after_the_position(
    kernel_size: int, kernel_stride: int
) -> None:
    """D2: a window is visible if all of its tokens are at or before the query."""
    windows = walk_windows(kernel_size, kernel_stride)
    for position in range(LENGTH):
        visible = [c for c, window in enumerate(windows) if all(t <= position for t in window)]
        assert visible == list(range(num_visible_windows(position, kernel_size, kernel_stride)))


@pytest.mark.parametrize(("kernel_size", "kernel_stride"), [(8, 4), (5, 3), (7, 2), (3, 3), (1, 1)])
def test_visibility_of_every_chunk_is_that_of_the_prefill(
    kernel_size: int, kernel_stride: int
) -> None:
    """The query at a position sees the same windows whatever chunk and history it comes in."""
    longest = 40
    prefill = visible_windows(longest, longest, kernel_size, kernel_stride)
    for num_keys in range(longest + 1):
        count = num_windows(num_keys, kernel_size, kernel_stride)
        for num_queries in range(num_keys + 1):
            chunk = visible_windows(num_queries, num_keys, kernel_size, kernel_stride)
            rows = prefill[num_keys - num_queries : num_keys]
            assert torch.equal(chunk, rows[:, :count])
            assert not rows[:, count:].any()


def test_first_position_is_that_of_the_last_keys() -> None:
    for num_keys in range(100):
        positions = list(range(num_keys))
        for num_queries in range(1, num_keys + 1):
            assert first_position(num_queries, num_keys) == positions[-num_queries:][0]
        assert first_position(0, num_keys) == num_keys


@pytest.mark.parametrize("block_size", BLOCKS)
def test_num_blocks_counts_the_blocks(block_size: int) -> None:
    for num_keys in range(LENGTH):
        assert num_blocks(num_keys, block_size) == len(cut_blocks(num_keys, block_size))


@pytest.mark.parametrize(("kernel_size", "kernel_stride", "block_size"), SHAPES)
def test_overlapping_windows_share_a_token(
    kernel_size: int, kernel_stride: int, block_size: int
) -> None:
    """D5: a window belongs to every block that it has a token in common with."""
    blocks = [b for b in cut_blocks(LENGTH, block_size) if len(b) == block_size]
    windows = walk_windows(kernel_size, kernel_stride)
    for index, block in enumerate(blocks):
        touching = [c for c, window in enumerate(windows) if not window.isdisjoint(block)]
        span = overlapping_windows(index, block_size, kernel_size, kernel_stride)
        assert touching == list(range(*span))


@pytest.mark.parametrize(("kernel_size", "kernel_stride", "block_size"), SHAPES)
def test_every_window_of_a_later_block_is_invisible(
    kernel_size: int, kernel_stride: int, block_size: int
) -> None:
    """What stands at blocks after the query's own never depends on a visible window."""
    windows = walk_windows(kernel_size, kernel_stride)
    for position in range(LENGTH - 2 * block_size):
        for later in (position // block_size + 1, position // block_size + 2):
            first, _ = overlapping_windows(later, block_size, kernel_size, kernel_stride)
            assert max(windows[first]) > position
            assert first >= num_visible_windows(position, kernel_size, kernel_stride)


@pytest.mark.parametrize(("kernel_size", "kernel_stride", "block_size"), EQ7_SHAPES)
def test_paper_eq7_begins_in_the_block_and_is_as_long_as_an_overlap(
    kernel_size: int, kernel_stride: int, block_size: int
) -> None:
    """D5: the literal reading begins with the window that begins with the block."""
    blocks = [b for b in cut_blocks(LENGTH, block_size) if len(b) == block_size]
    windows = walk_windows(kernel_size, kernel_stride)
    starts = [min(window) for window in windows]
    inner = next(b for b in blocks if min(b) >= kernel_size)
    length = sum(not window.isdisjoint(inner) for window in windows)
    for index, block in enumerate(blocks):
        first = starts.index(min(block))
        span = paper_eq7_windows(index, block_size, kernel_size, kernel_stride)
        assert list(range(*span)) == [first + i for i in range(length)]


def test_paper_eq7_of_the_released_model_is_4b_to_4b_plus_5() -> None:
    """D5: for 32/16/64 it drops window 4b - 1, which overlaps, and takes 4b + 4, which does not."""
    windows = walk_windows(32, 16, 4000)
    for b, block in enumerate(cut_blocks(3200, 64)):
        assert paper_eq7_windows(b, 64, 32, 16) == (4 * b, 4 * b + 5)
        assert overlapping_windows(b, 64, 32, 16) == (max(4 * b - 1, 0), 4 * b + 4)
        assert windows[4 * b + 4].isdisjoint(block)
        assert b == 0 or not windows[4 * b - 1].isdisjoint(block)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize("init_blocks", [0, 1, 3])
@pytest.mark.parametrize("local_blocks", [1, 2, 5])
def test_forced_blocks_are_the_first_and_the_last_visible_ones(
    block_size: int, init_blocks: int, local_blocks: int
) -> None:
    """D6, and the counts: forced, and selected for every budget."""
    length = min(LENGTH, 12 * block_size)
    blocks = cut_blocks(length, block_size)
    budgets = range(init_blocks + local_blocks, init_blocks + local_blocks + 5)
    for position in range(length):
        visible = [b for b, tokens in enumerate(blocks) if min(tokens) <= position]
        forced = sorted({*visible[:init_blocks], *visible[-local_blocks:]})
        shape = block_size, init_blocks, local_blocks
        assert [b for b in range(len(blocks) + 2) if is_forced(b, position, *shape)] == forced
        assert num_forced(position, *shape) == len(forced)
        for budget in budgets:
            assert num_selected(position, *shape, budget) == len(visible[:budget])


@pytest.mark.parametrize(("block_size", "window_blocks"), list(product([2, 3, 16, 64], [1, 2, 4])))
def test_sliding_window_is_covered_by_one_block_more_and_not_by_fewer(
    block_size: int, window_blocks: int
) -> None:
    """D6: w/B + 1 local blocks hold the last w tokens; w/B hold them only at the end of a block."""
    window = window_blocks * block_size
    length = window + 4 * block_size
    blocks = cut_blocks(length, block_size)
    for position in range(length):
        sliding = set(range(length)[: position + 1][-window:])
        whole, short = (
            set().union(*(b for i, b in enumerate(blocks) if is_forced(i, position, *args)))
            for args in ((block_size, 0, window_blocks + 1), (block_size, 0, window_blocks))
        )
        assert sliding <= whole
        ends_block = position + 1 in {min(block) for block in blocks} or position + 1 == length
        assert (sliding <= short) == (position < window or ends_block)


@pytest.mark.parametrize("position", [2047, 2048, 2100, 2111, 2112, 5000, 8191])
def test_released_preset_covers_its_sliding_window_and_the_papers_does_not(position: int) -> None:
    """D6 for w = 2048, B = 64: 33 local blocks cover it, the paper's 32 do not."""

    def covers(config: SparseConfig) -> bool:
        sliding = range(position - config.window_size + 1, position + 1)
        return all(
            is_forced(token // 64, position, config.block_size, 0, config.local_blocks)
            for token in sliding
        )

    assert covers(SparseConfig.minicpm4())
    assert covers(SparseConfig.paper()) == (position in (2047, 2111, 8191))  # ends of blocks


@pytest.mark.parametrize("block_size", [1, 2, 4, 7, 16, 64])
@pytest.mark.parametrize(("init_blocks", "local_blocks"), list(product([0, 1, 2], [1, 2, 3])))
def test_rows_without_normaliser_have_at_most_one_block_to_choose(
    block_size: int, init_blocks: int, local_blocks: int
) -> None:
    """D4: with l2 = 2B a position without visible K_C2 window has at most one unforced block."""
    blocks = cut_blocks(5 * block_size, block_size)
    first_window = walk_windows(2 * block_size, 1)[0]  # it ends first, whatever the stride
    for position in range(5 * block_size):
        visible = [b for b, tokens in enumerate(blocks) if min(tokens) <= position]
        args = position, block_size, init_blocks, local_blocks
        unforced = [b for b in visible if not is_forced(b, *args)]
        without = not all(token <= position for token in first_window)
        assert not without or len(unforced) <= 1
        for kernel_stride in range(1, 2 * block_size + 1):
            count = num_visible_windows(position, 2 * block_size, kernel_stride)
            assert (count == 0) == without


def test_rows_without_normaliser_would_choose_with_a_longer_window() -> None:
    """D4's condition is needed: with l2 = 2B + 2, position 2B chooses between blocks 0 and 1."""
    for block_size in (1, 4, 64):
        position = 2 * block_size
        assert num_visible_windows(position, 2 * block_size + 2, 1) == 0
        assert [b for b in range(3) if not is_forced(b, position, block_size, 0, 1)] == [0, 1]


@pytest.mark.parametrize(("init_blocks", "local_blocks"), [(0, 1), (1, 1), (0, 2)])
@pytest.mark.parametrize("spare", [0, 1, 2])
def test_rows_without_normaliser_select_the_same_whatever_their_scores(
    init_blocks: int, local_blocks: int, spare: int
) -> None:
    """D4: so the score of such a row cannot change a selection."""
    window_size = 4 * (local_blocks - 1)
    config = SparseConfig(
        block_size=4,
        kernel_size=2,
        kernel_stride=1,
        init_blocks=init_blocks,
        window_size=window_size,
        topk=init_blocks + 1 + spare,
    )
    assert config.lse_kernel_size == 2 * config.block_size
    num_keys = 2 * config.block_size - 1  # no row sees a window of 2B tokens
    chosen = {
        tuple(
            select_blocks(torch.tensor(scores).expand(1, num_keys, 2), num_keys, config)
            .flatten()
            .tolist()
        )
        for scores in product((-torch.inf, 0.0, 0.5, 3.0, torch.inf), repeat=2)
    }
    assert len(chosen) == 1


@pytest.mark.parametrize("config", [SparseConfig.minicpm4(), SparseConfig.paper()])
def test_presets_meet_the_condition_of_the_lemma(config: SparseConfig) -> None:
    assert config.lse_kernel_size == 2 * config.block_size
    assert config.local_blocks >= 1
