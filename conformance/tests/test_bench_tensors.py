from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infllmv2_conformance.bench import given
from infllmv2_conformance.bench.field import Field
from infllmv2_conformance.bench.overlap import mean_union
from infllmv2_conformance.bench.stats import Summary, exponent
from infllmv2_conformance.bench.tensors import checksum, correlate, draw, swap_heads
from infllmv2_conformance.bench.workloads import SHAPES, Workload, parse_lengths
from infllmv2_conformance.bounds import block_scores, scores
from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.checks import check_certificate, check_form, check_values
from infllmv2_conformance.errors import UsageError
from infllmv2_reference import compress_for_selection, pool_blocks, score_windows
from infllmv2_reference.layout import Span

CPU = torch.device("cpu")
TINY = Workload(SHAPES["tiny"], 300, 12, dtype="float32")


def test_correlated_tokens_are_those_of_the_loop():
    noise = torch.randn(2500, 3, dtype=torch.float64)
    expected = noise.clone()
    for t in range(1, len(noise)):
        expected[t] = 0.97 * expected[t - 1] + (1 - 0.97**2) ** 0.5 * noise[t]
    assert (correlate(noise) - expected).abs().max() < 1e-9
    assert correlate(noise[:1]).equal(noise[:1])


def test_inputs_have_the_correlation_that_they_say():
    for inputs, expected in (("random", 0.0), ("correlated", 0.97)):
        tensors = draw(replace(TINY, length=20_000, inputs=inputs), CPU)
        for x in (tensors.q, tensors.k):
            x = x.flatten(1)
            together = (x[1:] * x[:-1]).mean() / x.square().mean()
            assert together == pytest.approx(expected, abs=0.02)
        assert tensors.v.mean().abs() < 0.02
    again = draw(replace(TINY, length=20_000, inputs="correlated"), CPU)
    assert again.q.equal(tensors.q)


def test_union_of_neighbours_is_that_of_sets():
    selected = torch.tensor([[[0, 1, -1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 1, 5], [0, 1, 6]]])
    selected = selected.int()
    assert mean_union(selected, 1) == 3  # the first row is not full, and does not count
    assert mean_union(selected, 2) == (4 + 5 - 1) / 2
    assert mean_union(selected[:, :1], 1) == 2  # no row is full: all count
    assert mean_union(selected, 7) != mean_union(selected, 7)  # no group: not a number


def test_checksums_see_a_single_bit():
    x = torch.randn(1000).bfloat16()
    before = checksum(x)
    x.view(torch.int16)[17] ^= 1
    assert checksum(x) != before
    x.view(torch.int16)[17] ^= 1
    assert checksum(x) == before
    y = x.view(20, 50).clone()
    swap_heads(y)
    assert checksum(y) != before


def test_given_selection_is_what_the_oracle_certifies():
    """The arguments of single stages are honest results, so that they are realistic."""
    field = Field(TINY, CPU)
    t, config, span = field.tensors, field.config, Span(0, slice(0, 300), slice(0, 300))
    k_c1, k_c2 = compress_for_selection(t.k, config)
    torch.testing.assert_close(field.windows["k_c1"], k_c1)
    torch.testing.assert_close(field.windows["k_c2"], k_c2)
    expected = scores(t.q, k_c1, k_c2, 300, config, Arithmetic())
    visible = expected.value > -torch.inf
    found = given.window_scores(t.q, k_c1, k_c2, config)
    check_values("scores", found, expected, span, "scores", lambda _: None, visible)
    check_form(field.selected, span, config)
    check_certificate(field.selected, block_scores(expected, 300, config), span, config, ties=False)
    pooled = pool_blocks(score_windows(t.q, k_c1, k_c2, 300, config), 300, config)
    torch.testing.assert_close(field.block_scores, pooled)


def test_refreshing_gives_every_input_other_numbers():
    field = Field(TINY, CPU)
    names = {"q": field.tensors.q, "v": field.tensors.v, "keys": field.keys}
    names |= {"scores": field.scores, "block_scores": field.block_scores}
    before = {name: x.clone() for name, x in names.items()}
    sums = field.checksums()
    field.refresh()
    assert not any(x.equal(before[name]) for name, x in names.items())
    assert field.checksums() != sums


def test_lengths_are_read_and_wrong_ones_named():
    assert parse_lengths("8k, 1M,77") == [8192, 1 << 20, 77]
    for text in ("", "8g", "k", "8k,,9", "0", "-5"):
        with pytest.raises(UsageError, match="lengths must be numbers such as"):
            parse_lengths(text)
    with pytest.raises(UsageError, match="budget must be at least 34 for the shape minicpm4"):
        SHAPES["minicpm4"].config(33)


def test_summaries_and_exponents():
    summary = Summary.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (summary.median, summary.iqr, summary.min) == (3.0, 2.0, 1.0)
    assert exponent([(8192, 1.0)]) is None
    assert exponent([(1, 1.0), (4, 8.0)]) == pytest.approx(1.5)
