"""Masks against the reference's geometry, and comparisons against hand-made faults."""

from __future__ import annotations

import pytest
import torch

from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.checks import (
    check_certificate,
    check_form,
    check_selection,
    check_values,
)
from infllmv2_conformance.failure import ConformanceFailure
from infllmv2_conformance.masks import (
    competing_blocks,
    doubles,
    forced_blocks,
    members,
    visible_blocks,
)
from infllmv2_reference import SparseConfig, select_blocks
from infllmv2_reference.geometry import is_forced, num_blocks
from infllmv2_reference.layout import Span

CONFIG = SparseConfig(
    block_size=4, kernel_size=4, kernel_stride=2, window_size=4, init_blocks=1, topk=3, dense_len=-1
)


def span(num_queries: int, num_keys: int) -> Span:
    return Span(0, slice(0, num_queries), slice(0, num_keys))


@pytest.mark.parametrize("init_blocks", [0, 1, 2])
@pytest.mark.parametrize("window_blocks", [0, 1, 3])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 9), (1, 1), (5, 23), (30, 30)])
def test_masks_agree_with_geometry(
    init_blocks: int, window_blocks: int, num_queries: int, num_keys: int
) -> None:
    config = SparseConfig(
        block_size=4,
        kernel_size=4,
        kernel_stride=2,
        window_size=4 * window_blocks,
        init_blocks=init_blocks,
        topk=4,
    )
    here = span(num_queries, num_keys)
    visible, forced = visible_blocks(here, config), forced_blocks(here, config)
    for row, position in enumerate(range(num_keys - num_queries, num_keys)):
        for block in range(num_blocks(num_keys, 4)):
            assert visible[row, block] == (block * 4 <= position)
            expected = is_forced(block, position, 4, init_blocks, window_blocks + 1)
            assert forced[row, block] == expected
    assert torch.equal(competing_blocks(here, config), visible & ~forced)


def test_members() -> None:
    selected = torch.tensor([[0, 2, -1], [1, -1, -1]])
    assert members(selected, 3).tolist() == [[True, False, True], [False, True, False]]


def bounded(value: list[float], bound: float) -> Bounded:
    tensor = torch.tensor(value, dtype=torch.float64).reshape(1, 1, -1)
    return Bounded(tensor, torch.full_like(tensor, bound))


@pytest.mark.parametrize(
    ("actual", "passes"),
    [([1.0, 2.0], True), ([1.05, 2.0], True), ([1.2, 2.0], False), ([1.0, float("nan")], False)],
)
def test_values(actual: list[float], passes: bool) -> None:
    expected, noted = bounded([1.0, 2.0], 0.1), []
    arguments = ("wrong", bounded(actual, 0).value, expected, span(1, 5), "out", noted.append)
    if passes:
        check_values(*arguments)
        assert noted[0].max() <= 1
    else:
        with pytest.raises(ConformanceFailure) as caught:
            check_values(*arguments)
        where = caught.value.finding.where
        assert (where["position"], where["query"], where["head"]) == (4, 0, 0)


def test_infinities_must_be_the_same() -> None:
    expected = bounded([float("inf"), float("-inf")], 0.0)
    check_values("x", expected.value.clone(), expected, span(1, 1), "out", lambda _: None)
    with pytest.raises(ConformanceFailure):
        check_values("x", -expected.value, expected, span(1, 1), "out", lambda _: None)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ([0, 1, 5, 7], "behind the query's own"),
        ([0, 5, 6, -2], "below -1"),
        ([0, -1, 5, 6], "follows -1"),
        ([0, 5, 1, 6], "ascend"),
        ([0, 5, 5, 6], "ascend"),
        ([1, 2, 5, 6], "forced block is missing"),
        ([0, 1, 2, 6], "forced block is missing"),
        ([0, 5, 6, -1], "number of selected blocks"),
    ],
)
def test_form_names_the_fault(row: list[int], what: str) -> None:
    check_form(torch.tensor([[[0, 1, 5, 6]]]), span(1, 28), CONFIG)
    with pytest.raises(ConformanceFailure, match=what):
        check_form(torch.tensor([[row]]), span(1, 28), CONFIG)


def test_certificate_admits_what_the_bounds_cannot_tell() -> None:
    scores = bounded([0, 0.5, 0.51, 0.1, 0.2, 0, 0], 0.01)
    for row in ([0, 2, 5, 6], [0, 1, 5, 6]):
        check_certificate(torch.tensor([[row]]), scores, span(1, 28), CONFIG)
    with pytest.raises(ConformanceFailure, match="block 2 was passed over for block 4"):
        check_certificate(torch.tensor([[[0, 4, 5, 6]]]), scores, span(1, 28), CONFIG)


def test_certificate_with_ties_wants_the_smaller_index() -> None:
    scores = bounded([0, 0.5, 0.5, 0.5, 0.2, 0, 0], 0.01)
    check_certificate(torch.tensor([[[0, 1, 5, 6]]]), scores, span(1, 28), CONFIG, ties=True)
    with pytest.raises(ConformanceFailure, match="scores the same"):
        check_certificate(torch.tensor([[[0, 2, 5, 6]]]), scores, span(1, 28), CONFIG, ties=True)


def test_selection_says_what_is_missing() -> None:
    scores = torch.tensor([0, 0.5, 0.6, 0.1, 0.2, 0, 0]).reshape(1, 1, -1)
    expected = select_blocks(scores, 28, CONFIG)
    with pytest.raises(ConformanceFailure, match=r"misses \[2\], has instead \[1\]"):
        check_selection(torch.tensor([[[0, 1, 5, 6]]]), expected, span(1, 28), CONFIG)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_that_must_double(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    exact = torch.linspace(0, 4, 20001, dtype=torch.float64) * info.tiny  # many of them subnormal
    exact = torch.cat([exact, info.tiny * (1 - torch.tensor([0.3, 0.4]).double() * info.eps)])
    once, twice = exact.to(dtype), (2 * exact).to(dtype)
    honest = doubles(once)
    assert torch.equal(twice[honest], 2 * once[honest])
    assert honest[once > info.tiny].all()
    rounded_up = (once == info.tiny) & (exact < info.tiny)
    assert not torch.equal(twice[rounded_up], 2 * once[rounded_up])
