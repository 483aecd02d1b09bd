"""What follows from figures: shares of the stages, and how times grow with length."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .figures import Figure
from .modes import LATE
from .stats import exponent

SELECTIONS = (
    ("select",),
    ("score_blocks", "select_blocks"),
    ("score_windows", "pool_blocks", "select_blocks"),
)
"""Ways to select; the first that is measured whole counts."""
COMPRESSIONS = ("compress_keys", "compress_keys[k_c2]")
_SAME = ("implementation", "shape", "batch", "budget", "inputs", "dtype", "l2", "task")


def seconds_of(figure: Figure) -> float | None:
    """Return the median of a figure, None if it has no number."""
    return figure["seconds"]["median"] if figure["seconds"] else None


def limited_by(figure: Figure) -> str:
    """Say what a time depends on: "device", or "host" if the device had to wait for the host.

    The host's time is noisy, and differs from machine to machine with the same GPU.
    """
    waits = (
        figure["timing"] == "events" and figure["host_seconds"] > LATE * figure["seconds"]["median"]
    )
    return "host" if waits or figure["timing"] == "wall" else "device"


def breakdowns(figures: list[Figure]) -> list[dict[str, Any]]:
    """Return what selecting and attending take of every forward whose stages were measured."""
    groups: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for figure in figures:
        seconds = seconds_of(figure)
        if figure["task"] == "forward" and seconds is not None:
            where = *(figure[name] for name in _SAME), figure["length"]
            groups[where][figure["function"]] = seconds
    found: list[dict[str, Any]] = []
    for where, times in groups.items():
        ways = [way for way in SELECTIONS if all(name in times for name in way)]
        if not ways or "attend" not in times:
            continue
        compress = sum(times.get(name, 0.0) for name in COMPRESSIONS)
        select, attend = sum(times[name] for name in ways[0]), times["attend"]
        found.append(
            dict(zip((*_SAME, "length"), where, strict=True))
            | {"compress": compress, "select": select, "attend": attend}
            | {"selection_share": (compress + select) / (compress + select + attend)}
            | {"attention": times.get("attention")}
        )
    return found


def exponents(figures: list[Figure]) -> list[dict[str, Any]]:
    """Return the exponent `e` of `seconds ~ length ** e` for each function at several lengths."""
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for figure in figures:
        seconds = seconds_of(figure)
        if seconds:
            where = *(figure[name] for name in _SAME), figure["function"]
            groups[where].append((figure["length"], seconds))
    return [
        dict(zip((*_SAME, "function"), where, strict=True))
        | {"exponent": exponent(points), "lengths": sorted(int(n) for n, _ in points)}
        for where, points in groups.items()
        if len(points) > 1
    ]
