"""The protocol of the two rings in `attend_hopper.cu`, played with every warp at a random pace.

It repeats what the kernel does with barriers, and nothing else: `load_pieces`, `Reader`, and the
loop of `attend_rows`. The warps of a group move apart here, more than products let them on a GPU.
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
    "does not ask whether the load has begun",
    "holds a stage that the loader needs",
    "releases values early",
    "lets the loader release nothing",
    "lets the loader release before the stage is free",
)


class Ring:
    """Stages of keys, or of values, with what lies in them."""

    def __init__(self, stages: int) -> None:
        self.full = [Barrier(1) for _ in range(stages)]
        self.empty = [Barrier(GROUPS * WARPS) for _ in range(stages)]
        self.content = [-1] * stages
        self.stages = stages
        self.begun = 0
        self.landing: list[int] = []

    def holds(self, i: int) -> None:
        assert self.content[i % self.stages] == i, "another piece than was waited for"

    def release(self, i: int, who: object) -> None:
        self.empty[i % self.stages].arrive(who)


class Program:
    """Two loaders, the copy engine, and the warps of three groups, over one list of pieces.

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

    def load(self, ring: Ring) -> Steps:
        for i, groups in enumerate(self.attended):
            absent = [warp for warp in self.done if not groups[warp[0]]]
            if self.fault == FAULTS[3]:
                absent = []
            if self.fault == FAULTS[4]:
                self.release_all(ring, i, absent)
            while not ring.empty[i % self.stages].passed(i // self.stages & 1 ^ 1):
                yield False
            if self.fault != FAULTS[4]:
                self.release_all(ring, i, absent)
            ring.content[i % self.stages] = -1
            ring.landing.append(i)
            ring.begun = i + 1
            yield True

    def release_all(self, ring: Ring, i: int, absent: list[tuple[int, int]]) -> None:
        for warp in absent:
            ring.release(i, warp)

    def copy(self, ring: Ring, pace: random.Random) -> Steps:
        """Let pieces land in any order, as the copy engine may."""
        landed = 0
        while landed < len(self.attended):
            if not ring.landing:
                yield False
                continue
            i = ring.landing.pop(pace.randrange(len(ring.landing)))
            ring.content[i % self.stages] = i
            ring.full[i % self.stages].arrive("copy engine")
            landed += 1
            yield True

    def next(self, at: int, group: int) -> int:
        while at < len(self.attended) and not self.attended[at][group]:
            at += 1
        return at

    def wait(self, ring: Ring, i: int) -> Steps:
        while ring.begun <= i and self.fault != FAULTS[0]:
            yield False
        while not ring.full[i % self.stages].passed(i // self.stages & 1):
            yield False
        ring.holds(i)

    def take_keys(self, i: int, warp: tuple[int, int]) -> Steps:
        yield from self.wait(self.keys, i)
        yield True  # the product runs
        self.keys.holds(i)
        self.keys.release(i, warp)

    def multiply(self, warp: tuple[int, int]) -> Steps:
        count, group = len(self.attended), warp[0]
        i = self.next(0, group)
        if i == count:
            return
        yield from self.take_keys(i, warp)
        while (following := self.next(i + 1, group)) < count:
            if following - i <= self.stages or self.fault == FAULTS[1]:
                yield from self.wait(self.keys, following)
                yield from self.add(i, warp)
                self.keys.holds(following)
                self.keys.release(following, warp)
            else:
                yield from self.add(i, warp)
                yield from self.take_keys(following, warp)
            yield True
            i = following
        yield from self.add(i, warp)

    def add(self, i: int, warp: tuple[int, int]) -> Steps:
        """Multiply weights and values, and release these."""
        yield from self.wait(self.values, i)
        if self.fault == FAULTS[2]:
            self.values.release(i, warp)
        yield True  # the product runs
        self.values.holds(i)
        self.done[warp].append(i)
        if self.fault != FAULTS[2]:
            self.values.release(i, warp)

    def play(self, pace: random.Random) -> None:
        rings = (self.keys, self.values)
        agents = [self.load(ring) for ring in rings] + [self.copy(ring, pace) for ring in rings]
        play([*agents, *map(self.multiply, self.done)], pace)


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
