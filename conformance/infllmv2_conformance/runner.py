"""Run one rule: draw cases, call the implementation, keep count, and dress failures."""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import FlakyFailure
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from .canary import check_judges
from .candidate import Candidate
from .cases import Case
from .failure import ConformanceFailure, Finding
from .guards import Surroundings
from .margins import Margins
from .profiles import Profile
from .symptoms import Symptom
from .trial import Trial

SHRINK_CASES, SHRINK_SECONDS = 80, 20.0
"""How long a failing case is made smaller: so many cases, the same on every machine and with any
number of processes, unless the implementation is so slow that the time ends first."""
BATCH = 9
"""Cases of one Hypothesis run: from the tenth on it repeats parts of earlier ones, which here only
gives five near-duplicates for each new case."""
_NO_LIMITS = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
)


EXPLANATIONS = (
    (Surroundings(fresh=0.0), "it is right where fresh memory holds 0: something is not written"),
    (Surroundings(zones=0.0), "it is right where 0 lies behind the arguments: something is read"),
)
"""What else may be told about a failure, by running the case again in other memory."""


@dataclass
class Tally:
    """Count what a rule's run did.

    Args:
        cases: cases that ran to their end or failed.
        sound: those among them in which `Trial.is_sound` was asked, and saw a right result.
        worst_ratio: the largest difference over its bound, None if the rule compares no numbers.
        margins: how many places use how much of their bound.
    """

    cases: int = 0
    sound: int = 0
    worst_ratio: float | None = None
    margins: Margins = field(default_factory=Margins)

    def ratios(self, ratios: Tensor) -> None:
        """Note one comparison's differences over their bounds."""
        self.margins.add(ratios)
        worst = max(ratios.max().item(), 0.0) if ratios.numel() else 0.0
        self.worst_ratio = worst if self.worst_ratio is None else max(self.worst_ratio, worst)


@dataclass
class Runner:
    """Run the cases of one rule against one implementation.

    Args:
        candidate: the implementation, guarded.
        profile: how many cases, and how long.
        device: where the tensors live.
        seed: what the search starts from; the same seed draws the same cases.
        rule: the id of the rule.
        function: the contract function that a `contract.*` rule is applied to, or "".
        only: run just this case (`infllmv2 repro`).
        shrink: whether a failing case is made smaller before it is reported.
        length: keys of the long sequence that rules of the stage `long` draw.
        seen: how every case that ran failed, or None if it passed.
    """

    candidate: Candidate
    profile: Profile
    device: torch.device
    seed: int
    rule: str
    function: str = ""
    only: Case | None = None
    shrink: bool = True
    length: int = 0
    tally: Tally = field(default_factory=Tally)
    seen: dict[Case, Symptom | None] = field(default_factory=dict[Case, "Symptom | None"])
    _unsound: tuple[ConformanceFailure, Case] | None = None

    def cases(
        self,
        strategy: SearchStrategy[Case],
        check: Callable[[Trial], object],
        *,
        corners: Sequence[Case] = (),
        weight: float = 1.0,
    ) -> None:
        """Apply `check` to the `corners` and to cases drawn from `strategy`.

        Raises:
            ConformanceFailure: of the smallest failing case found, or because there was no case
                in which the function was right on plain inputs where the rule asks for that.
        """
        try:
            self._search(strategy, check, corners, weight)
            check_judges()
        except ConformanceFailure as failure:
            self._explain(failure, check)
            raise
        self._check_applied()

    def _search(
        self,
        strategy: SearchStrategy[Case],
        check: Callable[[Trial], object],
        corners: Sequence[Case],
        weight: float,
    ) -> None:
        if self.only is not None:
            self.run_case(self.only, check)
            return
        failed: dict[Case, None] = {}
        end = math.inf, math.inf  # of shrinking: cases, and time
        passed: set[Case] = set()

        def body(case: Case) -> None:
            nonlocal end
            if case in passed:
                return
            late = self.tally.cases >= end[0] or time.monotonic() > end[1]
            if late and case not in failed:
                return  # keep the smallest failure known
            try:
                self.run_case(case, check)
            except ConformanceFailure:
                if not failed:
                    end = self.tally.cases + SHRINK_CASES, time.monotonic() + SHRINK_SECONDS
                failed[case] = None
                raise
            passed.add(case)

        left = max(1, round(self.profile.examples * weight))
        for batch in range(-(-left // BATCH)):
            test = hypothesis.given(strategy)(body)
            for corner in reversed(corners if batch == 0 else ()):
                test = hypothesis.example(corner)(test)
            name = f"{self.rule}{self.function}{batch or ''}"
            test = hypothesis.seed(self.seed ^ zlib.crc32(name.encode()))(test)
            settings = self._settings(min(left, BATCH))
            try:
                settings(test)()
            except FlakyFailure as flaky:
                raise self._unstable(flaky, next(iter(failed), None)) from None
            left -= BATCH

    def each(self, cases: Sequence[Case], check: Callable[[Trial], object]) -> None:
        """Apply `check` to given cases in order; one that fails ends the rule, and is not shrunk.

        Raises:
            ConformanceFailure: of the first failing case.
        """
        for case in cases if self.only is None else [self.only]:
            self.run_case(case, check)

    def unclaimed(self, what: str) -> NoReturn:
        """End the rule as not claimed: the capabilities leave nothing to test."""
        pytest.skip(f"not claimed: {what}")

    def run_case(self, case: Case, check: Callable[[Trial], object]) -> None:
        """Apply `check` to one case; a subclass may watch, and must call this."""
        self.tally.cases += 1
        trial = Trial(case, self.candidate, self.device, self.tally.ratios, self.function)
        try:
            check(trial)
        except ConformanceFailure as failure:
            self.dress(failure, case)
            self.seen[case] = Symptom.of(failure.finding)
            raise
        self.seen[case] = None
        self.tally.sound += trial.sound is True
        if trial.unsound:
            self._unsound = trial.unsound, case

    def _check_applied(self) -> None:
        """Fail if the rule never applied: that nothing was found then says nothing."""
        if self._unsound is None or self.tally.sound:
            return
        failure, case = self._unsound
        what = f"cannot be tested: {self.function} is wrong with nothing special about the call"
        failure.finding.what = f"{what}: {failure.finding.what}"
        self.dress(failure, case)
        raise failure

    def dress(self, failure: ConformanceFailure, case: Case | None) -> None:
        """Tell a failure what it belongs to."""
        failure.rule, failure.function, failure.case = self.rule, self.function, str(case or "")
        failure.implementation, failure.device = self.candidate.name, str(self.device)

    def _explain(self, failure: ConformanceFailure, check: Callable[[Trial], object]) -> None:
        """Add to a failure what follows from running its case in other memory."""
        if not failure.case:
            self.dress(failure, None)
            return
        case = Case.parse(failure.case)
        for surroundings, what in EXPLANATIONS:
            try:
                with self.candidate.surrounded(surroundings):
                    check(Trial(case, self.candidate, self.device, lambda _: None, self.function))
            except Exception:
                continue  # it fails all the same
            failure.finding.what += f"; {what}"
            return

    def _unstable(self, flaky: BaseException, case: Case | None) -> ConformanceFailure:
        inner: Any = getattr(flaky, "exceptions", ())
        first = next((e for e in inner if isinstance(e, ConformanceFailure)), None)
        finding = first.finding if first else Finding("the verdict on the same case changed")
        finding.what += " (not every time: the same call gave different results)"
        failure = ConformanceFailure(finding)
        self.dress(failure, case)
        return failure

    def _settings(self, examples: int) -> hypothesis.settings:
        phases = [Phase.explicit, Phase.generate]
        phases += [Phase.reuse] if self.profile.database else []
        phases += [Phase.shrink] if self.shrink else []
        database = None
        if self.profile.database:  # a folder for each rule: Hypothesis takes all for one test
            folder = _examples() / "-".join(filter(None, ("infllmv2", self.rule, self.function)))
            database = DirectoryBasedExampleDatabase(folder)
        return hypothesis.settings(
            max_examples=examples,
            phases=phases,
            database=database,
            deadline=None,
            print_blob=False,
            report_multiple_bugs=False,
            verbosity=hypothesis.Verbosity.quiet,
            suppress_health_check=_NO_LIMITS,
        )


def _examples() -> Path:
    """Return where Hypothesis itself keeps failing examples: the variable is its own."""
    return Path(os.environ.get("HYPOTHESIS_STORAGE_DIRECTORY") or ".hypothesis") / "examples"
