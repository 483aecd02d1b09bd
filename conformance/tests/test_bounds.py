"""Do the bounds admit honest arithmetic, and reject wrong results?

`bounds_simulations/` beside this file holds the arithmetic; `python -m bounds_simulations` here
prints all ratios, which docs/tolerances.md publishes.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from infllmv2_conformance import bounds
from infllmv2_conformance.bounds import Bounded, model, softmax
from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_reference import attend_blocks, pool_blocks, score_windows

if "bounds_simulations" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "bounds_simulations", Path(__file__).parent / "bounds_simulations" / "__init__.py"
    )
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["bounds_simulations"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["bounds_simulations"])

from bounds_simulations.attention import AttendFault, normalised, without_block
from bounds_simulations.gradients import Backward
from bounds_simulations.problem import (
    DTYPES,
    REGIMES,
    Problem,
    tfloat32_matmul,
    worst,
)
from bounds_simulations.scores import HONEST_WINDOWS, ScoreVariant
from bounds_simulations.tables import FAULTY, HONEST, Ratios, ratios_of, stages_of

EVERYWHERE = tuple(REGIMES)
MANY_POSITIVE = ("correlated", "peaked", "signed", "long indexed")
REVEALED_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "compress": {
        "sum in low precision": EVERYWHERE,
        "a token too few": EVERYWHERE,
        "scale off by 1 %": EVERYWHERE,
    },
    "score": {
        "scale off by 1 %": ("normal", "peaked", "long", "signed"),
        "LSE in base 2": EVERYWHERE,
        "max instead of sum over the group": EVERYWHERE,
        "heads in bfloat16 before the group sum": ("normal", "tiny", "indexed", "long"),
        "normaliser sees a window too few": ("normal", "huge", "long"),
        "normaliser sees a window too many": ("normal", "peaked", "long"),
    },
    "attend": {
        "a block dropped": EVERYWHERE,
        "a token dropped": ("normal", "tiny", "short", "indexed", "long indexed"),
        "scale off by 1 %": ("normal", "peaked", "short", "huge"),
        "values of a block permuted": EVERYWHERE,
        "output accumulated in bfloat16": MANY_POSITIVE,
        "LSE in base 2": EVERYWHERE,
        "a token too many on the diagonal": ("normal", "short", "indexed", "long indexed"),
        "a token too few on the diagonal": ("normal", "short", "huge", "long indexed"),
    },
    "gradients": {
        "dQ without the scale": ("normal", "tiny", "signed"),
        "dK and dV without one head": ("normal", "tiny", "huge"),
        "no rowsum(dO * O)": ("normal", "peaked", "signed"),
        "a block dropped": ("normal", "peaked", "indexed"),
        "a token dropped": ("normal", "short", "indexed"),
    },
}
"""In which regimes each fault must show, in every dtype."""
HIDDEN_IN = [
    ("score", "scale off by 1 %", "tiny", "all logits are near 0"),
    ("score", "heads in bfloat16 before the group sum", "huge", "the logits' own error is larger"),
    ("attend", "scale off by 1 %", "tiny", "all logits are near 0"),
    ("attend", "a token dropped", "huge", "its probability is below the roundoff"),
    ("attend", "a token too many on the diagonal", "huge", "its probability is too"),
]
"""Where a fault cannot show, and why."""


@cache
def honest_ratios(regime: str, dtype: str, stage: str) -> Ratios:
    ratios = ratios_of(Problem(regime, dtype), stage, HONEST[stage])
    if stage == "score":
        exact = ratios_of(Problem(regime, dtype, lse="exact"), stage, HONEST[stage])
        ratios |= {f"{name}, exact LSE": row for name, row in exact.items()}
    return ratios


def fault_ratio(stage: str, fault: str, regime: str, dtype: str) -> float:
    """Return the ratio of the result that shows the fault best."""
    ratios = ratios_of(Problem(regime, dtype), stage, {fault: FAULTY[stage][fault]})
    return max(ratios[fault].values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
def test_honest_arithmetic_passes(regime: str, dtype: str) -> None:
    for stage in stages_of(regime):
        for variant, row in honest_ratios(regime, dtype, stage).items():
            assert max(row.values()) <= 1, (stage, variant, row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_are_not_idle(dtype: str) -> None:
    """Some honest arithmetic comes within a factor of 100 of every bound."""
    highest: dict[str, float] = {}
    for regime in REGIMES:
        for stage in stages_of(regime):
            for row in honest_ratios(regime, dtype, stage).values():
                for result, ratio in row.items():
                    highest[result] = max(highest.get(result, 0.0), ratio)
    assert len(highest) == 7
    assert min(highest.values()) > 0.01, highest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stage", "fault"), [(s, f) for s in FAULTY for f in FAULTY[s]])
def test_faults_are_rejected(stage: str, fault: str, dtype: str) -> None:
    for regime in REVEALED_BY[stage][fault]:
        if stage in stages_of(regime):
            assert fault_ratio(stage, fault, regime, dtype) > 1, regime


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stage", "fault", "regime", "why"), HIDDEN_IN)
def test_limits_are_as_documented(
    stage: str, fault: str, regime: str, why: str, dtype: str
) -> None:
    assert fault_ratio(stage, fault, regime, dtype) <= 1, why


def test_tfloat32_must_be_declared() -> None:
    declared, silent = (Problem("normal", "float32", products=p) for p in ("tf32", "ieee"))
    score = ScoreVariant(matmul=tfloat32_matmul)(declared)
    assert worst(score, declared.scores) <= 1 < worst(score, silent.scores)
    out, lse = normalised(declared, matmul=tfloat32_matmul)
    assert worst(out, declared.attention[0]) <= 1 < worst(out, silent.attention[0])
    assert worst(lse, declared.attention[1]) <= 1 < worst(lse, silent.attention[1])
    gradients = Backward(matmul=tfloat32_matmul)(declared)
    for actual, wide, narrow in zip(gradients, declared.gradients, silent.gradients, strict=True):
        assert worst(actual, wide) <= 1 < worst(actual, narrow)


def test_float64_bounds_cover_the_oracles_own_rounding() -> None:
    p = Problem("normal", "float64")
    wide = ScoreVariant(torch.float64, base2=True)
    assert 0 < worst(wide(p), p.scores) <= 1
    in_pieces = AttendFault(running=torch.float64)
    assert 0 < worst(in_pieces(p)[0], p.attention[0]) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_windows_cover_honest_ones(dtype: str) -> None:
    p = Problem("correlated", dtype)
    size, stride = p.config.kernel_size, p.config.kernel_stride
    stored, slack = bounds.stored_windows(p.inputs[1], size, stride, p.arithmetic)
    for make in HONEST_WINDOWS.values():
        assert ((make(p).double() - stored).abs() <= slack).all()
    assert dtype == "float32" or (slack == 0).double().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_slack_widens_scores_enough(dtype: str) -> None:
    p, q = Problem("peaked", dtype), Problem("peaked", dtype).inputs[0]
    c = p.config
    kernels = (c.kernel_size, c.kernel_stride), (c.lse_kernel_size, c.lse_kernel_stride)
    (k1, s1), (k2, s2) = (bounds.stored_windows(p.inputs[1], *k, p.arithmetic) for k in kernels)
    wide = bounds.scores(q, k1, k2, p.shape[1], c, p.arithmetic, s1, s2)
    for sign in (1, -1):
        moved = score_windows(q.double(), k1 + sign * s1, k2 - sign * s2, p.shape[1], c)
        assert worst(moved, wide) <= 1
    assert (wide.bound >= p.scores.bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_scores_inherit_the_bound(dtype: str) -> None:
    p = Problem("normal", dtype)
    assert worst(pool_blocks(ScoreVariant()(p), p.shape[1], p.config), p.blocks) <= 1
    few = pool_blocks(ScoreVariant(torch.float64, shift=-1)(p), p.shape[1], p.config)
    assert worst(few, p.blocks) > 1


def test_value_is_the_reference_and_chunks_do_not_change_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Problem("normal", "float16")
    q, k, v, _ = (x.double() for x in whole.inputs)
    expected = score_windows(q, *whole.windows, whole.shape[1], whole.config)
    assert torch.equal(whole.scores.value, expected)
    out, _ = attend_blocks(q, k, v, whole.selected, whole.block_size)
    assert torch.equal(whole.attention[0].value, out)
    results = [whole.scores, *whole.attention, *whole.gradients]
    monkeypatch.setattr(softmax, "_CHUNK_ELEMENTS", 10_000)
    cut = Problem("normal", "float16")
    for a, b in zip(results, [cut.scores, *cut.attention, *cut.gradients], strict=True):
        torch.testing.assert_close(a.value, b.value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(a.bound, b.bound, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 30), (1, 1), (3, 9), (40, 40)])
def test_degenerate_rows_are_exact(lengths: tuple[int, int]) -> None:
    num_queries, num_keys = lengths
    p, c = Problem("normal", "bfloat16"), Problem("normal", "bfloat16").config
    q, k, v, g = p.inputs
    q, g, k, v = (
        q[:1].expand(num_queries, -1, -1),
        g[:1].expand(num_queries, -1, -1),
        *(x[:num_keys] for x in (k, v)),
    )
    k1, _ = bounds.stored_windows(k, 8, 4, p.arithmetic)
    k2, _ = bounds.stored_windows(k, 32, 16, p.arithmetic)
    score = bounds.scores(q, k1, k2, num_keys, c, p.arithmetic)
    pooled = bounds.block_scores(score, num_keys, c)
    nothing = torch.full((2, num_queries, 4), -1, dtype=torch.int32)
    out, lse = bounds.attend(q, k, v, nothing, 16, p.arithmetic, "bfloat16")
    gradients = bounds.attend_gradients(q, k, v, nothing, g, 16, p.arithmetic, "bfloat16")
    for result in (out, *gradients):
        assert not result.value.any()
    assert (lse.value == -torch.inf).all()
    for result in (out, lse, *gradients):
        assert not result.bound.any()
    for result in (score, pooled):
        assert result.value.shape == result.bound.shape
        assert (result.bound[result.value == -torch.inf] == 0).all()
        assert (result.bound[result.value == 0] == 0).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("regime", ["huge", "normal"])
def test_bounds_are_never_nan(regime: str, name: str) -> None:
    """Even for sums that lose all digits and scores that overflow."""
    arithmetic = Arithmetic(accumulate=name, scores=name)
    p = Problem(regime, "float16")
    p.__dict__["arithmetic"] = arithmetic
    gradients = bounds.attend_gradients(
        *p.inputs[:3], p.selected, p.inputs[3] * 6e4, p.block_size, arithmetic, "float16"
    )
    for result in (p.scores, p.blocks, *p.attention, *p.gradients, *gradients):
        assert not result.bound.isnan().any()
        assert (result.bound >= 0).all()


def test_overflow_has_no_bound() -> None:
    value = torch.tensor([65504.0, 65000.0, 7e4, 1.0], dtype=torch.float64)
    off = model.stored(value, torch.zeros_like(value), "float16")
    assert off.isinf().tolist() == [True, False, True, False]
    score = Bounded(torch.full((1, 24, 74), math.inf), torch.full((1, 24, 74), math.inf))
    pooled = bounds.block_scores(score, 300, Problem("normal", "float16").config)
    assert pooled.bound[pooled.value == math.inf].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_roundoff_is_half_an_ulp_of_one(dtype: str) -> None:
    assert bounds.unit_roundoff(dtype) == torch.finfo(getattr(torch, dtype)).eps / 2


def test_fixed_tolerances_accept_a_lost_block() -> None:
    """The number in docs/tolerances.md: one block of 64 in 8192 normal keys."""
    p = Long("normal", "bfloat16", block_size=64)
    out = AttendFault(mask=without_block)(p)[0].double()
    exact = p.attention[0]
    assert torch.allclose(out, exact.value, rtol=1e-2, atol=1e-2)
    assert worst(out, exact) > 1


def test_twice_the_error_of_pytorch_accepts_a_lost_block() -> None:
    """When the softmax is peaked, bfloat16 logits are off by tenths."""
    p = Long("peaked", "bfloat16", block_size=64)
    q, k, v, _ = (p.per_head(x, torch.bfloat16) for x in p.inputs)
    x = (q @ k.transpose(1, 2) * p.head_dim**-0.5).masked_fill(~p.mask, -torch.inf)
    eager = (x.softmax(-1) @ v).transpose(0, 1).double()
    faulty = AttendFault(mask=without_block)(p)[0].double()
    exact = p.attention[0]
    errors = [(out - exact.value).abs().max() for out in (faulty, eager)]
    assert errors[0] < 2 * errors[1]
    assert worst(faulty, exact) > 1


class Long(Problem):
    """Eight queries over 8192 keys, all blocks selected."""

    @property
    def shape(self) -> tuple[int, int]:
        return 8, 8192

    @property
    def config(self):
        return replace(super().config, topk=126)
