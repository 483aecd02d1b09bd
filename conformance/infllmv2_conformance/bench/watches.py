"""Stopwatches: how long one call keeps the device busy, and how long the host.

What they read is taken from the modules at import, before any implementation is loaded, so that a
replaced `time.perf_counter` changes nothing. `trust.py` compares the readings of two clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic_ns, perf_counter_ns, process_time_ns
from typing import Any, NamedTuple, Protocol

import torch

NANO = 1e-9
_HEAD_START_CYCLES = 100_000
"""About 50 us on a GPU: the host gets ahead, so that its launches leave no gap in what is timed."""
_FLUSH_FACTOR = 4


class Reading(NamedTuple):
    """Say how long one call took, in seconds.

    Args:
        device: what is reported.
        host: until the call returned to its caller.
        wall: until the device had finished, by another clock; on Linux without the time that a
            thread was ready to run and no core was free.
    """

    device: float
    host: float
    wall: float


class Watch(Protocol):
    """Time calls on one kind of device."""

    name: str

    def time(self, call: Callable[[], Any]) -> tuple[Reading, Any]:
        """Time one call and return its result."""
        ...

    def flush(self) -> None:
        """Drive the inputs out of the caches; the next `time` does not count this."""
        ...

    def settle(self) -> None:
        """Wait until the device has nothing to do."""
        ...


class CpuWatch:
    """Time by the CPU seconds of this process, of all its threads: other programs do not count.

    Args:
        cache_bytes: of the last cache level; a buffer several times as large is written to flush.
    """

    name = "cpu"

    def __init__(self, cache_bytes: int = 1 << 25) -> None:
        self._cache_bytes = cache_bytes
        self._buffer: torch.Tensor | None = None
        self._cpu_ns, self._wall_ns, self._host_ns = process_time_ns, monotonic_ns, perf_counter_ns

    def time(self, call: Callable[[], Any]) -> tuple[Reading, Any]:
        """Time one call and return its result."""
        queued = _queued_ns()
        wall, host, cpu = self._wall_ns(), self._host_ns(), self._cpu_ns()
        result = call()
        cpu, host, wall = self._cpu_ns() - cpu, self._host_ns() - host, self._wall_ns() - wall
        wall -= max(_queued_ns() - queued, 0)
        return Reading(cpu * NANO, host * NANO, wall * NANO), result

    def flush(self) -> None:
        """Write a buffer larger than the caches."""
        if self._buffer is None:
            self._buffer = torch.zeros(_FLUSH_FACTOR * self._cache_bytes, dtype=torch.uint8)
        self._buffer.add_(1)

    def settle(self) -> None:
        """Do nothing: calls on a CPU return when they are done."""


def _queued_ns(tasks: Path = Path("/proc/self/task")) -> int:
    """Return how long the threads of this process have waited for a core; 0 where none tells."""
    total = 0
    with suppress(OSError):
        for task in tasks.iterdir():
            with suppress(OSError, IndexError, ValueError):  # a thread may end meanwhile
                total += int((task / "schedstat").read_text().split()[1])
    return total


class CudaWatch:
    """Time by CUDA events on the current stream.

    Args:
        device: the GPU.
    """

    name = "events"

    def __init__(self, device: torch.device) -> None:
        l2 = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 1 << 26)
        self._buffer = torch.empty(_FLUSH_FACTOR * l2, dtype=torch.uint8, device=device)
        self._wall_ns, self._host_ns = monotonic_ns, perf_counter_ns
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Callable[[], Any]) -> tuple[Reading, Any]:
        """Time one call and return its result; the launch itself is hidden, gaps inside are not."""
        sleep: Any = torch.cuda._sleep  # pyright: ignore[reportPrivateUsage]
        wall = self._wall_ns()
        sleep(_HEAD_START_CYCLES)
        self._start.record()
        host = self._host_ns()
        result = call()
        host = self._host_ns() - host
        self._end.record()
        torch.cuda.synchronize()  # of all streams, whatever the call used
        wall = self._wall_ns() - wall
        device = self._start.elapsed_time(self._end) * 1e-3
        return Reading(device, host * NANO, wall * NANO), result

    def flush(self) -> None:
        """Write a buffer several times as large as the L2 cache."""
        self._buffer.zero_()

    def settle(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize()


def make_watch(device: torch.device) -> Watch:
    """Return the stopwatch of a device."""
    return CudaWatch(device) if device.type == "cuda" else CpuWatch()


class VirtualClock:
    """A clock that moves only when told to: what pytest-benchmark takes as `timer`.

    >>> clock = VirtualClock()
    >>> start = clock(); clock.advance(0.25); clock() - start
    0.25
    """

    __name__ = "device_time"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Return the seconds so far."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds
