"""The data of pictures, against slow loops."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.checks import check_values
from infllmv2_conformance.margins import LIMIT, NOT_COMPARED, Margins
from infllmv2_conformance.pictures import COLUMNS, ROWS, error_map, selection_map
from infllmv2_conformance.runner import Tally
from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import is_forced

from . import samples

SIZES = st.integers(1, 200)


def test_margins_count_by_octaves():
    margins = Margins()
    numbers = [0.0, 1e-30, 0.25, 0.26, 0.5, 1.0, 1.0 + 1e-15, 2.0, 1e30, math.inf, NOT_COMPARED]
    margins.add(torch.tensor(numbers, dtype=torch.float64))
    assert margins.to_json() == {
        "zero": 2,
        "octaves": {"-2": 1, "-1": 2, "0": 1, "1": 2},
        "infinite": 2,
    }


@given(st.lists(st.floats(0, 2.0**LIMIT) | st.just(math.inf), max_size=50))
@settings(deadline=None)
def test_margins_agree_with_a_loop(numbers):
    margins, octaves, zero, infinite = Margins(), {}, 0, 0
    margins.add(torch.tensor(numbers, dtype=torch.float64))
    for number in numbers:
        n = next((n for n in range(-LIMIT, LIMIT + 1) if number <= 2.0**n), None)
        if number <= 2.0 ** (-LIMIT - 1):
            zero += 1
        elif n is None:
            infinite += 1
        else:
            octaves[str(n)] = octaves.get(str(n), 0) + 1
    found = margins.to_json() or {"zero": 0, "octaves": {}, "infinite": 0}
    assert found == {"zero": zero, "octaves": octaves, "infinite": infinite}


def test_wrong_numbers_and_no_others_lie_beyond_the_bound():
    """What is counted is what is judged: 1 passes, and what is not compared is not counted."""
    value = torch.ones(1, 1, 4, dtype=torch.float64)
    bound = torch.tensor([1.0, 1.0, math.inf, 1.0], dtype=torch.float64)[None, None]
    mask = torch.tensor([True, True, True, False])
    actual = value + torch.tensor([1.0, 0.5, 9.0, 9.0], dtype=torch.float64)
    tally = Tally()
    here = samples.span(1, 1)
    check_values("x", actual, Bounded(value, bound), here, "out", tally.ratios, mask)
    found = tally.margins.to_json()
    assert found["infinite"] == found["zero"] == 0
    assert sum(found["octaves"].values()) == 2
    assert all(int(octave) <= 0 for octave in found["octaves"])
    assert tally.worst_ratio == 1.0


def test_nothing_compared_is_nothing_counted():
    tally = Tally()
    tally.ratios(torch.full((3, 3), NOT_COMPARED))
    tally.ratios(torch.zeros(0))
    assert tally.margins.to_json() is None
    assert tally.worst_ratio == 0.0


@given(SIZES, SIZES, st.integers(1, 3), st.integers(0, 2**30))
@settings(max_examples=30, deadline=None)
def test_error_map_keeps_the_worst_of_what_falls_together(queries, heads, channels, seed):
    ratio = torch.rand(queries, heads, channels, generator=samples.random(seed)).double() * 4
    ratio[ratio < 1] = NOT_COMPARED
    picture = error_map(ratio, ("query", "head", "channel"), samples.span(queries, queries + 5))
    assert (picture["rows"]["axis"], picture["columns"]["axis"]) == ("head", "position")
    assert picture["columns"]["first"] == 5
    values = picture["values"]
    assert len(values) <= ROWS
    assert all(len(row) == len(values[0]) <= COLUMNS for row in values)
    down, across = picture["rows"]["step"], picture["columns"]["step"]
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            part = ratio[c * across : (c + 1) * across, r * down : (r + 1) * down]
            worst = part.max().item()
            assert value == (None if worst < 0 else float(f"{worst:.3g}"))
    r, c = picture["worst"]
    if ratio.max() >= 0:
        assert values[r][c] == float(f"{ratio.max():.3g}")


@pytest.mark.parametrize(
    ("axes", "shape", "rows", "columns", "over"),
    [
        (("kv head", "query", "window"), (2, 3, 4), "position", "window", ["kv head"]),
        (("query", "head"), (3, 5), "head", "position", []),
        (("token", "kv head", "channel"), (3, 5, 2), "kv head", "token", ["channel"]),
    ],
)
def test_error_map_names_its_axes(axes, shape, rows, columns, over):
    ratio = torch.zeros(shape, dtype=torch.float64)
    ratio[(-1,) * len(shape)] = math.inf
    picture = error_map(ratio, axes, samples.span(3, 10))
    assert (picture["rows"]["axis"], picture["columns"]["axis"]) == (rows, columns)
    assert picture["over"] == over
    assert picture["values"][-1][-1] == math.inf
    assert picture["worst"] == [len(picture["values"]) - 1, len(picture["values"][0]) - 1]


CONFIG = SparseConfig(
    block_size=4, kernel_size=4, kernel_stride=2, window_size=4, init_blocks=1, topk=3, dense_len=-1
)


def one_row(actual, expected, num_keys=28, bad=True):
    """Return the cells of a single query at the end of a sequence."""
    wrong = torch.tensor([[bad]])
    wanted = None if expected is None else torch.tensor([[expected]])
    here = samples.span(1, num_keys)
    return selection_map(torch.tensor([[actual]]), wrong, here, CONFIG, wanted)


@pytest.mark.parametrize(
    ("actual", "expected", "cells"),
    [
        ([0, 1, 5, 6], [0, 1, 5, 6], "fs...ff"),
        ([0, 2, 5, 6], [0, 1, 5, 6], "fmx..ff"),
        ([0, 1, 2, 6], [0, 1, 5, 6], "fsx..Ff"),
        ([1, 2, 5, 6], None, "Fss..ff"),
        ([0, 1, 5, 6], None, "fs...ff"),
        ([0, -7, 99, 6], None, "f....Ff"),
    ],
)
def test_selection_map(actual, expected, cells):
    picture = one_row(actual, expected)
    assert picture["cells"] == [cells]
    assert picture["wrong_rows"] == [0]
    assert picture["rows"] == {"axis": "query block", "first": 6, "count": 1, "step": 1}


def test_selection_map_shows_no_difference_that_is_legal():
    picture = one_row([0, 2, 5, 6], [0, 1, 5, 6], bad=False)
    assert picture["cells"] == ["f.s..ff"]
    assert picture["wrong_rows"] == []


def test_selection_map_shows_blocks_behind_the_query():
    early = torch.tensor([[[0, 1, 2, 4], [0, 1, 2, 3]]])  # positions 12 and 13 of 28
    here = samples.Span(0, slice(0, 16), slice(0, 28))
    selected = torch.cat([early, torch.tensor([0, 2, 3, 4]).expand(1, 14, 4)], 1)
    bad = torch.zeros(1, 16, dtype=torch.bool)
    bad[0, 0] = True
    picture = selection_map(selected, bad, here, CONFIG)
    assert picture["cells"][0] == "fsfFx  "
    assert picture["wrong_rows"] == [0]


def test_selection_map_joins_heads_and_queries_of_a_block():
    selected = torch.tensor([[[0, 1, 5, 6]] * 2, [[0, 2, 5, 6]] * 2])
    expected = torch.tensor([[[0, 1, 5, 6]] * 2, [[0, 1, 5, 6], [0, 2, 5, 6]]])
    bad = torch.tensor([[False, False], [True, False]])
    picture = selection_map(selected, bad, samples.span(2, 28), CONFIG, expected)
    assert picture["cells"] == ["fmx..ff"]


@given(st.integers(1, 30), st.integers(0, 1000), st.integers(0, 2**30))
@settings(max_examples=25, deadline=None)
def test_selection_map_agrees_with_a_loop(queries, past, seed):
    here = samples.span(queries, queries + past)
    blocks = -(-here.num_keys // 4)
    shape = 2, queries, CONFIG.budget
    draw = [
        torch.randint(-1, blocks + 1, shape, generator=samples.random(seed + i)) for i in (0, 1)
    ]
    bad = torch.rand(2, queries, generator=samples.random(seed)) < 0.5
    actual, expected = draw[0].clamp(max=blocks - 1), draw[1] % blocks
    picture = selection_map(actual, bad, here, CONFIG, expected)
    first, seen = past // 4, defaultdict(set)
    for head, row, block in itertools.product(range(2), range(queries), range(blocks)):
        position = past + row
        place = (position // 4 - first) // picture["rows"]["step"]
        chosen = block in actual[head, row].tolist()
        wanted = block in expected[head, row].tolist() if bad[head, row] else chosen
        kind = "." if block * 4 <= position else " "
        if wanted:
            kind += ("Ff" if is_forced(block, position, 4, 1, 2) else "ms")[chosen]
        elif chosen:
            kind += "x"
        seen[place, block // picture["columns"]["step"]] |= set(kind)
    for place, kinds in seen.items():
        mixed = "x" in kinds and kinds & {"m", "F"}
        strongest = "w" if mixed else next(kind for kind in "Fmxfs. " if kind in kinds)
        assert picture["cells"][place[0]][place[1]] == strongest
    assert len(picture["cells"]) <= COLUMNS
    assert {len(row) for row in picture["cells"]} == {len(picture["cells"][0])}
    assert len(picture["cells"][0]) <= COLUMNS


@pytest.mark.parametrize("rule", samples.FAILURES)
def test_failing_checks_carry_their_pictures(rule):
    data = samples.FAILURES[rule]().to_json()
    kinds = [picture["kind"] for picture in data["pictures"]]
    numeric = rule in ("score.visibility", "attend.values")
    assert kinds[0] == ("error map" if numeric else "selection map")
    assert ("attended blocks" in kinds) == (rule == "attend.values")
