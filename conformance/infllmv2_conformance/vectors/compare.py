"""The rule by which a result is judged, as `docs/vectors.md` states it for every language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .expected import COMPETING, FORCED, Expected

TIE = 1e-12
"""Scores that differ by less, relative to the larger one, are the same score."""


@dataclass(frozen=True)
class Verdict:
    """Say what became of one result.

    Args:
        problem: what is wrong, "" if nothing is.
        ratio: the largest difference over its bound; None if no numbers were compared.
    """

    problem: str = ""
    ratio: float | None = None


def compare(expected: Expected, actual: Tensor, budget: int) -> Verdict:
    """Judge one result.

    Args:
        expected: what it must be.
        actual: what the implementation returned, of the same shape.
        budget: K, for certificates.
    """
    shape = list(expected.tensors["value"].shape)
    if expected.check == "certificate":
        shape[-1] = budget
    if list(actual.shape) != shape:
        return Verdict(f"its shape must be {shape}, but is {list(actual.shape)}")
    actual = actual.detach().cpu()
    if expected.check == "certificate":
        return _certificate(expected, actual)
    if expected.check == "exact":
        return _exact(expected, actual)
    return _bound(expected, actual)


def _defined(expected: Expected) -> Tensor:
    value = expected.tensors["value"]
    return expected.tensors.get("defined", torch.ones(value.shape, dtype=torch.uint8)).bool()


def _exact(expected: Expected, actual: Tensor) -> Verdict:
    value = expected.tensors["value"]
    if actual.dtype != value.dtype:
        return Verdict(f"its dtype must be {value.dtype}, but is {actual.dtype}")
    wrong = (actual != value) & _defined(expected)
    if not bool(wrong.any()):
        return Verdict()
    at = tuple(wrong.nonzero()[0].tolist())
    return Verdict(f"at {list(at)} it must be {value[at].item()}, but is {actual[at].item()}")


def _bound(expected: Expected, actual: Tensor) -> Verdict:
    """Fail where a number is NaN, another infinity, or further off than its bound."""
    value, bound = expected.tensors["value"], expected.tensors["bound"]
    if not actual.is_floating_point():
        return Verdict(f"its dtype must be a floating one, but is {actual.dtype}")
    actual, defined = actual.double(), _defined(expected)
    error = (actual - value).abs().where(actual != value, 0.0)
    ratio = (error / bound).where(error > 0, 0.0)
    ratio = ratio.where(~bound.isinf(), 0.0)
    ratio = ratio.where(~(actual.isnan() | ratio.isnan()), torch.inf).where(defined, 0.0)
    worst = float(ratio.max()) if ratio.numel() else 0.0
    if worst <= 1:
        return Verdict("", worst)
    at = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    facts = f"{value[at].item():.9g} +- {bound[at].item():.3g}, but is {actual[at].item():.9g}"
    return Verdict(f"at {list(at)} it must be {facts}", worst)


def _certificate(expected: Expected, actual: Tensor) -> Verdict:
    heads, rows, _ = actual.shape
    if actual.dtype != torch.int32:
        return Verdict(f"its dtype must be torch.int32, but is {actual.dtype}")
    for head in range(heads):
        for row in range(rows):
            problem = _row_problem(expected, actual[head, row].tolist(), head, row)
            if problem:
                return Verdict(f"at [{head}, {row}] {problem}")
    return Verdict()


def _row_problem(expected: Expected, ids: list[int], head: int, row: int) -> str:
    """Return what is wrong with one row of a selection, or ""."""
    kind = expected.tensors["kind"][row].tolist()
    value, bound = (expected.tensors[n][head, row].tolist() for n in ("value", "bound"))
    chosen = [i for i in ids if i >= 0]
    if ids != chosen + [-1] * (len(ids) - len(chosen)) or chosen != sorted(set(chosen)):
        return f"indices must ascend and then be -1, but are {ids}"
    if any(i >= len(kind) or kind[i] not in (FORCED, COMPETING) for i in chosen):
        return f"a block that is not visible is selected: {ids}"
    visible = [i for i, what in enumerate(kind) if what in (FORCED, COMPETING)]
    if len(chosen) != min(len(visible), len(ids)):
        return f"{min(len(visible), len(ids))} blocks must be selected, but are {ids}"
    if any(kind[i] == FORCED and i not in chosen for i in visible):
        return f"a forced block is missing: {ids}"
    taken = [i for i in chosen if kind[i] == COMPETING]
    left = [i for i in visible if i not in chosen]
    for j in left:
        for i in taken:
            if _passed_over(value, bound, i, j):
                return f"block {j} was passed over for block {i}, which scores less"
            if expected.ties and j < i and _ties(value[i], value[j]):
                return f"block {j} was passed over for block {i}, which scores the same"
    return ""


def _passed_over(value: list[float], bound: list[float], i: int, j: int) -> bool:
    """Say whether the unselected block j provably scores more than the selected block i."""
    if bound[i] == torch.inf or bound[j] == torch.inf:
        return False
    return value[j] - bound[j] > value[i] + bound[i]


def _ties(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= TIE * max(abs(a), abs(b))


def oracle_problem(stored: Expected, today: Expected) -> str:
    """Return how a stored result differs from today's oracle, or "".

    Values may differ by 1e-12 of the largest number of their row, which is float64 noise; bounds by
    a millionth, as they hold differences of nearly equal numbers.
    """
    kinds: tuple[Any, ...] = (stored.name, stored.check, stored.optional, stored.ties)
    if kinds != (today.name, today.check, today.optional, today.ties):
        return f"its form was {kinds}"
    if sorted(stored.tensors) != sorted(today.tensors):
        return f"it had the tensors {sorted(stored.tensors)}"
    for name, other in today.tensors.items():
        tensor = stored.tensors[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return f"{name} was {tensor.dtype} {list(tensor.shape)}"
        if not _same(tensor, other, 1e-6 if name == "bound" else 1e-12):
            return f"{name} differs"
    return ""


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite], b[~finite]):
        return False
    a, b = a.where(finite, 0.0), b.where(finite, 0.0)
    if a.numel() == 0:
        return True
    scale = torch.maximum(a.abs(), b.abs()).amax(-1, keepdim=True)
    return bool(((a - b).abs() <= tolerance * scale).all())
