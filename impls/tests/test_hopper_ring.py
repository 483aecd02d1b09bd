"""The protocol of the ring in `hopper.py` of Triton, played with every agent at a random pace.

It repeats what the kernels do with barriers, and nothing else: `load_pieces`, `next_piece` and a
group's loop.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ring_model import Barrier, Steps, play


class Ring:
    """A program: one loader and several groups of warps over one list of pieces.

    Args:
        attended: for every piece, which groups attend it; one at least.
        stages: of the ring.
        fault: what is done wrongly, if anything.
    """

    def __init__(self, attended: list[list[bool]], stages: int, fault: str = "") -> None:
        self.attended, self.stages, self.fault = attended, stages, fault
        groups = len(attended[0])
        self.full = [Barrier(1) for _ in range(stages)]
        self.empty = [Barrier(groups) for _ in range(stages)]
        self.content = [-1] * stages
        self.done: list[list[int]] = [[] for _ in range(groups)]

    def load(self) -> Steps:
        for i in range(len(self.attended)):
            while not self.empty[i % self.stages].passed(i // self.stages & 1 ^ 1):
                yield False
            self.content[i % self.stages] = i
            self.full[i % self.stages].arrive("loader")
            yield True

    def wait(self, i: int) -> Steps:
        while not self.full[i % self.stages].passed(i // self.stages & 1):
            yield False
        assert self.content[i % self.stages] == i, "another piece than was waited for"

    def release(self, i: int, group: int) -> None:
        assert self.content[i % self.stages] == i, "the piece was overwritten while it was held"
        self.empty[i % self.stages].arrive(group)

    def search(self, at: int, limit: int, group: int) -> Generator[bool, None, int]:
        while at < min(limit, len(self.attended)) and not self.attended[at][group]:
            if self.fault != "skips what is not loaded":
                yield from self.wait(at)
            self.empty[at % self.stages].arrive(group)
            yield True
            at += 1
        return at

    def multiply(self, group: int) -> Steps:
        count, stages = len(self.attended), self.stages
        late = stages if self.fault == "searches too far" else 0
        i = yield from self.search(0, count, group)
        if i == count:
            return
        held = i
        yield from self.wait(i)
        self.done[group].append(i)
        i = yield from self.search(i + 1, i + stages - 1 + late, group)
        while i < count:
            yield from self.wait(i)
            newest = i
            self.done[group].append(i)
            i = yield from self.search(i + 1, held + stages + late, group)
            self.release(held, group)
            yield True
            i = yield from self.search(i, newest + stages - 1 + late, group)
            held = newest

    def play(self, pace: random.Random) -> None:
        play([self.load(), *map(self.multiply, range(len(self.attended[0])))], pace)


def rings(fault: str = "") -> Generator[tuple[Ring, random.Random], None, None]:
    for seed in range(400):
        pace = random.Random(seed)
        groups, stages = pace.choice([2, 3]), pace.choice([2, 3, 5, 6, 8])
        shares = [pace.random() ** 2 for _ in range(groups)]
        attended = [[pace.random() < share for share in shares] for _ in range(40)]
        for row in attended:
            row[pace.randrange(groups)] |= not any(row)
        yield Ring(attended, stages, fault), pace


def test_every_group_gets_its_pieces_in_order() -> None:
    for ring, pace in rings():
        ring.play(pace)
        for group, done in enumerate(ring.done):
            mine = [i for i, row in enumerate(ring.attended) if row[group]]
            assert done == sorted(set(done))
            assert set(mine) <= set(done)


@pytest.mark.parametrize("fault", ["skips what is not loaded", "searches too far"])
def test_wrong_protocols_are_seen(fault: str) -> None:
    failures = 0
    for ring, pace in rings(fault):
        try:
            ring.play(pace)
        except AssertionError:
            failures += 1
    assert failures > 10
