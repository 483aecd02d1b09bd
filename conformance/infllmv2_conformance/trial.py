"""One case applied to one implementation: the steps that the rules are written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .arguments import arguments
from .candidate import Candidate
from .cases import Case
from .failure import ConformanceFailure
from .guards import CALM
from .inputs import Inputs, build_inputs
from .judges import judge
from .oracle import Oracle
from .results import Piece, split


class Trial:
    """Hold a case, its tensors, its oracle and the implementation.

    Args:
        case: the case.
        candidate: the implementation.
        device: where the tensors live.
        note: takes the differences over their bounds of each comparison.
        function: the function under test, for rules that apply to each one.
    """

    def __init__(
        self,
        case: Case,
        candidate: Candidate,
        device: torch.device,
        note: Callable[[Tensor], None],
        function: str = "",
    ) -> None:
        self.case, self.candidate, self.device = case, candidate, device
        self.note, self.function = note, function
        self.capabilities = candidate.capabilities
        self.sound: bool | None = None
        """Whether the function is right on plain inputs; None if nothing was asked or computed."""
        self.unsound: ConformanceFailure | None = None
        """How it is wrong on them."""

    @cached_property
    def inputs(self) -> Inputs:
        """Return the packed tensors of the case."""
        return build_inputs(self.case, self.device)

    @cached_property
    def oracle(self) -> Oracle:
        """Return what each stage must give."""
        return Oracle(self.case, self.inputs, self.capabilities.arithmetic)

    @cached_property
    def generator(self) -> torch.Generator:
        """Return a source of further numbers, fixed by the case."""
        return torch.Generator().manual_seed(self.case.seed * 7919 + self.case.choice)

    def arguments(self, function: str, **changes: Any) -> dict[str, Any]:
        """Return the arguments of a function, from the oracle's earlier stages, with `changes`."""
        return arguments(function, self.inputs, self.oracle) | changes

    def run(self, function: str, given: dict[str, Any]) -> list[Piece]:
        """Call a function and return the part of every sequence, its form checked."""
        result = self.candidate.call(function, **given)
        return self.split(function, result)

    def split(self, function: str, result: Any) -> list[Piece]:
        """Check the form of a result and cut it into sequences."""
        claims = self.capabilities
        flags = {"lse": claims.returns_lse, "selection": claims.returns_selection}
        returns = frozenset(name for name, claimed in flags.items() if claimed)
        return split(function, result, self.oracle, returns)

    def check(
        self,
        function: str,
        given: dict[str, Any] | None = None,
        *,
        against: Oracle | None = None,
        sequences: set[int] | None = None,
    ) -> list[Piece]:
        """Call a function and judge the result.

        Args:
            function: the contract function.
            given: its arguments; those of the case unless given.
            against: the oracle to judge by; that of the case unless given.
            sequences: the sequences to judge; all unless given.
        """
        given = self.arguments(function) if given is None else given
        pieces = self.run(function, given)
        self.judge(function, pieces, given, against=against, sequences=sequences)
        return pieces

    def is_sound(self) -> bool:
        """Say whether the function under test is right on the plain inputs of the case.

        Fresh memory and what surrounds the arguments hold 0 then, as they often do. Rules about
        how a function is called apply only then: a function that computes the wrong thing is
        reported by the rules of its stage, once. If it is wrong in every case of a rule, that
        rule fails too, as `Runner.cases` says.
        """
        plain = self.on(self.case.sequences, self.inputs)
        plain.__dict__["oracle"], plain.note = self.oracle, _ignore
        try:
            with self.candidate.surrounded(CALM):
                pieces = plain.check(self.function)
        except ConformanceFailure as failure:
            self.sound, self.unsound = False, failure
            return False
        if any(x is not None and x.numel() for piece in pieces for x in piece):
            self.sound = True
        return True

    def judge(
        self,
        function: str,
        pieces: list[Piece],
        given: dict[str, Any],
        *,
        against: Oracle | None = None,
        sequences: set[int] | None = None,
    ) -> None:
        """Fail unless the parts of a result are right."""
        oracle = against or self.oracle
        for span, piece in zip(oracle.spans, pieces, strict=True):
            if sequences is None or span.sequence in sequences:
                judge(function, piece, span, oracle, given, self.note)

    def changed(self, **tensors: Tensor) -> Oracle:
        """Return the oracle of the same case with other tensors in the inputs."""
        return Oracle(self.case, replace(self.inputs, **tensors), self.capabilities.arithmetic)

    def redrawn(self) -> Trial:
        """Return a trial with other numbers in tensors of the same form."""
        case = self.case.with_(seed=self.case.seed + 1)
        return Trial(case, self.candidate, self.device, self.note, self.function)

    def on(self, sequences: Sequence[tuple[int, int]], inputs: Inputs, **fields: Any) -> Trial:
        """Return a trial of other sequences on given tensors, with the rest of the case."""
        case = self.case.with_(sequences=tuple(sequences), **fields)
        trial = Trial(case, self.candidate, self.device, self.note, self.function)
        trial.__dict__["inputs"] = inputs
        return trial


def _ignore(_: Tensor) -> None:
    """Take ratios that nobody wants to know."""
