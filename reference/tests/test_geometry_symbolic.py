"""Lemmas of geometry for all integers in wide ranges, by symbolic execution (CrossHair and Z3).

Hypothesis hands the tests symbolic integers: geometry is run on constraints instead of numbers, so
a counterexample is solved for, not hit by chance. Window and block shapes are concrete wherever a
symbol would be multiplied by them, which keeps the arithmetic linear, with one exception.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infllmv2_reference.geometry import (
    is_forced,
    num_blocks,
    num_forced,
    num_selected,
    num_visible_windows,
    num_windows,
    overlapping_windows,
    window_span,
)

symbolic = settings(
    backend="crosshair",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
shapes = pytest.mark.parametrize(
    ("kernel_size", "kernel_stride", "block_size"),
    [(32, 16, 64), (64, 64, 64), (5, 3, 7), (10, 4, 6)],
)
TOKENS = st.integers(0, 10**6)
INDICES = st.integers(0, 10**5)
SMALL = st.integers(1, 512)


@shapes
@symbolic
@given(position=TOKENS, window=INDICES)
def test_a_window_is_visible_if_it_has_ended(
    kernel_size: int, kernel_stride: int, block_size: int, position: int, window: int
) -> None:
    """D2: `c*s + l - 1 <= p`."""
    visible = window < num_visible_windows(position, kernel_size, kernel_stride)
    assert visible == (window * kernel_stride + kernel_size - 1 <= position)


@symbolic
@given(position=TOKENS, window=INDICES, kernel_size=SMALL, kernel_stride=SMALL)
def test_a_window_of_any_shape_is_visible_if_it_has_ended(
    position: int, window: int, kernel_size: int, kernel_stride: int
) -> None:
    """D2 with symbolic l and s as well: the solver has to multiply."""
    visible = window < num_visible_windows(position, kernel_size, kernel_stride)
    assert visible == (window * kernel_stride + kernel_size - 1 <= position)


@shapes
@symbolic
@given(num_keys=TOKENS, new_keys=TOKENS, window=INDICES)
def test_appended_tokens_add_the_windows_that_end_in_them(
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_keys: int,
    new_keys: int,
    window: int,
) -> None:
    """Stage 7: exactly those windows are new, and none is lost."""
    before = num_windows(num_keys, kernel_size, kernel_stride)
    after = num_windows(num_keys + new_keys, kernel_size, kernel_stride)
    assert before <= after
    last = window_span(window, kernel_size, kernel_stride)[1] - 1
    assert (before <= window < after) == (num_keys <= last < num_keys + new_keys)


@shapes
@symbolic
@given(num_keys=TOKENS, new_keys=TOKENS)
def test_new_windows_can_be_counted_from_the_first_of_them(
    kernel_size: int, kernel_stride: int, block_size: int, num_keys: int, new_keys: int
) -> None:
    """Stage 7: the cache compresses from token C*s on, C being the windows it has."""
    before = num_windows(num_keys, kernel_size, kernel_stride)
    rest = num_keys + new_keys - before * kernel_stride
    after = num_windows(num_keys + new_keys, kernel_size, kernel_stride)
    assert before + num_windows(rest, kernel_size, kernel_stride) == after


@shapes
@symbolic
@given(num_keys=st.integers(1, 10**6), back=TOKENS)
def test_a_position_sees_only_windows_that_exist_and_the_last_sees_all(
    kernel_size: int, kernel_stride: int, block_size: int, num_keys: int, back: int
) -> None:
    """Tokens appended later change nothing for a position."""
    exist = num_windows(num_keys, kernel_size, kernel_stride)
    assert num_visible_windows(num_keys - 1, kernel_size, kernel_stride) == exist
    position = num_keys - 1 - back % num_keys
    assert num_visible_windows(position, kernel_size, kernel_stride) <= exist


@shapes
@symbolic
@given(block=INDICES, window=INDICES)
def test_overlap_is_intersection_of_intervals(
    kernel_size: int, kernel_stride: int, block_size: int, block: int, window: int
) -> None:
    """D5."""
    first, end = overlapping_windows(block, block_size, kernel_size, kernel_stride)
    assert 0 <= first < end
    window_start, window_end = window_span(window, kernel_size, kernel_stride)
    block_start, block_end = block * block_size, (block + 1) * block_size
    intersect = max(window_start, block_start) < min(window_end, block_end)
    assert (first <= window < end) == intersect


@shapes
@symbolic
@given(position=TOKENS, later=st.integers(1, 1000))
def test_blocks_after_the_querys_own_overlap_no_visible_window(
    kernel_size: int, kernel_stride: int, block_size: int, position: int, later: int
) -> None:
    first, _ = overlapping_windows(
        position // block_size + later, block_size, kernel_size, kernel_stride
    )
    assert num_visible_windows(position, kernel_size, kernel_stride) <= first


@shapes
@symbolic
@given(num_keys=st.integers(1, 10**6))
def test_the_last_query_sees_every_block(
    kernel_size: int, kernel_stride: int, block_size: int, num_keys: int
) -> None:
    assert num_blocks(num_keys, block_size) == (num_keys - 1) // block_size + 1


@pytest.mark.parametrize("block_size", [1, 7, 64])
@symbolic
@given(own=st.integers(0, 7), offset=TOKENS, init=st.integers(0, 9), local=st.integers(1, 9))
def test_forced_blocks_are_counted_and_within_the_selected(
    block_size: int, own: int, offset: int, init: int, local: int
) -> None:
    """D6: the count is that of the blocks, and no budget is smaller."""
    position = own * block_size + offset % block_size
    count = sum(is_forced(b, position, block_size, init, local) for b in range(10))
    assert num_forced(position, block_size, init, local) == count
    assert num_selected(position, block_size, init, local, init + local) == count


@pytest.mark.parametrize(("block_size", "window_blocks"), [(64, 32), (64, 1), (7, 3), (1, 5)])
@symbolic
@given(position=TOKENS, back=TOKENS)
def test_the_sliding_window_is_forced(
    block_size: int, window_blocks: int, position: int, back: int
) -> None:
    """D6: each of the last w tokens lies in one of the w/B + 1 local blocks."""
    token = position - back % (window_blocks * block_size)
    if token >= 0:
        assert is_forced(token // block_size, position, block_size, 0, window_blocks + 1)


@pytest.mark.parametrize("block_size", [1, 7, 64])
@pytest.mark.parametrize("stride_divisor", [1, 2])
@symbolic
@given(position=TOKENS, low=INDICES, high=INDICES)
def test_rows_without_normaliser_have_at_most_one_unforced_block(
    block_size: int, stride_divisor: int, position: int, low: int, high: int
) -> None:
    """D4: for l2 = 2B no two visible blocks are unforced where no window of K_C2 is visible."""
    stride = max(1, block_size // stride_divisor)
    if num_visible_windows(position, 2 * block_size, stride) == 0 and low < high:
        two_unforced = high <= position // block_size and not (
            is_forced(low, position, block_size, 0, 1)
            or is_forced(high, position, block_size, 0, 1)
        )
        assert not two_unforced
