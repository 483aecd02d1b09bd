"""Ratios of error to bound, and the tables of docs/tolerances.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from infllmv2_conformance import bounds

from .attention import FAULTY_ATTEND, HONEST_ATTEND
from .gradients import FAULTY_GRADIENTS, HONEST_GRADIENTS
from .problem import DTYPES, REGIMES, Problem, worst
from .scores import FAULTY_SCORES, FAULTY_WINDOWS, HONEST_SCORES, HONEST_WINDOWS

Variants = dict[str, Callable[[Problem], Any]]
Ratios = dict[str, dict[str, float]]
HONEST = {
    "compress": HONEST_WINDOWS,
    "score": HONEST_SCORES,
    "attend": HONEST_ATTEND,
    "gradients": HONEST_GRADIENTS,
}
FAULTY = {
    "compress": FAULTY_WINDOWS,
    "score": FAULTY_SCORES,
    "attend": FAULTY_ATTEND,
    "gradients": FAULTY_GRADIENTS,
}


def expected(p: Problem, stage: str) -> dict[str, bounds.Bounded]:
    """Return what the oracle says of a stage's results, by their names."""
    if stage == "compress":
        size, stride = p.config.kernel_size, p.config.kernel_stride
        return {"windows": bounds.compress(p.inputs[1], size, stride, p.arithmetic)}
    if stage == "score":
        return {"scores": p.scores}
    if stage == "attend":
        return dict(zip(("out", "lse"), p.attention, strict=True))
    return dict(zip(("dq", "dk", "dv"), p.gradients, strict=True))


def ratios_of(p: Problem, stage: str, variants: Variants) -> Ratios:
    """Return the worst error over its bound: `[variant][result]`."""
    judged = expected(p, stage)
    table: Ratios = {}
    for name, make in variants.items():
        results = make(p)
        results = results if isinstance(results, tuple) else (results,)
        pairs = zip(judged, results, strict=True)
        table[name] = {result: worst(actual, judged[result]) for result, actual in pairs}
    return table


def stages_of(regime: str) -> list[str]:
    """Return the stages that a regime is tried on; the backward pass of long rows is left out."""
    return [stage for stage in HONEST if stage != "gradients" or "long" not in regime]


def _print_row(name: str, cells: list[str]) -> None:
    print("| " + " | ".join([name, *cells]) + " |")


def print_honest() -> None:
    """Print the worst ratio of honest arithmetic, for every result and dtype."""
    _print_row("result, dtype", [*REGIMES, "worst"])
    _print_row("---", ["---"] * (len(REGIMES) + 1))
    tables: dict[tuple[str, str], dict[str, float]] = {}
    for regime in REGIMES:
        for dtype in DTYPES:
            p = Problem(regime, dtype)
            for stage in stages_of(regime):
                for row in ratios_of(p, stage, HONEST[stage]).values():
                    for result, ratio in row.items():
                        cells = tables.setdefault((result, dtype), {})
                        cells[regime] = max(cells.get(regime, 0.0), ratio)
    for (result, dtype), cells in sorted(
        tables.items(), key=lambda item: list(tables).index(item[0])
    ):
        shown = [f"{cells[r]:.3f}" if r in cells else "" for r in REGIMES]
        _print_row(f"{result}, {dtype}", [*shown, f"**{max(cells.values()):.3f}**"])


def print_faulty(dtype: str) -> None:
    """Print for every fault the ratio of the result that shows it best."""
    _print_row(dtype, list(REGIMES))
    _print_row("---", ["---"] * len(REGIMES))
    for stage, variants in FAULTY.items():
        for name, make in variants.items():
            cells: list[str] = []
            for regime in REGIMES:
                if stage not in stages_of(regime):
                    cells.append("")
                    continue
                row = ratios_of(Problem(regime, dtype), stage, {name: make})[name]
                ratio = max(row.values())
                shown = "inf" if math.isinf(ratio) else f"{ratio:.2g}" if ratio < 100 else "> 100"
                cells.append(shown if ratio > 1 else f"*{ratio:.2g}*")
            _print_row(f"{stage}: {name}", cells)
