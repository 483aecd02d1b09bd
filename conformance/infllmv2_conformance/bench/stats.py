"""Medians, quartiles, and the exponent of a power law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Say how long the rounds took, in seconds.

    Args:
        median: half of the rounds took no longer.
        iqr: from the first quartile to the third.
        min: the fastest round.
        mean: of all rounds.
        rounds: all of them, in the order they were run.
    """

    median: float
    iqr: float
    min: float
    mean: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Summary:
        """Summarise at least one round."""
        low, middle, high = np.percentile(rounds, (25, 50, 75)).tolist()
        return cls(middle, high - low, min(rounds), float(np.mean(rounds)), tuple(rounds))


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(np.median(values))


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Fit `seconds ~ length ** e` to (length, seconds) and return `e`; None for fewer than two.

    >>> exponent([(1.0, 3.0), (2.0, 12.0), (4.0, 48.0)])
    2.0
    """
    if len({x for x, _ in points}) < 2:
        return None
    xs, ys = (np.log([p[i] for p in points]) for i in (0, 1))
    slope = np.polyfit(xs, ys, 1)[0]
    return round(float(slope), 3) if math.isfinite(slope) else None
