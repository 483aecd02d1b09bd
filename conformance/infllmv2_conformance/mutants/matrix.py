"""Run the bank against the suite: which rule kills which mutant, and after how many cases."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from infllmv2_conformance.names import STAGES
from infllmv2_conformance.profiles import PROFILES
from infllmv2_conformance.rules import ORDINARY, RULES, Rule

from .bank import MUTANTS
from .build import build
from .model import Mutant
from .reach import affected
from .reasons import REASONS
from .suite_tests import Outcome, apply, targets

LUCKY = 10
"""A kill that needs more cases than these may fail to happen with another seed."""


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


@dataclass(frozen=True)
class Matrix:
    """Hold the kill matrix of some mutants."""

    rows: tuple[Row, ...]
    profile: str
    seed: int

    @property
    def survivors(self) -> list[Row]:
        """Return the mutants that no rule killed."""
        return [row for row in self.rows if not row.kills]

    @property
    def missed(self) -> list[Row]:
        """Return the mutants that the expected rule did not kill."""
        return [row for row in self.rows if not row.expected.killed]

    @property
    def early(self) -> list[Row]:
        """Return the mutants that were killed at a stage before their own."""
        return [row for row in self.rows if row.early]

    @property
    def idle(self) -> list[str]:
        """Return the rules that killed nothing."""
        busy = {kill.rule for row in self.rows for kill in row.kills}
        return [rule for rule in ORDINARY if rule not in busy]

    @property
    def never_first(self) -> list[str]:
        """Return the rules that killed no mutant first, and for which no reason is written."""
        first = {row.first.rule for row in self.rows if row.first}
        return [rule for rule in ORDINARY if rule not in first and rule not in REASONS]

    def problems(self, whole: bool) -> list[str]:
        """Return what is wrong, in words; `whole` says whether all mutants were run."""
        found = [f"{row.mutant} survives" for row in self.survivors]
        found += [
            f"{row.mutant} is not killed by {row.expected.rule}" for row in self.missed if row.kills
        ]
        found += [f"{row.mutant} is killed too early, by {row.early[0].rule}" for row in self.early]
        if whole:
            found += [f"the rule {rule} kills nothing" for rule in self.idle]
            found += [
                f"the rule {rule} kills nothing first, and no reason is given"
                for rule in self.never_first
            ]
        return found


def run_matrix(
    ids: Sequence[str], profile: str, *, seed: int = 0, full: bool = False, workers: int = 2
) -> Iterator[Row]:
    """Run mutants in parallel, and yield their rows as they come.

    Args:
        ids: the mutants.
        profile: name of the profile, which says how many cases a rule draws.
        seed: what the search starts from.
        full: run every rule against every mutant, also those that no kill depends on.
        workers: processes.
    """
    if workers < 2:
        yield from (examine(MUTANTS[i], profile, seed, full) for i in ids)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepare) as pool:
        jobs = [pool.submit(_examine, i, profile, seed, full) for i in ids]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def examine(mutant: Mutant, profile: str, seed: int = 0, full: bool = False) -> Row:
    """Run the rules that the verdict on a mutant needs.

    Those are the expected rule; the rules of its stage before that one, up to the first kill; and
    all rules of earlier stages that call a function which the mutant changes. Contract rules stand
    apart: for their mutants, the rules of stages that call the changed function.
    """
    candidate = build(mutant)
    expected = RULES[mutant.rule]
    size, changed = PROFILES[profile], affected(mutant)
    own = apply(expected, candidate, size, seed, mutant.function)
    others: list[Outcome] = []
    done = False
    for rule in (RULES[name] for name in ORDINARY):
        if not full and (done or not changed & set(rule.functions) or not _before(rule, expected)):
            continue
        for function in targets(rule, candidate):
            if (rule.id, function) == (mutant.rule, mutant.function):
                continue
            others.append(apply(rule, candidate, size, seed, function))
            done = done or others[-1].killed
    return Row(mutant.id, own, tuple(others))


def _before(rule: Rule, expected: Rule) -> bool:
    """Say whether a rule comes before the expected one, and is no other contract rule."""
    order = list(RULES)
    return order.index(rule.id) < order.index(expected.id) and rule.stage != "contract"


def _comes_before(rule: str, expected: str) -> bool:
    stages = [RULES[name].stage for name in (rule, expected)]
    return "contract" not in stages and STAGES.index(stages[0]) < STAGES.index(stages[1])


def _examine(mutant: str, profile: str, seed: int, full: bool) -> Row:
    return examine(MUTANTS[mutant], profile, seed, full)


def _prepare() -> None:
    torch.set_num_threads(1)
