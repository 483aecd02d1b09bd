"""What a failure looks like, so that two failures of one case can be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .failure import Finding

ROUNDING = 1e-12
"""Relative difference of two numbers that are printed alike."""


@dataclass(frozen=True)
class Symptom:
    """Hold what is seen of a violation.

    Args:
        what: the sentence that says what is wrong.
        where: the worst place.
        actual: what the implementation said there, as text.
        bound: how far a right result may lie from the oracle's, 0 if no numbers are compared.
    """

    what: str
    where: dict[str, int | str] = field(default_factory=dict[str, "int | str"])
    actual: str | None = None
    bound: float = 0.0

    @classmethod
    def of(cls, finding: Finding) -> Symptom:
        """Take from a finding what can be compared."""
        return cls(finding.what, dict(finding.where), finding.actual, finding.bound or 0.0)

    def is_like(self, other: Symptom) -> bool:
        """Say whether both see the same: what, where, and the value up to rounding."""
        alike = self.what == other.what and self.where == other.where
        return alike and _same(self.actual, other.actual, max(self.bound, other.bound))


def _same(ours: str | None, theirs: str | None, bound: float) -> bool:
    if ours == theirs:
        return True
    try:
        a, b = float(ours or ""), float(theirs or "")
    except ValueError:
        return False
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b or abs(a - b) <= bound + ROUNDING * abs(a)
