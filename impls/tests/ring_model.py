"""Barriers in shared memory, and agents that meet at them, each at a random pace.

A GPU rarely runs its warps in an order in which a wrong protocol shows; this model does.
"""

from __future__ import annotations

import random
from collections.abc import Generator

Steps = Generator[bool, None, None]
"""Yields False while an agent waits, and True after each thing that it did."""


class Barrier:
    """An mbarrier: a phase ends when all have arrived, and a wait sees only its parity."""

    def __init__(self, count: int) -> None:
        self.count, self.phase = count, 0
        self.arrived: set[object] = set()

    def arrive(self, who: object) -> None:
        assert who not in self.arrived, f"{who} is counted twice in one phase"
        self.arrived.add(who)
        if len(self.arrived) == self.count:
            self.phase, self.arrived = self.phase + 1, set()

    def passed(self, parity: int) -> bool:
        return (self.phase - 1) & 1 == parity


def play(agents: list[Steps], pace: random.Random) -> None:
    """Let all agents run to their ends; fail if all of them wait."""
    slow = pace.randrange(len(agents))
    waited = 0
    while agents:
        agent = pace.choice(agents if pace.random() < 0.3 else agents[slow:] or agents)
        try:
            waited = 0 if next(agent) else waited + 1
        except StopIteration:
            agents.remove(agent)
            waited = 0
        assert waited < 1000, "all wait for each other"
