"""Time the competitors of one workload in turns, and judge what the timed calls returned."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from infllmv2_conformance.device import free_memory
from infllmv2_conformance.failure import ConformanceFailure

from .field import Field, free_bytes
from .modes import BACK_TO_BACK, Timed, distrust
from .stats import median
from .tasks import NotRun, Task
from .watches import Reading, Watch

FEWEST_ROUNDS = 3
MOST_ROUNDS = 50
FAR = 10
"""How many times the longest call one may be predicted to take, and still be tried."""


@dataclass
class Result:
    """Hold what became of one task.

    Args:
        competitor: who.
        function: what.
        status: "measured", "wrong" (the result), "untrusted" (the time) or "not run".
        reason: why it has no number.
        readings: by L2 state, cold or hot, one for every round.
        mode: how it was timed.
        memory: the most bytes that a call held beside its inputs, None where it is not known.
        worst_ratio: the worst difference over its bound, of all that was judged.
        task: what was timed.
    """

    competitor: str
    function: str
    status: str = "measured"
    reason: str = ""
    readings: dict[str, list[Reading]] = field(default_factory=dict[str, "list[Reading]"])
    mode: str = ""
    memory: int | None = None
    worst_ratio: float = 0.0
    task: Task | None = None

    def give_up(self, status: str, reason: str) -> None:
        """Take the number away."""
        self.status, self.reason = status, " ".join(reason.split())


@dataclass(frozen=True)
class Effort:
    """Limit how long things take.

    Args:
        seconds: for all rounds of one workload together; at least three are run.
        longest_call: no single call may be predicted to take longer.
        l2: which states of the caches are timed, "cold" and "hot".
        remaining: seconds that are left of the whole run.
        predict: the fewest and the most seconds that a call may take, by competitor and function;
            None if unknown.
    """

    seconds: float
    longest_call: float
    l2: tuple[str, ...]
    remaining: Callable[[], float]
    predict: Callable[[str, str], tuple[float, float] | None]


def race(
    place: Field,
    makers: list[tuple[str, str, Callable[[], Task]]],
    watch: Watch,
    effort: Effort,
) -> list[Result]:
    """Prepare, check, time and check again all competitors of a workload.

    Args:
        place: the tensors.
        makers: competitor, function, and how to prepare its task.
        watch: of the device.
        effort: the limits.
    """
    results: list[Result] = []
    timed: list[tuple[Result, Timed]] = []
    for competitor, function, make in makers:
        result = Result(competitor, function)
        results.append(result)
        entrant = _admit(result, make, place, watch, effort)
        if entrant:
            timed.append((result, entrant))
    kept, sums = _run_rounds(place, timed, effort)
    changed = place.checksums() != sums
    for result, entrant in timed:
        if result.status == "measured":
            _judge_timed(result, entrant, kept[id(result)], timed, watch)
        if changed and result.status == "measured":
            result.give_up("untrusted", "an input of this workload was changed while timing")
    return results


def _admit(
    result: Result, make: Callable[[], Task], place: Field, watch: Watch, effort: Effort
) -> Timed | None:
    """Run a task once, judge it, and find out how to time it; None if it gets no number."""
    reason = _too_long(result, effort) or _too_large(result, place)
    if reason:
        result.give_up("not run", reason)
        return None
    try:
        task = result.task = make()
        sums = place.checksums()
        began = time.monotonic()
        value = task.call()
        watch.settle()
        slow = time.monotonic() - began > effort.longest_call  # perhaps it compiles
        if place.checksums() != sums:
            place.restore()
            result.give_up("wrong", "it changes its inputs")
            return None
        _judge(result, task, task.sample(value))
        del value
        if slow and _gives_up(result, Timed(watch, task.call, task.replayable), effort, place):
            return None
        if task.before:
            result.worst_ratio = max(result.worst_ratio, task.before())
        entrant = Timed(watch, task.call, task.replayable)
        first, result.memory = _first(entrant, place.device)
        entrant.choose_mode(first)
        result.mode = entrant.mode
    except Exception as error:
        _explain(result, error)
        return None
    return entrant


def _too_long(result: Result, effort: Effort) -> str | None:
    """Say why a task is not even tried: it would surely be too slow, or perhaps for very long."""
    expected = effort.predict(result.competitor, result.function)
    if expected is None:
        return None
    fewest, most = expected
    if fewest > effort.longest_call or most > FAR * effort.longest_call:
        return f"a call would take {fewest:.1f} to {most:.1f} s"
    left = effort.remaining()
    if fewest * (FEWEST_ROUNDS * len(effort.l2) + 2) > left or most > left:
        return f"out of time: a call would take {fewest:.1f} to {most:.1f} s, {left:.0f} s are left"
    return None


def _too_large(result: Result, place: Field) -> str | None:
    needed, free = place.sizes().get(result.function), free_bytes(place.device)
    if needed and free is not None and needed > free:
        return f"out of memory: needs {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} are free"
    return None


def _judge(result: Result, task: Task, sample: Any) -> None:
    result.worst_ratio = max(result.worst_ratio, task.judge(sample))


def _gives_up(result: Result, entrant: Timed, effort: Effort, place: Field) -> bool:
    """Say whether a call is too slow also the second time, when nothing needs compiling."""
    reading, _ = _first(entrant, place.device)
    if reading.wall > effort.longest_call:
        result.give_up("not run", f"a call takes {reading.wall:.1f} s")
    return result.status != "measured"


def _first(entrant: Timed, device: torch.device) -> tuple[Reading, int | None]:
    """Time a call, and return the most memory that it adds to what is there before."""
    if device.type != "cuda":
        return entrant.time(cold=False)[0], None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    reading, _ = entrant.time(cold=False)
    return reading, torch.cuda.max_memory_allocated(device) - before


def _explain(result: Result, error: Exception) -> None:
    """Turn what went wrong into a status."""
    if isinstance(error, NotRun):
        result.give_up("not run", str(error))
    elif isinstance(error, torch.OutOfMemoryError):
        result.give_up("not run", "out of memory")
    elif isinstance(error, ConformanceFailure):
        where = ", ".join(f"{k} {v}" for k, v in error.finding.where.items())
        ratio = error.finding.ratio
        times = f", {ratio:.3g} times the bound" if ratio else ""
        result.give_up("wrong", error.finding.what + (f" ({where}{times})" if where else ""))
    else:
        first = next(iter(str(error).splitlines()), "")
        result.give_up("wrong", f"raised {type(error).__name__}: {first}"[:300])
    result.task = None
    free_memory()


def _run_rounds(
    place: Field, timed: list[tuple[Result, Timed]], effort: Effort
) -> tuple[dict[int, Any], list[int]]:
    """Run all rounds; return samples of one of them, drawn by lot, on inputs renewed just before.

    The second result are the checksums of the renewed inputs. Every competitor has a turn in every
    round, so that a drifting clock strikes all alike; a round begins with another one each time.
    """
    if not timed:
        return {}, place.checksums()
    turns = [(r, t, state) for r, t in timed for state in effort.l2]
    rounds, at, kept, sums = FEWEST_ROUNDS, 0, dict[int, Any](), list[int]()
    chosen = secrets.randbelow(rounds)
    while at < rounds:
        if at == chosen:
            place.refresh()
            sums = place.checksums()
        spent = 0.0
        for result, entrant, state in turns[at % len(turns) :] + turns[: at % len(turns)]:
            if result.status != "measured":
                continue
            try:
                reading, value = entrant.time(state == "cold")
                if at == chosen and result.task:
                    kept[id(result)] = result.task.sample(value)
                del value
            except Exception as error:
                _explain(result, error)
                continue
            result.readings.setdefault(state, []).append(reading)
            spent += reading.wall
        if at == 0:
            limit = min(effort.seconds, effort.remaining() / 2)
            rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(limit / max(spent, 1e-6))))
            chosen = chosen if chosen == 0 else 1 + secrets.randbelow(rounds - 1)
        at += 1
    return kept, sums


def _judge_timed(
    result: Result,
    entrant: Timed,
    sample: Any,
    timed: list[tuple[Result, Timed]],
    watch: Watch,
) -> None:
    """Judge the result of a timed call, then the clock."""
    assert result.task is not None
    try:
        _judge(result, result.task, sample)
    except Exception as error:
        _explain(result, error)
        result.reason = f"right before, but not while it was timed: {result.reason}"
        return
    on_cpu = watch.name == "cpu"
    for state, readings in result.readings.items():
        dense = [r for r, _ in timed if r.function.startswith("dense") and r is not result]
        others = [reading for r in dense for reading in r.readings.get(state, [])]
        reason = distrust(readings, others, on_cpu)
        typical = Reading(*(median([r[i] for r in readings]) for i in range(3)))
        if not reason and entrant.mode in ("events", "graph") and typical.device < BACK_TO_BACK:
            reason = None if entrant.agrees(typical) else _LIES
        if reason:
            result.give_up("untrusted", reason)
            return


_LIES = "back to back, its calls take the wall clock longer than the device's: it is not believed"
