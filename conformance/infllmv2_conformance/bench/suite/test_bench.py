"""One test for each figure: its rounds are played to pytest-benchmark by a virtual clock.

The competitors of a workload were timed in turns, when the first of its tests began; so what
pytest-benchmark stores and compares is the time of the device, not that of this test.
"""

from __future__ import annotations

from typing import Any

import pytest

from infllmv2_conformance.bench.watches import VirtualClock

CLOCK = VirtualClock()


@pytest.mark.benchmark(timer=CLOCK)
def test_bench(figure: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Report a figure; a wrong result or an unbelievable time fails, and has no number."""
    if figure["status"] == "not run":
        pytest.skip(figure["reason"])
    if not figure["seconds"]:
        pytest.fail(f"{figure['status']}: {figure['reason']}", pytrace=False)
    benchmark: Any = request.getfixturevalue("benchmark")
    words = (figure[n] for n in ("shape", "length", "task", "batch", "budget", "inputs", "l2"))
    benchmark.group = " ".join(map(str, words))
    names = ("ratio_to_dense", "dense", "roofline", "timing", "host_seconds", "memory_bytes")
    benchmark.extra_info |= {name: figure[name] for name in (*names, "worst_ratio", "clocks")}
    rounds = figure["seconds"]["rounds"]
    left = iter(rounds)
    benchmark.pedantic(lambda: CLOCK.advance(next(left)), rounds=len(rounds))
