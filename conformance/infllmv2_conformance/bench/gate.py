"""Compare two benchmarks of one kind of GPU, and fail where a kernel has become slower.

What is compared is each figure's ratio to the dense attention that was timed in the same rounds: it
hardly depends on the clocks of the day, or on which card of a kind it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infllmv2_conformance.errors import UsageError

from .derived import limited_by
from .figures import Figure, key_of
from .record import Data
from .words import FAIL_ABOVE

LOST = ("wrong", "untrusted")


@dataclass(frozen=True)
class Change:
    """Compare one figure.

    Args:
        key: its name.
        old: its ratio to dense attention before.
        new: the same now; None if it has no number any more.
        reason: why it has none.
    """

    key: str
    old: float
    new: float | None
    reason: str = ""

    @property
    def slower(self) -> float | None:
        """Return by how much it is slower: 0.2 for 20 %; negative if it is faster."""
        return None if self.new is None else self.new / self.old - 1


@dataclass(frozen=True)
class Verdict:
    """Hold the outcome of a comparison.

    Args:
        changes: every figure that both benchmarks have, or had.
        failed: those that are too slow, wrong or untrusted now.
        skipped: keys that were measured before and were not run now.
        by_host: keys whose time depended on the host before: too noisy to compare.
    """

    changes: list[Change]
    failed: list[Change]
    skipped: list[str]
    by_host: list[str]


def compare(old: Data, new: Data, fail_above: float = FAIL_ABOVE) -> Verdict:
    """Compare two stored benchmarks.

    Raises:
        UsageError: they are of different devices, or have no figure in common.
    """
    devices = [_device(data) for data in (old, new)]
    if devices[0] != devices[1]:
        raise UsageError(f"benchmarks of {devices[0]} and of {devices[1]} cannot be compared")
    figures = {key_of(f): f for f in new["figures"]}
    changes: list[Change] = []
    skipped, by_host = list[str](), list[str]()
    for before in old["figures"]:
        if before["ratio_to_dense"] is None or before["function"].startswith("dense"):
            continue
        key = key_of(before)
        now = figures.get(key)
        if now is None or now["status"] == "not run":
            skipped.append(key)
        elif limited_by(before) == "host" and now["status"] == "measured":
            by_host.append(key)
        else:
            changes.append(_change(key, before, now))
    if not (changes or by_host):
        raise UsageError("the benchmarks have no figure in common")
    return Verdict(changes, [c for c in changes if _fails(c, fail_above)], skipped, by_host)


def _device(data: Data) -> str:
    return (data["machine"].get("gpu") or {}).get("name") or data["machine"]["device"]


def _change(key: str, before: Figure, now: Figure) -> Change:
    old, ratio = before["ratio_to_dense"], now["ratio_to_dense"]
    if ratio is not None and now["dense"] != before["dense"]:
        return Change(key, old, None, f"compared with {now['dense']}, not {before['dense']}")
    if ratio is None and now["status"] == "measured":
        return Change(key, old, None, "no dense attention was measured beside it")
    return Change(key, old, ratio, now["reason"] or "")


def _fails(change: Change, fail_above: float) -> bool:
    return change.slower is None or change.slower > fail_above


def spread(first: Data, second: Data) -> dict[str, dict[str, Any]]:
    """Return by how much two runs differ, figure by figure: the noise.

    Each entry has `seconds`, the difference of the medians over the smaller one, and `ratio`, the
    same of the ratios to dense attention.
    """
    others = {key_of(f): f for f in second["figures"] if f["seconds"]}
    found: dict[str, dict[str, Any]] = {}
    for figure in first["figures"]:
        other = others.get(key_of(figure))
        if figure["seconds"] and other:
            medians = figure["seconds"]["median"], other["seconds"]["median"]
            ratios = figure["ratio_to_dense"], other["ratio_to_dense"]
            found[key_of(figure)] = {
                "seconds": max(medians) / min(medians) - 1,
                "ratio": None if None in ratios else max(ratios) / min(ratios) - 1,
            }
    return found
