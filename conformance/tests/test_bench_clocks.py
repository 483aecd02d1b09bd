"""Which clock times a call, and when a clock is not believed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from infllmv2_conformance.bench.derived import limited_by
from infllmv2_conformance.bench.modes import SLACK, Timed, distrust
from infllmv2_conformance.bench.watches import CpuWatch, Reading


class _Events(CpuWatch):
    """Stand in for the watch of a GPU: it says what it is told to."""

    name = "events"

    def __init__(self, says):
        super().__init__()
        self.says, self.host = says, says

    def time(self, call):
        return Reading(self.says, self.host, self.says), call()


def _spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_events_that_contradict_the_wall_clock_are_not_used():
    """A call of 20 ms whose events say 1 us is timed by the wall clock instead."""
    lying = Timed(_Events(1e-6), lambda: _spin(0.02), replayable=False)
    lying.choose_mode(lying.time(cold=False)[0])
    assert lying.mode == "wall"
    assert lying.time(cold=False)[0].device >= 0.02
    fair = Timed(_Events(0.02), lambda: None, replayable=False)
    fair.choose_mode(fair.time(cold=False)[0])
    assert fair.mode == "events"


@pytest.mark.parametrize(("replayable", "mode"), [(True, "graph"), (False, "events")])
def test_a_call_that_waits_for_the_host_is_replayed(replayable, mode, monkeypatch):
    """Host and events agree on 2 ms, so the device may have waited: only a graph can tell."""
    late = Timed(_Events(0.002), lambda: None, replayable)
    monkeypatch.setattr(late, "_capture", lambda: True)
    late.choose_mode(late.time(cold=False)[0])
    assert late.mode == mode
    assert limited_by({"timing": mode, "host_seconds": 0.002, "seconds": {"median": 0.002}}) == (
        "device" if mode == "graph" else "host"
    )
    quick = Timed(_Events(0.02), lambda: None, replayable)
    quick.watch.host = 1e-5
    quick.choose_mode(quick.time(cold=False)[0])
    assert quick.mode == "events"


class _Graphs:
    """Stand in for CUDA graphs, and for the mode in which a call that waits raises."""

    def __init__(self, monkeypatch):
        self.state = "default"
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.switch)

    def switch(self, state):
        self.state = state

    @contextlib.contextmanager
    def capture(self, graph):
        self.state = "capture"
        try:
            yield
        finally:
            self.state = "default"


@pytest.mark.parametrize("waits", ["never", "always", "in capture"])
def test_only_calls_that_do_not_wait_are_captured(waits, monkeypatch):
    graphs, results = _Graphs(monkeypatch), []
    raises = {"never": (), "always": ("error", "capture"), "in capture": ("capture",)}[waits]

    def call():
        if graphs.state in raises:
            raise RuntimeError("called a synchronizing CUDA operation")
        results.append(object())
        return results[-1]

    watch = _Events(0.002)
    timed = Timed(watch, call, replayable=True)
    timed.choose_mode(Reading(0.002, 0.002, 0.002))
    assert graphs.state == "default"
    assert timed.mode == ("graph" if waits == "never" else "events")
    _, result = timed.time(cold=False)
    count = len(results)
    assert result is results[-1]
    timed.time(cold=False)
    assert len(results) == count + (0 if waits == "never" else 1)


def test_a_clock_is_doubted_if_the_wall_clock_says_more():
    fair, lie = Reading(0.010, 0.001, 0.0101), Reading(0.001, 0.001, 0.010)
    assert distrust([fair] * 3, [], on_cpu=False) is None
    assert distrust([lie] * 3, [], on_cpu=False)
    assert distrust([fair, fair, lie, fair], [], on_cpu=False) is None
    short = Reading(1e-5, 1e-5, 1e-5 + 5 * SLACK)
    assert distrust([short] * 3, [], on_cpu=False) is None


def test_a_busy_cpu_makes_nobody_a_liar():
    waits = [Reading(0.01, 0.05, 0.05), Reading(0.01, 0.2, 0.2)]
    assert distrust(waits, [], on_cpu=True) is None
    asleep = [Reading(0.01, 0.2, 0.2)] * 3
    assert distrust(asleep, [], on_cpu=True)
    assert distrust(asleep, asleep, on_cpu=True) is None  # dense attention had to wait as long


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long a thread waited")
def test_the_wall_clock_stands_still_while_others_have_all_cores():
    def work():
        sum(range(3_000_000))

    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        readings = [CpuWatch().time(work)[0] for _ in range(5)]
        asleep = CpuWatch().time(lambda: time.sleep(0.1))[0]
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert any(r.host > 1.5 * r.device for r in readings), "the others took no core"
    assert distrust(readings, [], on_cpu=True) is None
    assert all(r.wall < 1.5 * r.device for r in readings)
    assert distrust([asleep], [], on_cpu=True)
