"""What a failure says: rule, coordinates, expected, actual, bound, case, how to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Picture = dict[str, Any]
"""The data of a picture; `docs/report-format.md` describes it."""


@dataclass
class Finding:
    """Describe one violation in the terms of the specification.

    Args:
        what: one sentence that says what is wrong.
        where: coordinates, for example `{"sequence": 0, "position": 70, "head": 3}`.
        expected: what the oracle says, as text.
        actual: what the implementation said, as text.
        bound: the largest difference allowed at this place, if the rule compares numbers.
        ratio: the difference over the bound.
        count: how many places violate the rule, this one being the worst.
        pictures: what to look at, as functions that return the data of `pictures.py`: most
            failures are only steps on the way to a smaller one, and are never drawn.
    """

    what: str
    where: dict[str, int | str] = field(default_factory=dict[str, "int | str"])
    expected: str | None = None
    actual: str | None = None
    bound: float | None = None
    ratio: float | None = None
    count: int = 1
    pictures: list[Callable[[], Picture]] = field(default_factory=list[Callable[[], Picture]])


class ConformanceFailure(AssertionError):  # noqa: N818
    """Say that an implementation breaks a rule. The runner fills in the rule and the case."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding
        self.rule = ""
        self.function = ""
        self.case = ""
        self.implementation = ""
        self.device = "cpu"
        self.looks_like: dict[str, str] = {}
        """Mutants that fail in the same way, by their id, each with its sentence."""

    def reproduce(self) -> str:
        """Return the command that repeats this failure."""
        words = ["infllmv2", "repro", self.implementation, "--rule", self.rule, "--case", self.case]
        if self.function:
            words += ["--function", self.function]
        if self.device != "cpu":
            words += ["--device", self.device]
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for events and reports."""
        return {
            "rule": self.rule,
            "stage": self.rule.split(".")[0],
            "function": self.function or None,
            "case": self.case,
            "reproduce": self.reproduce(),
            **vars(self.finding),
            "looks_like": [{"id": i, "sentence": s} for i, s in self.looks_like.items()],
            "pictures": [draw() for draw in self.finding.pictures],
        }

    def __str__(self) -> str:
        """Return the failure as a person reads it."""
        f = self.finding
        lines = [f"{self.rule}: {f.what}" if self.rule else f.what]
        where = ", ".join(f"{name} {value}" for name, value in f.where.items())
        facts = [
            ("where", where),
            ("expected", f.expected),
            ("actual", f.actual),
            ("bound", None if f.bound is None else f"{f.bound:.3g}"),
            ("ratio", None if f.ratio is None else f"{f.ratio:.3g} times the bound"),
            ("places", f.count if f.count > 1 else None),
            *(("looks like ", f"{id}: {sentence}") for id, sentence in self.looks_like.items()),
            ("function", self.function),
            ("case", self.case),
            ("repeat", self.reproduce() if self.case else None),
        ]
        lines += [f"  {name:<9}{value}" for name, value in facts if value not in (None, "")]
        return "\n".join(lines)


def fail(what: str, **facts: Any) -> None:
    """Raise a `ConformanceFailure`; `facts` are fields of `Finding`.

    All failures leave from this line, so that Hypothesis shrinks them as one.
    """
    raise ConformanceFailure(Finding(what, **facts))
