"""One timed call: how to make it, what to keep of its result, and how to judge that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.failure import fail

from .counts import Count, count
from .field import Field
from .workloads import Workload


@dataclass
class Task:
    """Describe one figure of one competitor.

    Args:
        competitor: the implementation or the baseline.
        function: what is called, as `counts.count` knows it.
        call: makes the call and returns its result.
        sample: copies to the CPU what is judged of a result; soon the result is gone.
        judge: fails unless a sample is right; returns the worst difference over its bound.
        count: the work that it must do.
        replayable: whether a CUDA graph of the call does the same again.
        before: judges more, once, before anything is timed.
    """

    competitor: str
    function: str
    call: Callable[[], Any]
    sample: Callable[[Any], Any]
    judge: Callable[[Any], float]
    count: Count
    replayable: bool = True
    before: Callable[[], float] | None = None


@dataclass(frozen=True)
class Refusal:
    """Say why a figure is not measured."""

    competitor: str
    function: str
    reason: str


class NotRun(Exception):  # noqa: N818
    """Say why a task cannot be prepared."""


def make_task(
    candidate: Candidate,
    field: Field,
    function: str,
    call: Callable[[], Any],
    sample: Callable[[Any], Any],
    judge: Callable[[Any], float],
    **more: Any,
) -> Task:
    """Return a task of an implementation, with the work of `function` counted."""
    scores = getattr(torch, candidate.capabilities.arithmetic.scores)
    work = count(function, field.workload, torch.empty(0, dtype=scores).element_size())
    return Task(candidate.name, function, call, sample, judge, work, **more)


def unsupported(candidate: Candidate, workload: Workload) -> str | None:
    """Say why an implementation does not take a workload, None if it does."""
    claims, shape = candidate.capabilities, workload.shape
    for name, value, claimed in (
        ("head dim", shape.head_dim, claims.head_dims),
        ("group size", shape.group, claims.group_sizes),
        ("dtype", workload.dtype, claims.dtypes),
    ):
        if claimed is not None and value not in claimed:
            return f"{name} {value} is not claimed"
    if not claims.supports(workload.config):
        return "these block and window sizes are not claimed"
    if workload.length > claims.longest_context:
        return f"longest_context is {claims.longest_context}"
    if workload.batch > 1 and not claims.packed:
        return "batches are not claimed"
    return None


def require_tensor(
    name: str, x: Any, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...] = ()
) -> Tensor:
    """Return `x` if it is a plain tensor of this shape, None standing for any size.

    Raises:
        ConformanceFailure: it is not.
    """
    if type(x) is not Tensor and not isinstance(x, torch.nn.Parameter):
        fail(f"the result {name} is no plain tensor", actual=repr(type(x)))
    fits = len(shape) == x.ndim and all(
        b is None or a == b for a, b in zip(x.shape, shape, strict=True)
    )
    if not fits:
        fail(f"the result {name} has the wrong shape", actual=str(tuple(x.shape)))
    if dtypes and x.dtype not in dtypes:
        fail(f"the result {name} has the wrong dtype", actual=str(x.dtype))
    return x


def require_tuple(result: Any, count: int) -> tuple[Any, ...]:
    """Return the result if it is a tuple of so many.

    Raises:
        ConformanceFailure: it is not.
    """
    if not isinstance(result, tuple) or len(result) != count:  # pyright: ignore[reportUnknownArgumentType]
        fail(f"the result must be a tuple of {count}", actual=repr(type(result)))
    return result
