"""What a failure looks like, so that two failures of one case can be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .failure import Finding

SHARE = 0.05
"""Two wrong numbers are alike if they differ by less than this share of how wrong they are."""


@dataclass(frozen=True)
class Symptom:
    """Hold what is seen of a violation.

    Args:
        what: the sentence that says what is wrong.
        where: the worst place.
        expected: what the oracle says there, as text.
        actual: what the implementation said there, as text.
        bound: how far a right result may lie from the oracle's, 0 if no numbers are compared.
    """

    what: str
    where: dict[str, int | str] = field(default_factory=dict[str, "int | str"])
    expected: str | None = None
    actual: str | None = None
    bound: float = 0.0

    @classmethod
    def of(cls, finding: Finding) -> Symptom:
        """Take from a finding what can be compared."""
        f = finding
        return cls(f.what, dict(f.where), f.expected, f.actual, f.bound or 0.0)

    def is_like(self, other: Symptom) -> bool:
        """Say whether both see the same: what, where, and how far off, up to rounding."""
        if (self.what, self.where) != (other.what, other.where):
            return False
        if self.actual == other.actual:
            return True
        numbers = [_number(text) for text in (self.expected, self.actual, other.actual)]
        expected, ours, theirs = numbers
        if expected is None or ours is None or theirs is None:
            return False
        if not (math.isfinite(ours) and math.isfinite(theirs)):
            return math.isnan(ours) and math.isnan(theirs)
        far = abs(ours - expected) if math.isfinite(expected) else abs(ours)
        return abs(ours - theirs) <= self.bound + SHARE * far


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
