"""Call the suite's tests one by one, in this process, without pytest's machinery."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from infllmv2_conformance import suite
from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.cases import Case
from infllmv2_conformance.failure import ConformanceFailure
from infllmv2_conformance.profiles import Profile
from infllmv2_conformance.rules import RULES, Rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.trial import Trial

Test = Callable[[Runner], None]


@dataclass(frozen=True)
class Outcome:
    """Say what one rule made of an implementation.

    Args:
        rule: the rule.
        function: the function that a `contract.*` rule was applied to, or "".
        killed: whether it failed.
        claimed: whether it applied at all.
        cases: cases that ran, up to the first failure.
        seconds: how long it took.
        what: how it failed.
    """

    rule: str
    function: str = ""
    killed: bool = False
    claimed: bool = True
    cases: int = 0
    seconds: float = 0.0
    what: str = ""


@dataclass
class _Counting(Runner):
    """Note after how many cases the first failure came."""

    first: int | None = None

    def run_case(self, case: Case, check: Callable[[Trial], object]) -> None:
        """Apply `check` to one case."""
        try:
            super().run_case(case, check)
        except ConformanceFailure:
            self.first = self.first or self.tally.cases
            raise


def apply(
    rule: Rule, candidate: Candidate, profile: Profile, seed: int = 0, function: str = ""
) -> Outcome:
    """Run one rule against an implementation, up to the first failing case.

    An error that is not the implementation's is let through: it is a fault of the suite.
    """
    claims = candidate.capabilities
    offered = [name for name in rule.functions if candidate.offers(name)]
    needed = [function] if rule.each else rule.functions
    if not set(needed) <= set(offered) or not all(getattr(claims, c) for c in rule.claims):
        return Outcome(rule.id, function, claimed=False)
    cpu = torch.device("cpu")
    run = _Counting(candidate, profile, cpu, seed, rule.id, function, shrink=False)
    start = time.perf_counter()
    what, claimed = "", True
    try:
        rule_tests()[rule.id](run)
    except ConformanceFailure as failure:
        what = failure.finding.what
    except pytest.skip.Exception:
        claimed = False
    seconds = time.perf_counter() - start
    cases = run.first or run.tally.cases
    return Outcome(rule.id, function, bool(what), claimed, cases, seconds, what)


def targets(rule: Rule, candidate: Candidate) -> list[str]:
    """Return the functions that a rule is applied to, one at a time: [""] for most rules."""
    return [n for n in rule.functions if candidate.offers(n)] if rule.each else [""]


@cache
def rule_tests() -> dict[str, Test]:
    """Return the suite's test of every rule."""
    found = dict(_marked())
    missing = sorted(set(RULES) - set(found))
    if missing:
        raise RuntimeError(f"these rules have no test: {', '.join(missing)}")
    return found


def _marked() -> Iterator[tuple[str, Test]]:
    for module in pkgutil.iter_modules(suite.__path__):
        for value in vars(importlib.import_module(f"{suite.__name__}.{module.name}")).values():
            for mark in getattr(value, "pytestmark", ()):
                if mark.name == "rule":
                    yield mark.args[0], value
