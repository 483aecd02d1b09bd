"""The kill matrix as data: which rule kills which mutant, and what is wrong with that."""

from __future__ import annotations

from dataclasses import dataclass

from infllmv2_conformance.names import STAGES
from infllmv2_conformance.rules import ORDINARY, RULES

from .reasons import REASONS
from .suite_tests import Outcome

LUCKY = 10
"""A kill that needs more cases than these may fail to happen with another seed."""
LEAST_SHARE = {"quick": 0.95}
"""The share of the mutants that a profile must kill, if not all."""


@dataclass(frozen=True)
class Row:
    """Say what became of one mutant.

    Args:
        mutant: its id.
        expected: what the rule that must kill it made of it.
        others: what other rules made of it, in the order of the rules.
    """

    mutant: str
    expected: Outcome
    others: tuple[Outcome, ...] = ()

    @property
    def kills(self) -> list[Outcome]:
        """Return the outcomes of the rules that killed it, in the order of the rules."""
        order = list(RULES)
        killed = [o for o in (self.expected, *self.others) if o.killed]
        return sorted(killed, key=lambda o: order.index(o.rule))

    @property
    def first(self) -> Outcome | None:
        """Return the outcome of the first rule that killed it, of those that ran."""
        return next(iter(self.kills), None)

    @property
    def early(self) -> list[Outcome]:
        """Return kills at a stage before its own."""
        return [o for o in self.kills if _comes_before(o.rule, self.expected.rule)]

    @property
    def seconds(self) -> float:
        """Return how long all its rules took."""
        return sum(outcome.seconds for outcome in (self.expected, *self.others))


@dataclass(frozen=True)
class Matrix:
    """Hold the kill matrix of some mutants.

    Args:
        rows: what became of each.
        profile: the profile of the rules that must kill.
        seed: what the search started from.
        whole: whether all mutants were run.
        seconds: how long it took.
    """

    rows: tuple[Row, ...]
    profile: str
    seed: int
    whole: bool
    seconds: float = 0.0

    @property
    def survivors(self) -> list[Row]:
        """Return the mutants that the rule which must kill them did not kill."""
        return [row for row in self.rows if not row.expected.killed]

    @property
    def share(self) -> float:
        """Return the share of the mutants that were killed by the rule which must."""
        return 1 - len(self.survivors) / max(len(self.rows), 1)

    @property
    def lucky(self) -> list[Row]:
        """Return the mutants whose kill needed many cases."""
        return [row for row in self.rows if row.expected.killed and row.expected.cases > LUCKY]

    def kills(self, rule: str) -> list[str]:
        """Return the mutants that a rule killed, of those that it ran against."""
        return [row.mutant for row in self.rows if any(o.rule == rule for o in row.kills)]

    def first_kills(self, rule: str) -> list[str]:
        """Return the mutants that a rule killed before any other did."""
        return [row.mutant for row in self.rows if row.first and row.first.rule == rule]

    def problems(self) -> list[str]:
        """Return what is wrong, in words."""
        if not self.rows:
            return ["no mutant was run, so nothing is proved"]
        found = [
            f"{row.mutant} is killed too early, by {_name(row.early[0])}" for row in self._early
        ]
        least = LEAST_SHARE.get(self.profile, 1.0)
        if self.share < least:
            found += [self._survival(row) for row in self.survivors]
        if self.share < least < 1:
            found.append(f"{self.share:.1%} of the mutants are killed; it must be {least:.0%}")
        if self.whole and least == 1:
            found += [text for rule in ORDINARY for text in self._rule_problems(rule)]
        return found

    @property
    def _early(self) -> list[Row]:
        return [row for row in self.rows if row.early]

    def _survival(self, row: Row) -> str:
        if row.first is None:
            return f"{row.mutant} survives"
        name = _name(row.expected)
        return f"{row.mutant} survives {name}, which must kill it; {_name(row.first)} kills it"

    def _rule_problems(self, rule: str) -> list[str]:
        first, reason = self.first_kills(rule), REASONS.get(rule)
        if first and reason:
            return [
                f"reasons.py says why {rule} kills nothing first, but it kills {first[0]} first"
            ]
        if first or reason:
            return []
        what = "nothing first" if self.kills(rule) else "nothing"
        return [f"the rule {rule} kills {what}, and reasons.py does not say why"]


def _name(outcome: Outcome) -> str:
    return f"{outcome.rule}[{outcome.function}]" if outcome.function else outcome.rule


def _comes_before(rule: str, expected: str) -> bool:
    stages = [RULES[name].stage for name in (rule, expected)]
    return "contract" not in stages and STAGES.index(stages[0]) < STAGES.index(stages[1])
