"""Run mutants against the suite: which rule kills each, and after how many cases."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from infllmv2_conformance.memory import remember, remembering
from infllmv2_conformance.profiles import PROFILES
from infllmv2_conformance.rules import ORDINARY, RULES, Rule

from .bank import MUTANTS
from .build import INTERPRET, build
from .matrix import Row
from .model import Mutant
from .reach import reach
from .suite_tests import Outcome, apply, targets

OTHERS = "quick"
"""The profile of the rules that need not kill a mutant: most of them pass, which takes longest."""
MEMORY = 512 << 20
"""Bytes of the oracle's results that a process keeps: mutants of a stage meet the same cases."""


def run_bank(
    ids: Sequence[str], profile: str, *, seed: int = 0, full: bool = False, workers: int = 2
) -> Iterator[Row]:
    """Run mutants in parallel, and yield their rows in the order of `ids`.

    Args:
        ids: the mutants.
        profile: name of the profile of the rules that must kill, which says how many cases to draw.
        seed: what the search starts from.
        full: run every rule that a mutant can change, also those that no verdict depends on.
        workers: processes.

    Raises:
        RuntimeError: a process died.
    """
    if workers < 2:
        with remembering(MEMORY):
            yield from (examine(MUTANTS[i], profile, seed, full) for i in ids)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepare) as pool:
        jobs = [pool.submit(_examine, i, profile, seed, full) for i in ids]
        try:
            yield from (job.result() for job in jobs)
        except BrokenProcessPool:
            raise RuntimeError("a process that ran mutants died; -n 1 shows at which one") from None
        finally:
            for job in jobs:  # the running ones end by themselves, and are waited for
                job.cancel()


def examine(mutant: Mutant, profile: str, seed: int = 0, full: bool = False) -> Row:
    """Run the rules that the verdict on a mutant needs.

    Those are the expected rule; the rules of its stage before that one, up to the first kill; and
    all rules of earlier stages that call a function which the mutant changes. Contract rules stand
    apart: for their mutants, the rules of stages that call the changed function. What a mutant
    does not reach needs no run: there it is the original, which passes.
    """
    candidate, changed = build(mutant), reach(mutant)
    expected = RULES[mutant.rule]
    own = apply(expected, candidate, PROFILES[profile], seed, mutant.function)
    others: list[Outcome] = []
    for rule in (RULES[name] for name in ORDINARY):
        if not changed.touches(rule) or not (full or _before(rule, expected)):
            continue
        found = [
            apply(rule, candidate, PROFILES[OTHERS], seed, function)
            for function in targets(rule, candidate)
            if (rule.id, function) != (mutant.rule, mutant.function)
        ]
        others += found
        if any(outcome.killed for outcome in found) and not full:
            break
    return Row(mutant.id, own, tuple(others))


def _before(rule: Rule, expected: Rule) -> bool:
    """Say whether a rule comes before the expected one, and is no other contract rule."""
    order = list(RULES)
    return order.index(rule.id) < order.index(expected.id) and rule.stage != "contract"


def _examine(mutant: str, profile: str, seed: int, full: bool) -> Row:
    return examine(MUTANTS[mutant], profile, seed, full)


def _prepare() -> None:
    os.environ[INTERPRET] = "1"  # before anything imports triton
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    torch.set_num_threads(1)
    remember(MEMORY)
