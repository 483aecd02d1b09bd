"""Turn measured results into figures: plain data, as they are stored."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .counts import Ceilings, floor
from .rounds import Result
from .stats import Summary, median
from .workloads import Workload

Figure = dict[str, Any]
WORDS = ("implementation", "function", "task", "shape", "length", "batch", "budget", "inputs")
IDENTITY = (*WORDS, "dtype", "l2")
"""The fields that name a figure."""


def identity(workload: Workload, competitor: str, function: str, l2: str) -> Figure:
    """Return the fields that name a figure."""
    return {
        "implementation": competitor,
        "function": function,
        "task": workload.task,
        "shape": workload.shape.name,
        "length": workload.length,
        "batch": workload.batch,
        "budget": workload.budget,
        "inputs": workload.inputs,
        "dtype": workload.dtype,
        "l2": l2,
    }


def key_of(figure: Figure) -> str:
    """Return the name of a figure as one word."""
    return "/".join(str(figure[name]) for name in IDENTITY)


def make_figures(
    workload: Workload,
    results: list[Result],
    states: tuple[str, ...],
    ceilings: Ceilings,
    clocks: dict[str, Any],
) -> list[Figure]:
    """Return a figure for every result and state of the caches."""
    return [
        {
            **identity(workload, result.competitor, result.function, state),
            "heads": [workload.shape.query_heads, workload.shape.kv_heads],
            "head_dim": workload.shape.head_dim,
            "seed": workload.seed,
            "status": result.status,
            "reason": result.reason or None,
            **_times(result, state, results, ceilings),
            "clocks": clocks,
        }
        for result in results
        for state in states
    ]


def not_run(
    workload: Workload, who: list[tuple[str, str]], states: tuple[str, ...], reason: str
) -> list[Figure]:
    """Return figures without numbers, for the same reason."""
    results = [Result(competitor, function, "not run", reason) for competitor, function in who]
    return make_figures(workload, results, states, Ceilings(), {})


def _times(result: Result, state: str, results: list[Result], ceilings: Ceilings) -> Figure:
    """Return what was measured, and what it is worth; nothing unless it can be believed."""
    facts: Figure = dict.fromkeys(
        ("seconds", "host_seconds", "timing", "dense", "ratio_to_dense", "work", "roofline")
    )
    facts |= {"memory_bytes": None, "worst_ratio": None}
    if result.status != "measured" or result.task is None:
        return facts
    readings = result.readings[state]
    seconds = Summary.of([r.device for r in readings])
    dense = dense_of(results)
    facts["seconds"] = asdict(seconds) | {"rounds": [round(s, 9) for s in seconds.rounds]}
    facts["host_seconds"] = median([r.host for r in readings])
    facts["timing"], facts["memory_bytes"] = result.mode, result.memory
    facts["worst_ratio"] = result.worst_ratio
    if dense is not None:
        pairs = zip(readings, dense.readings[state], strict=False)  # of the same round
        facts["dense"] = dense.competitor
        facts["ratio_to_dense"] = median([r.device / d.device for r, d in pairs])
    bound, name = floor(result.task.count, ceilings)
    facts["work"] = asdict(result.task.count)
    share = bound / seconds.median if seconds.median else None
    facts["roofline"] = {"seconds": bound, "bound_by": name, "share": share}
    return facts


def dense_of(results: list[Result]) -> Result | None:
    """Return the dense attention that the others are compared with: the first one measured."""
    for result in results:
        if result.function.startswith("dense") and result.status == "measured":
            return result
    return None
