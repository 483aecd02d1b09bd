"""Find the mutants that fail like an implementation: on its case, and on what it met before.

The mutants of the rule's own stage come first, those of the rule itself before all. Each runs on
the case that was reported. Those that fail there in the same way also run on other cases of the
search, where most times they must agree with the implementation on whether it fails, and how. If
several do, it runs a few more cases to tell them apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import pytest

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.cases import Case
from infllmv2_conformance.failure import ConformanceFailure
from infllmv2_conformance.memory import remembering
from infllmv2_conformance.profiles import PROFILES
from infllmv2_conformance.rules import RULES, Rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.symptoms import Symptom
from infllmv2_conformance.trial import Trial

from .bank import MUTANTS
from .build import build
from .model import Mutant
from .reach import reach
from .suite_tests import rule_tests

SECONDS = 8.0
"""Computing time that may be spent on one failure."""
OTHER_CASES = 40
"""Cases of the search, besides the reported one, that a mutant must agree on."""
SURVEYED_CASES = 10
"""Cases that the implementation runs anew, if several mutants agree on all that it met."""
ENOUGH = 2 / 3
"""The share of them that it must agree on: faults that are alike need not agree in every corner."""
MOST = 3
"""Mutants that are named: more of them say little."""
MEMORY = 256 << 20
"""Bytes of the oracle's results that are kept meanwhile: all mutants meet the same cases."""
T = TypeVar("T")


@dataclass(frozen=True)
class Suspect:
    """A mutant that runs in the place of the implementation, under its claims.

    Args:
        mutant: what it is.
        run: the runner of the implementation, whose rule, function and device count.
    """

    mutant: Mutant
    run: Runner

    @cached_property
    def candidate(self) -> Candidate:
        """Return the mutant under the claims of the implementation."""
        ours = self.run.candidate
        return Candidate(ours.name, build(self.mutant).target, ours.capabilities)

    def symptom(self, case: Case) -> Symptom | None:
        """Return how it fails on a case, or None if it passes."""
        run = Runner(
            self.candidate,
            PROFILES["quick"],
            self.run.device,
            self.run.seed,
            self.run.rule,
            self.run.function,
            only=case,
            shrink=False,
        )
        try:
            rule_tests()[self.run.rule](run)
        except ConformanceFailure:
            return run.seen.get(case)
        except pytest.skip.Exception:
            return None
        return None

    def agrees(self, case: Case, symptom: Symptom | None) -> bool:
        """Say whether it fails on a case like the implementation, or passes where that does."""
        ours = self.symptom(case)
        if symptom is None or ours is None:
            return symptom is ours
        return symptom.is_like(ours)


class _Survey(Runner):
    """Run a few cases of a rule to their end, whether they fail or not."""

    left = SURVEYED_CASES
    deadline = 0.0

    def run_case(self, case: Case, check: Callable[[Trial], object]) -> None:
        """Apply `check` to one case, and only note what becomes of it."""
        if self.left and time.thread_time() < self.deadline:
            self.left -= 1
            with suppress(ConformanceFailure):
                super().run_case(case, check)


def look_alikes(run: Runner, reported: Case) -> list[Mutant]:
    """Return the mutants that fail like an implementation, at most `MOST`.

    Args:
        run: the runner of the rule that the implementation broke, after its search.
        reported: the case of the failure.
    """
    target = run.seen.get(reported)
    if target is None:
        return []
    deadline = time.thread_time() + SECONDS
    with remembering(MEMORY):
        for suspects in _suspects(run):
            alike = [s for s in _until(deadline, suspects) if s.agrees(reported, target)]
            alike = _most_like(alike, _others(run.seen, reported), deadline)
            if len(alike) > 1 and run.device.type == "cpu":
                alike = _most_like(alike, _surveyed(run, deadline), deadline)
            if alike:
                return [suspect.mutant for suspect in alike[:MOST]]
    return []


def _most_like(
    alike: list[Suspect], others: Mapping[Case, Symptom | None], deadline: float
) -> list[Suspect]:
    """Return those that agree on the most of other cases, if that is enough."""
    agreed = [0] * len(alike)
    count = 0
    for case in _until(deadline, others):
        count += 1
        for i, suspect in enumerate(alike):
            agreed[i] += suspect.agrees(case, others[case])
    best = max(agreed, default=0)
    return [s for s, n in zip(alike, agreed, strict=True) if n == best >= ENOUGH * count]


def _others(seen: Mapping[Case, Symptom | None], reported: Case) -> dict[Case, Symptom | None]:
    """Return the cases that failed before the reported one, and those that passed most lately."""
    failed = [case for case, symptom in seen.items() if symptom and case != reported]
    passed = [case for case, symptom in seen.items() if symptom is None][::-1]
    half = OTHER_CASES // 2
    return {case: seen[case] for case in (*failed[:half], *passed[:half])}


def _surveyed(run: Runner, deadline: float) -> Mapping[Case, Symptom | None]:
    """Let the implementation run some of the rule's cases, for want of others to tell by.

    On a GPU a crash would cost more than it tells.
    """
    survey = _Survey(
        run.candidate, run.profile, run.device, run.seed, run.rule, run.function, shrink=False
    )
    survey.deadline = deadline
    with suppress(pytest.skip.Exception):
        rule_tests()[run.rule](survey)
    return survey.seen


def _suspects(run: Runner) -> Iterator[Iterator[Suspect]]:
    """Yield the mutants of the rule's stage, its own first, and then others that it may meet."""
    rule = RULES[run.rule]
    bank = [m for m in MUTANTS.values() if m.base == "eager"]
    own = [m for m in bank if m.stage == rule.stage]
    own.sort(key=lambda m: m.rule != rule.id)
    yield (Suspect(mutant, run) for mutant in own)
    others = (m for m in bank if m.stage != rule.stage)
    yield (Suspect(m, run) for m in others if _may_break(m, rule, run.function))


def _may_break(mutant: Mutant, rule: Rule, function: str) -> bool:
    changed = reach(mutant)
    return function in changed.forward if function else changed.touches(rule)


def _until(deadline: float, items: Iterable[T]) -> Iterator[T]:
    for item in items:
        if time.thread_time() > deadline:
            return
        yield item
