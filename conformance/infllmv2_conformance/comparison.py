"""Tell a failure which mutants fail in the same way."""

from __future__ import annotations

from .cases import Case
from .failure import ConformanceFailure
from .loading import MUTANT
from .runner import Runner

MOST_FAILURES = 5
"""Failures of a process that are compared: each may take seconds, and later ones add little."""


class Comparison:
    """Compare the first failures of an implementation with the bank of mutants."""

    def __init__(self) -> None:
        self.left = MOST_FAILURES

    def add_to(self, failure: ConformanceFailure, run: Runner) -> None:
        """Note in a failure which mutants it looks like.

        Mutants themselves are not compared, nor is a single case that is repeated, as too many fail
        alike on one, nor long contexts, of which each costs minutes. What goes wrong here must not
        hide the failure, so it is told in its place.
        """
        mutant = run.candidate.name.startswith(MUTANT)
        if mutant or run.only or run.length or not failure.case or not self.left:
            return
        self.left -= 1
        from .mutants.build import OriginalMissingError

        try:
            from .mutants.likeness import look_alikes

            found = look_alikes(run, Case.parse(failure.case))
            failure.looks_like = {mutant.id: mutant.sentence for mutant in found}
        except OriginalMissingError:
            return
        except Exception as error:
            failure.looks_like = {"unknown": f"comparing it raised {type(error).__name__}: {error}"}
