"""The protocol of the two rings in `attend_hopper.cu`, played with every warp at a random pace.

It repeats what the kernel does with barriers, and nothing else: `load_pieces`, `skip`, and the loop
of `attend_rows`. The warps of a group move apart here, more than products let them on a GPU.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ring_model import Barrier, Steps, play

GROUPS = 3
WARPS = 2  # of a group; four on the device
FAULTS = (
    "skips what is not loaded",
    "holds a stage that the loader needs",
    "releases values early",
)


class Ring:
    """Stages of keys, or of values, with what lies in them."""

    def __init__(self, stages: int) -> None:
        self.full = [Barrier(1) for _ in range(stages)]
        self.empty = [Barrier(GROUPS * WARPS) for _ in range(stages)]
        self.content = [-1] * stages
        self.stages = stages

    def load(self, i: int) -> Steps:
        while not self.empty[i % self.stages].passed(i // self.stages & 1 ^ 1):
            yield False
        self.content[i % self.stages] = i
        self.full[i % self.stages].arrive("loader")
        yield True

    def wait(self, i: int) -> Steps:
        while not self.full[i % self.stages].passed(i // self.stages & 1):
            yield False
        self.holds(i)

    def holds(self, i: int) -> None:
        assert self.content[i % self.stages] == i, "another piece than was waited for"

    def release(self, i: int, warp: tuple[int, int]) -> None:
        self.empty[i % self.stages].arrive(warp)


class Program:
    """One loader and the warps of three groups over one list of pieces.

    Args:
        attended: for every piece, which groups attend it; one at least.
        stages: of both rings.
        fault: what is done wrongly, if anything.
    """

    def __init__(self, attended: list[list[bool]], stages: int, fault: str = "") -> None:
        self.attended, self.stages, self.fault = attended, stages, fault
        self.keys, self.values = Ring(stages), Ring(stages)
        self.done: dict[tuple[int, int], list[int]] = {
            (group, warp): [] for group in range(GROUPS) for warp in range(WARPS)
        }

    def load(self) -> Steps:
        for i in range(len(self.attended)):
            yield from self.keys.load(i)
            yield from self.values.load(i)

    def next(self, at: int, group: int) -> int:
        while at < len(self.attended) and not self.attended[at][group]:
            at += 1
        return at

    def skip(self, begin: int, end: int, warp: tuple[int, int]) -> Steps:
        for i in range(begin, end):
            for ring in (self.keys, self.values):
                if self.fault != FAULTS[0]:
                    yield from ring.wait(i)
                ring.release(i, warp)
                yield True

    def take_keys(self, i: int, warp: tuple[int, int]) -> Steps:
        yield from self.keys.wait(i)
        yield True  # the product runs
        self.keys.holds(i)
        self.keys.release(i, warp)

    def multiply(self, warp: tuple[int, int]) -> Steps:
        count, group = len(self.attended), warp[0]
        i = self.next(0, group)
        yield from self.skip(0, i, warp)
        if i == count:
            return
        yield from self.take_keys(i, warp)
        while (following := self.next(i + 1, group)) < count:
            if following - i <= self.stages or self.fault == FAULTS[1]:
                yield from self.skip(i + 1, following, warp)
                yield from self.keys.wait(following)
                yield from self.add(i, warp)
                self.keys.holds(following)
                self.keys.release(following, warp)
            else:
                yield from self.add(i, warp)
                yield from self.skip(i + 1, following, warp)
                yield from self.take_keys(following, warp)
            yield True
            i = following
        yield from self.add(i, warp)
        yield from self.skip(i + 1, count, warp)

    def add(self, i: int, warp: tuple[int, int]) -> Steps:
        """Multiply weights and values, and release these."""
        yield from self.values.wait(i)
        if self.fault == FAULTS[2]:
            self.values.release(i, warp)
        yield True  # the product runs
        self.values.holds(i)
        self.done[warp].append(i)
        if self.fault != FAULTS[2]:
            self.values.release(i, warp)

    def play(self, pace: random.Random) -> None:
        play([self.load(), *map(self.multiply, self.done)], pace)


def programs(fault: str = "") -> Generator[tuple[Program, random.Random], None, None]:
    for seed in range(200):
        pace = random.Random(seed)
        stages = pace.choice([2, 3, 5, 8])
        shares = [pace.random() ** 2 for _ in range(GROUPS)]
        attended = [[pace.random() < share for share in shares] for _ in range(40)]
        for row in attended:
            row[pace.randrange(GROUPS)] |= not any(row)
        yield Program(attended, stages, fault), pace


def test_every_warp_gets_its_pieces_in_order() -> None:
    for program, pace in programs():
        program.play(pace)
        for (group, _), done in program.done.items():
            assert done == [i for i, row in enumerate(program.attended) if row[group]]


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_protocols_are_seen(fault: str) -> None:
    failures = 0
    for program, pace in programs(fault):
        try:
            program.play(pace)
        except AssertionError:
            failures += 1
    assert failures > 10
