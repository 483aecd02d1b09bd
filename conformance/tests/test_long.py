"""The oracle of single rows is the ordinary one, inputs repeat, and rows include the corners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.capabilities import Arithmetic, Capabilities
from infllmv2_conformance.cases import Case
from infllmv2_conformance.checks import check_form
from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.failure import ConformanceFailure, fail
from infllmv2_conformance.inputs import Inputs
from infllmv2_conformance.long.cases import Means, Plan
from infllmv2_conformance.long.given import draw_selection
from infllmv2_conformance.long.inputs import REGIMES, SEGMENT, build_long_inputs
from infllmv2_conformance.long.judges import moved
from infllmv2_conformance.long.needles import needle_blocks
from infllmv2_conformance.long.oracle import LongOracle, pool_rows, windows_of_blocks
from infllmv2_conformance.long.rows import LIMITS, rows_to_judge
from infllmv2_conformance.masks import competing_blocks, members
from infllmv2_conformance.oracle import Oracle
from infllmv2_reference import pool_blocks, select_blocks
from infllmv2_reference.layout import Span

CPU = torch.device("cpu")
SMALL = Case(
    ((25, 90), (33, 33), (1, 300)),
    kv_heads=2,
    group=2,
    dtype="float16",
    regime="needles",
    init_blocks=0,
    topk=6,
    seed=3,
)
CASES = (
    SMALL,
    SMALL.with_(lse="exact", regime="correlated", dtype="float32"),
    SMALL.with_(kernel_size=5, kernel_stride=3, regime="normal", dtype="bfloat16"),
    SMALL.with_(kernel_size=24, kernel_stride=8, regime="normal"),
    SMALL.with_(pooling="paper_eq7"),
)


def oracles(case: Case) -> tuple[LongOracle, Oracle]:
    inputs, arithmetic = build_long_inputs(case, CPU), Arithmetic()
    return LongOracle(case, inputs, arithmetic), Oracle(case, inputs, arithmetic)


def assert_equal(mine: Bounded, theirs: Bounded) -> None:
    for one, other in ((mine.value, theirs.value), (mine.bound, theirs.bound)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tokens", [40, 1 << 15])
def test_rows_of_the_oracle_are_those_of_the_ordinary_one(monkeypatch, case, tokens):
    """Chunks of 40 tokens and of two rows must not show, however a sequence is cut."""
    monkeypatch.setattr("infllmv2_conformance.long.oracle.TOKENS", tokens)
    monkeypatch.setattr("infllmv2_conformance.long.oracle.LOGITS", tokens * 8)
    mine, theirs = oracles(case)
    for span in mine.spans:
        for one, other in zip(mine.windows, theirs.windows, strict=True):
            for (value, slack), (value_too, slack_too) in zip(one, other, strict=True):
                assert torch.equal(value, value_too)
                assert torch.equal(slack, slack_too)
        for end_to_end in (False, True):
            scores = theirs.scores_of(span, end_to_end)
            for row, score in mine.scores_at(span, range(span.num_queries), end_to_end):
                assert_equal(score, Bounded(scores.value[:, row], scores.bound[:, row]))
        for row, score in mine.block_scores_at(span, range(span.num_queries)):
            full = theirs.block_scores[span.sequence]
            seen = (span.num_keys - span.num_queries + row) // case.block_size + 1
            cut = Bounded(full.value[:, row : row + 1, :seen], full.bound[:, row : row + 1, :seen])
            assert_equal(score, cut)
        selected = draw_selection(mine)[:, span.queries]
        out, lse = theirs.attend(span, selected)
        for row in range(span.num_queries):
            mine_out, mine_lse = mine.attend_at(span, row, selected[:, row])
            assert_equal(mine_out, Bounded(out.value[row : row + 1], out.bound[row : row + 1]))
            assert_equal(mine_lse, Bounded(lse.value[row : row + 1], lse.bound[row : row + 1]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pooling_is_that_of_the_reference(case):
    config = case.config
    windows = (300 - case.kernel_size) // case.kernel_stride + 1
    scores = torch.rand(2, 1, windows, generator=torch.Generator().manual_seed(1))
    expected = pool_blocks(scores, 300, config)
    table = windows_of_blocks(expected.shape[-1], config)
    assert torch.equal(pool_rows(scores, table), expected)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_chunk_holds_the_rows_of_the_prefill(regime):
    keys = 2 * SEGMENT + 100
    case = Case(((keys, keys),), group=2, dtype="bfloat16", regime=regime, seed=5)
    whole = build_long_inputs(case, CPU)
    chunk = build_long_inputs(case.with_(sequences=((SEGMENT + 7, keys),)), CPU)
    assert torch.equal(chunk.q, whole.q[-(SEGMENT + 7) :])
    assert torch.equal(chunk.k, whole.k)
    again = build_long_inputs(case, CPU)
    assert all(torch.equal(getattr(whole, n), getattr(again, n)) for n in ("q", "k", "v"))
    other = build_long_inputs(case.with_(seed=6), CPU)
    assert not torch.equal(whole.k, other.k)
    assert bool(whole.k.isfinite().all())


def test_neighbours_are_alike_in_correlated_inputs():
    inputs = build_long_inputs(Case(((SEGMENT, SEGMENT),), regime="correlated"), CPU)
    for x in (inputs.q[:, 0], inputs.k[:, 0]):
        centred = (x - x.mean(0)) / x.std(0)
        neighbours = (centred[1:] * centred[:-1]).mean()
        assert 0.9 < float(neighbours) < 1.0
    assert float(inputs.k.mean(0).abs().mean()) > 0.4, "channels of k have a mean"
    assert float(inputs.v.mean(0).abs().mean()) < 0.1


@pytest.mark.parametrize("case", [Case(((1, 1),), regime="huge"), SMALL.with_(use_nope=True)])
def test_other_cases_are_refused(case):
    with pytest.raises(UsageError, match="a long case has the regime normal, correlated, needles"):
        build_long_inputs(case, CPU)


@pytest.mark.parametrize("lse", ["approximate", "exact"])
def test_needles_must_be_selected(lse):
    """Every block with a needle is certain to be selected by every late row."""
    claims = Capabilities(lse_modes=(lse,), group_sizes=(2,), head_dims=(32,))
    case = Plan(claims, Means.of(CPU), 20_000).released(rows=40, regime="needles")
    oracle, _ = oracles(case)
    span, needles = oracle.spans[1], needle_blocks(case, 1)
    assert len(needles) == 24
    assert {256, 255, 128, 1} <= set(needles)
    for row, scores in oracle.block_scores_at(span, [0, 39], end_to_end=True):
        selected = select_blocks(scores.value, span.num_keys - 39 + row, case.config)
        low = (scores.value - scores.bound)[..., needles].amin(-1)
        one = Span(0, slice(0, 1), slice(0, span.num_keys - 39 + row))
        left = competing_blocks(one, case.config) & ~members(selected, scores.value.shape[-1])
        assert bool((low > (scores.value + scores.bound).where(left, -torch.inf).amax(-1)).all())


def test_drawn_selections_are_well_formed_and_reach_far_back():
    case = Case(((700, 700),), kv_heads=2, topk=9, init_blocks=1)
    oracle, _ = oracles(case)
    selected, span = draw_selection(oracle), oracle.spans[0]
    real, own = selected >= 0, torch.arange(700)[:, None] // 16
    assert bool(((selected[..., 1:] > selected[..., :-1]) | ~real[..., 1:]).all())
    assert bool((~real[..., 1:] | real[..., :-1]).all())
    assert bool((selected <= own).all())
    counts = real.sum(-1)
    assert int(counts.min()) == 0
    assert int(counts.max()) == case.config.budget
    assert bool((selected == own).any())
    assert selected[..., 0].max() < selected.max() // 5
    with pytest.raises(ConformanceFailure):
        check_form(selected, span, case.config)  # these are selections for stage 5 alone


def test_rows_lie_on_both_sides_of_the_limits():
    """A prefill of 2**20 tokens: q and out cross 2**31 elements and several times 2**31 bytes."""
    sizes = {"kv_heads": 2, "group": 16, "head_dim": 128, "dtype": "bfloat16"}
    blocks = {"block_size": 64, "kernel_size": 32, "kernel_stride": 16, "window_size": 2048}
    case = Case(((1 << 20, 1 << 20),), **sizes, **blocks, topk=64)
    span = Span(0, slice(0, 1 << 20), slice(0, 1 << 20))
    rows = rows_to_judge(case, span, 1 << 20, 65535)
    width = 32 * 128
    assert {0, (1 << 20) - 1} <= set(rows)
    for limit in (*LIMITS, *(n // 2 for n in LIMITS)):
        crossed = limit // width
        assert {crossed - 1, crossed} <= set(rows) or crossed >= 1 << 20
    head_major = [r for r in rows if (r * 65535) // LIMITS[0] != ((r + 1) * 65535) // LIMITS[0]]
    assert head_major, "scores of windows cross 2**31 between two rows of the first head"
    assert len(rows) < 160
    assert rows_to_judge(case, Span(0, slice(0, 0), slice(0, 9)), 0, 0) == []
    assert rows_to_judge(case, Span(0, slice(0, 1), slice(0, 9)), 1, 0) == [0]


def test_rows_repeat_and_follow_the_choice():
    case, span = Case(((9000, 9000),)), Span(0, slice(0, 9000), slice(0, 9000))
    first = rows_to_judge(case, span, 9000, 2249)
    assert first == rows_to_judge(case, span, 9000, 2249)
    assert first != rows_to_judge(case.with_(choice=1), span, 9000, 2249)


def test_a_failure_names_coordinates_of_the_whole_sequence():
    with pytest.raises(ConformanceFailure) as caught, moved(torch.tensor([5, 90]), kv_head=2):
        fail("wrong", where={"token": 1, "kv head": 0})
    assert caught.value.finding.where == {"token": 90, "kv head": 2}


CUDA_LIKE = Means(work=1 << 49, size=9 << 30)


def test_cases_fit_the_claims_and_the_device():
    plan = Plan(Capabilities(), CUDA_LIKE, 1 << 20)
    assert plan.released().sequences == ((33, 700), (1 << 20, 1 << 20))
    (short, _), (rows, keys) = plan.released("windows").sequences
    assert short * 65535 * 2 < 1 << 31 < (short + rows) * 65535 * 2, "offsets cross 2**31"
    assert keys == 1 << 20
    on_cpu = Plan(Capabilities(), Means.of(CPU), 131072)
    assert 50 < on_cpu.released().sequences[1][0] < 200
    assert on_cpu.dense().dense_len == 131073
    assert not on_cpu.dense().config.is_sparse(131072)
    assert on_cpu.fine().lse == "exact"
    rows, keys = on_cpu.wide().sequences[0]
    assert 8192 < rows == keys < 131072
    claims = {
        "dtypes": ("float32",),
        "group_sizes": (4,),
        "head_dims": (96,),
        "block_sizes": (128,),
        "windows": ((64, 32),),
        "lse_modes": ("exact",),
        "history": False,
        "packed": False,
    }
    narrow = Plan(Capabilities(**claims), Means.of(CPU), 4096)
    for case in (narrow.released(), narrow.fine(), narrow.wide(), narrow.dense()):
        assert case.sequences == ((4096, 4096),)
        assert (case.dtype, case.group, case.head_dim) == ("float32", 4, 96)
        assert (case.block_size, case.kernel_size, case.kernel_stride) == (128, 64, 32)
        assert case.lse == "exact"


def test_inputs_need_one_segment_beside_the_result(monkeypatch):
    """No more than a segment is ever drawn at once."""
    shapes: list[tuple[int, ...]] = []
    randn = torch.randn

    def counted(shape, **given) -> Tensor:
        shapes.append(tuple(shape))
        return randn(shape, **given)

    monkeypatch.setattr(torch, "randn", counted)
    inputs = build_long_inputs(Case(((10, 3 * SEGMENT),)), CPU)
    assert isinstance(inputs, Inputs)
    assert max(shape[0] for shape in shapes) <= SEGMENT
    assert sum(len(shape) == 3 for shape in shapes) == 1 + 3 + 3
