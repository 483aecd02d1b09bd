"""Run random edits in processes of their own, which may hang, crash or eat memory."""

from __future__ import annotations

import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, ForkProcess

import torch

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.memory import remembering
from infllmv2_conformance.profiles import PROFILES, Profile
from infllmv2_conformance.rules import ORDINARY, RULES, Rule

from .build import MutantError, build_texts
from .random_edits import RandomEdit, Verdict, originals
from .reach import EVERYTHING, Place, called
from .suite_tests import apply, targets

MEMORY = 6 << 30
"""Bytes of address space that an edit may take on top of what this process has."""
SIZES = PROFILES | {
    "small": Profile("small", examples=18, shape_classes=5, max_keys=160, max_pairs=40_000)
}
"""Sizes of the search: those of a check, and one that does with a tenth of the work."""
SLEEPS = 30
"""By how much more a rule may take on the clock, since the machine may be busy."""
REMEMBERED = 3 << 30
"""Bytes of the oracle's results that are kept: all edits meet the same cases."""


@dataclass(frozen=True)
class _Job:
    edit: RandomEdit
    process: ForkProcess
    news: Connection
    since: float
    rule: str = ""


def run_edits(
    edits: Sequence[RandomEdit],
    profile: str,
    *,
    stages: int = 0,
    seconds: int = 60,
    workers: int = 2,
) -> Iterator[Verdict]:
    """Run edits in parallel, each until a rule notices it, and yield what became of them.

    Args:
        edits: the edits.
        profile: one of `SIZES`, which says how many cases a rule draws, and how large.
        stages: how many of the stages that an edit reaches are run, from the first; 0 for all.
        seconds: of the CPU that one rule may take; longer counts as noticed, as it does in a check.
        workers: processes at a time.

    Raises:
        RuntimeError: it cannot be found out which functions an edit reaches.
    """
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    reached = _reached(context)
    with remembering(REMEMBERED):
        _warm_up(SIZES[profile])
        pool = _Pool(context, SIZES[profile], reached, stages, seconds)
        yield from pool.run(edits, workers)


@dataclass(frozen=True)
class _Pool:
    context: ForkContext
    profile: Profile
    reached: Mapping[str, frozenset[Place]]
    stages: int
    seconds: int

    def run(self, edits: Sequence[RandomEdit], workers: int) -> Iterator[Verdict]:
        """Keep some processes busy, and yield verdicts as they come."""
        left, running = list(reversed(edits)), list[_Job]()
        while left or running:
            while left and len(running) < workers:
                running.append(self._start(left.pop()))
            ready = wait([job.news for job in running], timeout=1.0)
            for job in list(running):
                verdict = _look(job, SLEEPS * self.seconds, job.news in ready)
                if isinstance(verdict, _Job):
                    running[running.index(job)] = verdict
                elif verdict is not None:
                    running.remove(job)
                    yield verdict

    def _start(self, edit: RandomEdit) -> _Job:
        ours, theirs = self.context.Pipe(duplex=False)
        place = edit.module, edit.change.function.split(".<locals>")[0]
        functions = frozenset(f for f in EVERYTHING if place in self.reached[f])
        given = edit, self.profile, functions, self.stages, self.seconds, theirs
        process = self.context.Process(target=_examine, args=given)
        process.start()
        theirs.close()
        return _Job(edit, process, ours, time.monotonic())


def _warm_up(profile: Profile) -> None:
    """Run the unedited implementation, so that children find the oracle's results.

    Raises:
        RuntimeError: it fails a rule.
    """
    candidate = build_texts("original", originals())
    for rule, function in _plan(frozenset(EVERYTHING), candidate):
        if "gradients" not in rule.claims:  # a process that has run a backward pass cannot fork
            outcome = apply(rule, candidate, profile, function=function)
            if outcome.killed:
                raise RuntimeError(f"the unedited implementation fails {rule.id}: {outcome.what}")


def _look(job: _Job, seconds: int, ready: bool) -> Verdict | _Job | None:
    """Return what became of a job, or the job with the rule that it is at, or None."""
    took = time.monotonic() - job.since
    if not ready:
        if took < seconds:
            return None
        job.process.kill()
        job.process.join()
        return Verdict(job.edit, "time", job.rule, f"did not end within {seconds} s", took)
    try:
        end, rule, what = job.news.recv()
    except EOFError:
        job.process.join()
        if job.process.exitcode == -signal.SIGXCPU:
            return Verdict(job.edit, "time", job.rule, "took too long", took)
        how = f"exit status {job.process.exitcode}"
        return Verdict(job.edit, "died", job.rule, how, took)
    if end == "at":
        return _Job(job.edit, job.process, job.news, job.since, rule)
    job.process.join()
    return Verdict(job.edit, end, rule, what, took)


def _examine(
    edit: RandomEdit,
    profile: Profile,
    functions: frozenset[str],
    stages: int,
    seconds: int,
    news: Connection,
) -> None:
    """Apply the rules that call one of `functions`, up to the first that fails."""
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, resource.RLIM_INFINITY))
    try:
        candidate = build_texts("random", edit.texts)
    except MutantError as error:
        news.send(("unbuilt", "", str(error)))
        return
    for rule, function in _plan(functions, candidate, stages):
        name = f"{rule.id}[{function}]" if function else rule.id
        news.send(("at", name, ""))
        used = math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))
        outcome = apply(rule, candidate, profile, function=function)
        if outcome.killed:
            news.send(("killed", name, outcome.what))
            return
    news.send(("survived", "", ""))


def _plan(
    functions: frozenset[str], candidate: Candidate, stages: int = 0
) -> Iterator[tuple[Rule, str]]:
    """Yield the rules that call one of `functions`, and the function for those that take one."""
    rules = [rule for rule in (RULES[name] for name in ORDINARY) if functions & set(rule.functions)]
    first = list(dict.fromkeys(rule.stage for rule in rules))[: stages or None]
    for rule in rules:
        if rule.stage in first:
            names = targets(rule, candidate) if rule.each else [""]
            yield from ((rule, name) for name in names if not rule.each or name in functions)


def _reached(context: ForkContext) -> dict[str, frozenset[Place]]:
    """Return where each contract function comes, found in a child because of its backward pass."""
    ours, theirs = context.Pipe(duplex=False)

    def tell() -> None:
        theirs.send({f: called(f, False) | called(f, True) for f in EVERYTHING})

    process = context.Process(target=tell)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(
            "the process that watches what the functions call has died, for the reason above"
        ) from None
    finally:
        process.join()


def _address_space() -> int:
    """Return the bytes of address space in use."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
