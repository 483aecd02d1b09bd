"""A run as data: what was planned, what became of it, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from infllmv2_conformance.rules import RULES

OUTCOMES: tuple[str, ...] = ("passed", "failed", "error", "known failure", "not claimed", "not run")
WORST_FIRST = ("failed", "error", "not run", "known failure", "passed", "not claimed")


@dataclass(frozen=True)
class Result:
    """What became of one rule, or of one function of a rule that applies to each.

    Args:
        rule: the id.
        function: the contract function, or "".
        outcome: one of `OUTCOMES`.
        cases: cases that were run.
        worst_ratio: the largest difference over its bound, None if no numbers were compared.
        seconds: how long it took.
        text: why, as a person reads it.
        failure: the same as data.
        margins: how many places use how much of their bound, as `margins.py` counts them.
    """

    rule: str
    function: str = ""
    outcome: str = "not run"
    cases: int = 0
    worst_ratio: float | None = None
    seconds: float = 0.0
    text: str = ""
    failure: dict[str, Any] | None = None
    margins: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Return the rule with its function."""
        return f"{self.rule}[{self.function}]" if self.function else self.rule

    @property
    def stage(self) -> str:
        """Return the stage of the rule."""
        return self.rule.split(".")[0]


def _everything() -> dict[str, list[str]]:
    return {"stages": [], "rules": []}


@dataclass
class Run:
    """One run of the suite, complete or not.

    Args:
        implementation: what the user called it.
        profile: size of the search, or "long 131072".
        seed: what the search starts from.
        session: what the suite told of itself: capabilities, device, environment, versions.
        plan: (rule, function) of all that was to be run.
        results: what has become of it so far.
        seconds: how long the run took.
        stopped: why the run ended early, "" if it did not.
        running: names of what is at work now.
        only: the "stages" and "rules" that were asked for, none of them if all were.
        signal: the number of the signal that ended it, 0 if none did.
    """

    implementation: str
    profile: str
    seed: int
    session: dict[str, Any] = field(default_factory=dict[str, Any])
    plan: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    results: dict[tuple[str, str], Result] = field(default_factory=dict[Any, Result])
    seconds: float = 0.0
    stopped: str = ""
    signal: int = 0
    running: list[str] = field(default_factory=list[str])
    only: dict[str, list[str]] = field(default_factory=_everything)

    @property
    def complete(self) -> bool:
        """Say whether all that was planned has a result."""
        return bool(self.plan) and not self.remaining and not self.stopped

    @property
    def remaining(self) -> list[tuple[str, str]]:
        """Return what has no result yet."""
        return [key for key in self.plan if key not in self.results]

    @property
    def device(self) -> str:
        """Return the device type."""
        return self.session.get("device", "")

    @property
    def cases(self) -> int:
        """Return how many cases were run."""
        return sum(result.cases for result in self.results.values())

    def all_results(self) -> list[Result]:
        """Return a result for all that was planned, in the order of the rules."""
        order = {rule: place for place, rule in enumerate(RULES)}
        known = [self.results.get(key, Result(*key)) for key in self.plan]
        return sorted(known, key=lambda result: order.get(result.rule, len(order)))

    def by_rule(self) -> dict[str, list[Result]]:
        """Return the results of each rule."""
        rules: dict[str, list[Result]] = {}
        for result in self.all_results():
            rules.setdefault(result.rule, []).append(result)
        return rules

    def counts(self) -> dict[str, int]:
        """Count the rules by their outcome; a rule is as good as its worst function."""
        counts: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
        for results in self.by_rule().values():
            counts[worst(results)] += 1
        return counts

    @property
    def green(self) -> bool:
        """Say whether the run proves something: complete, nothing failed, something passed."""
        counts = self.counts()
        return self.complete and not (counts["failed"] or counts["error"]) and counts["passed"] > 0

    @property
    def exit_code(self) -> int:
        """Return 0 for a green run, 1 for any other, and what shells use for an interrupted one."""
        return 128 + self.signal if self.signal else int(not self.green)

    def verdict(self) -> str:
        """Return the run in one line."""
        counts = self.counts()
        parts = [f"{counts['passed']} rules passed", f"{counts['failed']} failed"]
        parts += [f"{counts['error']} errors of the suite"] if counts["error"] else []
        parts += [f"{counts['known failure']} known failures"] if counts["known failure"] else []
        parts.append(f"{counts['not claimed']} not claimed")
        parts += [f"{counts['not run']} not run"] if counts["not run"] else []
        facts = [f"{self.cases} cases", f"{self.seconds:.1f} s", self.profile, self.device]
        facts = [fact for fact in (*facts, f"seed {self.seed}") if fact]
        return f"{self.implementation}: {', '.join(parts)} ({', '.join(facts)})"


def worst(results: Iterable[Result]) -> str:
    """Return the outcome that speaks for several results."""
    return worst_outcome(result.outcome for result in results)


def worst_outcome(outcomes: Iterable[str]) -> str:
    """Return the outcome that speaks for several."""
    return min(outcomes, key=WORST_FIRST.index)
