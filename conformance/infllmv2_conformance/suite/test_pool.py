"""Stage 3: windows are pooled into the blocks that they overlap."""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_conformance.arguments import pack_rows
from infllmv2_conformance.neighbours import check_alone
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.strategies import cases, corner, shape_classes
from infllmv2_conformance.trial import Trial
from infllmv2_reference.score import visible_windows

FUNCTION = "pool_blocks"


@rule("pool.values")
def test_values(run: Runner) -> None:
    """Pool random scores: the maximum is exact, so every bit must agree."""
    run.cases(cases(run), lambda trial: _check(trial, torch.nan))


@rule("pool.edges")
def test_edges(run: Runner) -> None:
    """Visit each length round the first three blocks, where windows and blocks are cut."""
    claims = run.candidate.capabilities
    corners = [
        corner(claims, shape, (length, length), kv_heads=1)
        for shape in shape_classes(claims, run.profile.shape_classes)
        for length in _edges(shape["block_size"], shape["kernel_stride"])
    ]
    short = cases(run, max_keys=200)
    run.cases(short, lambda trial: _check(trial, torch.nan), corners=corners, weight=0.2)


@rule("pool.invisible-not-read")
def test_invisible_not_read(run: Runner) -> None:
    """Give windows that have not ended the highest scores of all."""
    run.cases(cases(run), lambda trial: _check(trial, 1e30), weight=0.5)


@rule("pool.packed-alone")
def test_packed_alone(run: Runner) -> None:
    """Overwrite the scores of all other sequences of the batch."""
    run.cases(
        cases(run, min_sequences=2),
        lambda trial: check_alone(trial, FUNCTION, ("scores",), (torch.nan, 1e30)),
        weight=0.5,
    )


def _edges(block: int, stride: int) -> list[int]:
    """Return lengths at which the first, the last and the partial block are cut differently."""
    near = (block - 1, block, block + 1, 2 * block + stride - 1, 2 * block + stride, 3 * block - 1)
    return [length for length in near if length >= 1]


def _check(trial: Trial, padding: float) -> None:
    """Judge the pooling of random scores; `padding` stands at invisible windows."""
    config = trial.case.config
    rows: list[Tensor] = []
    for span, (windows, _) in zip(trial.oracle.spans, trial.oracle.windows, strict=True):
        shape = trial.case.kv_heads, span.num_queries, len(windows[0])
        scores = torch.rand(shape, generator=trial.generator, dtype=torch.float64)
        if trial.case.regime == "constant":
            scores = torch.zeros_like(scores)
        size, stride = config.kernel_size, config.kernel_stride
        visible = visible_windows(span.num_queries, span.num_keys, size, stride)
        rows.append(scores.where(visible, padding))
    packed = pack_rows(rows, trial.oracle, fill=padding)
    trial.check(FUNCTION, trial.arguments(FUNCTION, scores=packed))
