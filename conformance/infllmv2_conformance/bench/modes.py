"""Three ways to time a call, and which of them can be believed.

*events*: the watch of the device. *graph*: a CUDA graph of the call, where the host needs about as
long as the device. *wall*: from the call until the device has finished, where the device's clock
contradicts the wall clock; it includes the launches. On a CPU there is *cpu* alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import ceil
from time import monotonic_ns
from typing import Any

import torch

from .stats import median
from .watches import NANO, Reading, Watch

AGREE = 1.5
"""How far two clocks may differ on one call."""
AGREE_ON_CPU = 6.0
SLACK = 50e-6
"""Seconds of launching and waiting that the wall clock sees beside the device's."""
LATE = 0.5
"""The share of the device's time from which on the host may be what is measured."""
BACK_TO_BACK = 0.005
MOST_CALLS = 100


class Timed:
    """Time one call in the mode that fits it.

    Args:
        watch: of the device.
        call: what is timed.
        replayable: whether a graph of it does the same again.
    """

    def __init__(self, watch: Watch, call: Callable[[], Any], replayable: bool) -> None:
        self.watch, self.call, self.replayable = watch, call, replayable
        self.mode = watch.name
        self.host: float | None = None  # of a call that is replayed: launching a graph is cheaper
        self._replay: Callable[[], Any] = call

    def time(self, cold: bool) -> tuple[Reading, Any]:
        """Time one call, with the caches flushed if `cold`, and return its result."""
        if cold:
            self.watch.flush()
        self.watch.settle()
        if self.mode == "wall":
            return self._by_wall()
        began = _now()
        reading, result = self.watch.time(self._replay)
        wall = _seconds(began)
        host = reading.host if self.host is None else self.host
        return Reading(reading.device, host, wall), result

    def choose_mode(self, first: Reading) -> None:
        """Find the mode, given the reading of a first call.

        A call that keeps the host as long as the device leaves the device waiting: a graph does
        not. One that keeps the wall clock much longer than the device is of that kind too, or the
        device's clock is not to be trusted; either way its events are not used.
        """
        is_long = first.wall > 10 * BACK_TO_BACK and not distrust([first], [], on_cpu=False)
        if self.mode == "cpu" or is_long:
            return
        typical = self._typical()
        is_believed, is_late = self.agrees(typical), typical.host > LATE * typical.device
        if is_believed and not is_late:
            return
        self.host = typical.host
        if self.replayable and self._capture():
            self.mode = "graph"
            if self.agrees(self._typical()):
                return
        self.mode, self._replay, self.host = self.watch.name, self.call, None
        if not is_believed:
            self.mode = "wall"

    def agrees(self, reading: Reading) -> bool:
        """Say whether back-to-back calls take the wall clock about as long as the device's.

        Something else may keep the host once, but not three times in a row.
        """
        about = max(reading.device, reading.wall - 10 * SLACK, 1e-7)
        calls = max(1, min(MOST_CALLS, ceil(BACK_TO_BACK / about)))
        for _ in range(3):
            self.watch.settle()
            began = _now()
            for _ in range(calls):
                self._replay()
            self.watch.settle()
            if _seconds(began) / calls <= AGREE * reading.device + SLACK:
                return True
        return False

    def _typical(self) -> Reading:
        readings = [self.time(cold=False)[0] for _ in range(4)]
        return Reading(*(median([r[i] for r in readings]) for i in range(3)))

    def _by_wall(self) -> tuple[Reading, Any]:
        began = _now()
        result = self.call()
        host = _seconds(began)
        self.watch.settle()
        wall = _seconds(began)
        return Reading(wall, host, wall), result

    def _capture(self) -> bool:
        """Record a CUDA graph of the call; say whether it could be.

        A call that waits for the device cannot be captured, and a capture that fails leaves
        PyTorch's allocator in a bad state: look first.
        """
        graph, kept = torch.cuda.CUDAGraph(), list[Any]()
        try:
            if not _is_asynchronous(self.call):
                return False
            with torch.cuda.graph(graph):
                kept.append(self.call())
        except Exception:
            return False
        finally:
            torch.cuda.synchronize()

        def replay() -> Any:
            graph.replay()
            return kept[0]

        self._replay = replay
        return True


def _is_asynchronous(call: Callable[[], Any]) -> bool:
    """Say whether a call never waits for the device, as far as PyTorch can tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot always tell
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def distrust(readings: list[Reading], others: list[Reading], on_cpu: bool) -> str | None:
    """Say why the times of a call are not believed; None if they are.

    On a CPU the wall clock may also count what other programs do, where the system does not say how
    long a thread waited for a core. So only a call is doubted that is too long by the wall clock
    every time, and longer than dense attention had to wait.

    Args:
        readings: of the call, from the timed rounds.
        others: of dense attention in the same rounds.
        on_cpu: whether the device is a CPU.
    """
    device, wall = (median([getattr(r, name) for r in readings]) for name in ("device", "wall"))
    if on_cpu:
        waited = median([r.wall / max(r.device, NANO) for r in others]) if others else 1.0
        wall = min(r.wall for r in readings)
        limit = AGREE_ON_CPU * max(waited, 1.0) * device + 10 * SLACK
    else:
        limit = AGREE * device + 10 * SLACK  # the head start, and the wait after a single call
    if wall <= limit:
        return None
    return f"its clock says {device:.3g} s, but {wall:.3g} s went by: it is not believed"


def _now(clock: Callable[[], int] = monotonic_ns) -> int:
    return clock()


def _seconds(began: int, clock: Callable[[], int] = monotonic_ns) -> float:
    return (clock() - began) * NANO
