"""How much of their bounds the compared numbers use: a histogram over powers of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NOT_COMPARED = -1.0
"""Stands in a tensor of ratios where the contract defines no result."""
LIMIT = 60
"""Ratios up to `2**-LIMIT` count as 0, those above `2**LIMIT` as infinite."""


class Margins:
    """Count places by the ratio of their error to its bound."""

    def __init__(self) -> None:
        self._counts = torch.zeros(2 * LIMIT + 3, dtype=torch.int64)

    def add(self, ratios: Tensor) -> None:
        """Count the places of one comparison, float64, with `NOT_COMPARED` where there is none."""
        # The exponent of the next smaller float64, and 1: log2 rounded up, in a tenth of its time.
        # Of 0 and of NOT_COMPARED it is far below all others.
        octave = (ratios.double().view(torch.int64) - 1).bitwise_right_shift_(52).sub_(1022)
        places = octave.clamp_(-LIMIT - 1, LIMIT + 1).add_(LIMIT + 1)
        self._counts += torch.bincount(places.flatten(), minlength=2 * LIMIT + 3)
        self._counts[0] -= (ratios < 0).sum()

    def to_json(self) -> dict[str, Any] | None:
        """Return plain data, None if nothing was counted.

        Returns:
            "zero": places that differ by no more than the final rounding; "octaves": places with
            `2**(n-1) < ratio <= 2**n`, by `n`, those above 0 being wrong; "infinite": places with
            NaN, the wrong infinity, or any difference where none is allowed.
        """
        counts: list[int] = self._counts.tolist()
        if not any(counts):
            return None
        octaves = {str(i - LIMIT): n for i, n in enumerate(counts[1:-1]) if n}
        return {"zero": counts[0], "octaves": octaves, "infinite": counts[-1]}
