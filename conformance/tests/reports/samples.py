"""Runs with all that a report can hold, from real comparisons of made-up numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.capabilities import Capabilities
from infllmv2_conformance.checks import (
    check_certificate,
    check_form,
    check_selection,
    check_values,
)
from infllmv2_conformance.environment import describe_environment
from infllmv2_conformance.failure import ConformanceFailure, fail
from infllmv2_conformance.margins import Margins
from infllmv2_conformance.masks import positions
from infllmv2_conformance.names import FUNCTIONS
from infllmv2_conformance.pictures import attended_map, showing
from infllmv2_conformance.report import Result, Run
from infllmv2_conformance.rules import RULES
from infllmv2_reference import SparseConfig, select_blocks
from infllmv2_reference.layout import Span
from infllmv2_reference.score import visible_windows

CONFIG = SparseConfig(
    block_size=16, kernel_size=8, kernel_stride=4, window_size=32, topk=7, dense_len=-1
)
FINISHED = 32
"""Results of a run that was stopped early."""
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


def random(seed: int) -> torch.Generator:
    """Return a source of numbers."""
    return torch.Generator().manual_seed(seed)


def span(num_queries: int, num_keys: int, sequence: int = 0) -> Span:
    """Return a sequence alone in its batch."""
    return Span(sequence, slice(0, num_queries), slice(0, num_keys))


def caught(check: Callable[[], object]) -> ConformanceFailure:
    """Return how a check fails."""
    try:
        check()
    except ConformanceFailure as failure:
        failure.implementation = "kernels/sparse.py:KERNEL"
        return failure
    raise RuntimeError("the check passed")


def wrong_output() -> ConformanceFailure:
    """Return a failure of a kernel that forgets the end of one head's rows."""
    here = span(300, 420)
    value = torch.randn(300, 8, 64, generator=random(1), dtype=torch.float64)
    bound = torch.full_like(value, 0.01)
    noise = torch.randn(value.shape, generator=random(2), dtype=torch.float64) * 0.001
    noise[180:, 3] *= 40
    noise[:, 6] *= 5
    noise[299, 7, 5] = torch.nan
    score = block_scores(here, 2)
    chosen = select_blocks(score, here.num_keys, CONFIG)

    def check() -> None:
        with showing(lambda: attended_map(chosen, here, CONFIG)):
            check_values(
                "the output is wrong", value + noise, Bounded(value, bound), here, "out", _
            )

    return caught(check)


def wrong_scores() -> ConformanceFailure:
    """Return a failure of a kernel that sees each window a block too early."""
    here = span(60, 200)
    visible = visible_windows(60, 200, 8, 4)
    value = torch.rand(2, 60, visible.shape[-1], generator=random(3), dtype=torch.float64)
    early = torch.arange(visible.shape[-1]) * 4 >= positions(here)[:, None] - 20
    bounded = Bounded(value, torch.full_like(value, 1e-3))
    return caught(
        lambda: check_values(
            "a window's score is wrong", value + 0.1 * early, bounded, here, "scores", _, visible
        )
    )


def wrong_selection() -> ConformanceFailure:
    """Return a failure of a kernel that ranks blocks by something else in one head."""
    here = span(640, 640)
    score = block_scores(here, 2)
    other = score.clone()
    other[1, 400:] = other[1, 400:].flip(-1)
    chosen = select_blocks(other, here.num_keys, CONFIG)
    bounded = Bounded(score, torch.full_like(score, 1e-6))
    return caught(lambda: check_certificate(chosen, bounded, here, CONFIG))


def wrong_form() -> ConformanceFailure:
    """Return a failure of a kernel that takes the block behind the query for its own."""
    here = span(90, 200)
    chosen = select_blocks(block_scores(here, 1), here.num_keys, CONFIG)
    own = (positions(here) // 16)[:, None]
    shifted = chosen.where((chosen != own) | (positions(here) % 16 < 12)[:, None], own.int() + 1)
    return caught(lambda: check_form(shifted, here, CONFIG))


def long_selection() -> ConformanceFailure:
    """Return a failure in a sequence of more blocks than a picture has cells."""
    here = span(40, 8000)
    score = block_scores(here, 1)
    chosen = select_blocks(score, here.num_keys, CONFIG)
    wrong = select_blocks(score.roll(1, -1), here.num_keys, CONFIG)
    wrong[:, :20] = chosen[:, :20]
    return caught(lambda: check_selection(wrong, chosen, here, CONFIG))


def block_scores(here: Span, heads: int) -> Tensor:
    """Return scores that make nearby queries choose alike."""
    blocks = -(-here.num_keys // 16)
    walk = torch.randn(heads, here.num_queries, blocks, generator=random(5), dtype=torch.float64)
    return (walk * 0.05).cumsum(1) + torch.rand(heads, 1, blocks, generator=random(6)).double()


def margins(seed: int, wrong: bool = False) -> dict[str, Any]:
    """Return a histogram as an honest implementation gives it, or a wrong one."""
    counted = Margins()
    numbers = torch.randn(4000, generator=random(seed), dtype=torch.float64)
    counted.add((numbers * 2 - 9).exp2().clamp(max=0.6))
    counted.add(torch.zeros(20000 + seed, dtype=torch.float64))
    if wrong:
        counted.add((numbers[:50] * 3 + 6).exp2())
        counted.add(torch.tensor([torch.inf, torch.inf], dtype=torch.float64))
    found = counted.to_json()
    assert found is not None
    return found


FAILURES: dict[str, Callable[[], ConformanceFailure]] = {
    "score.visibility": wrong_scores,
    "fused_select.certificate": wrong_selection,
    "fused_select.format": wrong_form,
    "select.exact": long_selection,
    "attend.values": wrong_output,
}


def green() -> Run:
    """Return a run in which all passed, but for what is not claimed."""
    claims = Capabilities(gradients=True)
    session = {
        "spec_version": "1.0.0",
        "package_version": "0.1.0",
        "device": "cpu",
        "functions": list(FUNCTIONS),
        "capabilities": claims.to_mapping(),
        "environment": describe_environment(),
        "started": "2026-01-02T03:04:05+00:00",
    }
    run = Run("eager", "ci", 0, session, seconds=4242.4)
    for number, rule in enumerate(RULES.values()):
        missing = [name for name in rule.claims if not getattr(claims, name)]
        for function in rule.functions if rule.each else ("",):
            outcome = "not claimed" if missing else "passed"
            counts = {} if missing else {"cases": 12 + number, "seconds": 1.5 * number}
            run.plan.append((rule.id, function))
            run.results[rule.id, function] = Result(
                *(rule.id, function, outcome),
                text=" and ".join(missing),
                **counts,
            )
            if outcome == "passed" and "values" in rule.id:
                vars(run.results[rule.id, function]).update(
                    margins=margins(number), worst_ratio=0.6
                )
    return run


def failed() -> Run:
    """Return a run with every kind of picture, a known failure and an error of the suite."""
    run = green()
    run.implementation = "kernels/sparse.py:KERNEL"
    for rule, make in FAILURES.items():
        failure = make()
        failure.rule, failure.case = rule, "sequences=300/420,kv_heads=2,group=4,dtype=float16"
        data = failure.to_json()
        if rule == "attend.values":
            data["looks_like"] = [
                {"id": "attend.tail", "sentence": "the last rows of a head are never written"}
            ]
        run.results[rule, ""] = Result(
            *(rule, "", "failed", 31, failure.finding.ratio, 2.5, str(failure), data),
            margins(3, wrong=True),
        )
    bits = caught(lambda: fail("the argument k was modified"))
    bits.rule, bits.function, bits.case = "contract.inputs-unchanged", "attend", "sequences=1/1"
    run.results[bits.rule, "attend"] = Result(
        *(bits.rule, "attend", "failed", 3, None, 0.1, str(bits), bits.to_json())
    )
    run.results["decode.switch", ""] = Result(
        *("decode.switch", "", "error", 1, None, 0.1),
        "the suite itself failed, please report it\nTraceback\n  ZeroDivisionError: division by 0",
    )
    known = wrong_scores()
    known.rule, known.case = "score.shift", "sequences=2/9"
    run.results["score.shift", ""] = Result(
        *("score.shift", "", "known failure", 9, 3.5, 0.4, f"known: issue 12\n{known}"),
        known.to_json(),
    )
    return run


def interrupted() -> Run:
    """Return a run that was stopped early."""
    run = green()
    for key in run.plan[FINISHED:]:
        del run.results[key]
    run.stopped, run.signal, run.running = "Ctrl-C", 2, ["attend.gradients"]
    run.only = {"stages": ["score", "attend"], "rules": []}
    return run


def nasty() -> Run:
    """Return a run whose texts try to break the page."""
    run = failed()
    run.implementation = NASTY
    failure = caught(lambda: fail(f"{NASTY}\x00\x1b[31m\u202e\ud800", where={NASTY: NASTY}))
    failure.rule, failure.case = "attend.causal", NASTY
    failure.finding.expected, failure.finding.actual = "inf", "x" * 100_000
    failure.finding.bound, failure.finding.ratio = float("nan"), float("inf")
    data = failure.to_json() | {"looks_like": [{"id": NASTY, "sentence": NASTY}]}
    run.results["attend.causal", ""] = Result(
        *("attend.causal", "", "failed", 10**9, float("nan"), 1e9),
        "\x07\x9b" + "\nline" * 10_000,
        data,
    )
    run.session["environment"] = {"gpus": [NASTY], "packages": {NASTY: NASTY}}
    run.stopped = NASTY
    run.only = {"stages": [], "rules": [NASTY]}
    return run


def _(_ratios: Tensor) -> None:
    """Take ratios that nobody wants to know."""
