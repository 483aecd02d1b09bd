"""The model of arithmetic: formats, roundoffs, and how errors add up.

Relative errors are kept as exponents. A factor `(1 + d)` or `1 / (1 + d)` with `|d| <= u` lies
between `exp(-t)` and `exp(t)` for `t = u / (1 - u)`, so the factors of many operations multiply by
adding their exponents, and a number perturbed by them moves by at most `|x| expm1(sum of t)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infllmv2_conformance.capabilities import Arithmetic

_HUGE = 1e290
"""Stands for 'no bound' where infinity times zero would give NaN."""


@dataclass(frozen=True)
class Bounded:
    """Hold the oracle's value and the largest distance of an honest result from it.

    Args:
        value: float64.
        bound: float64, of the same shape, never negative and never NaN.
    """

    value: Tensor
    bound: Tensor


@dataclass(frozen=True)
class Format:
    """Describe a floating-point format.

    Args:
        digits: significant bits, with the hidden one.
        smallest: largest error of rounding a number near 0: the smallest normal number where
            hardware may flush what lies below; half the smallest subnormal one in float16, whose
            subnormal numbers no hardware in use flushes.
        largest: the largest finite number.
    """

    digits: int
    smallest: float
    largest: float


FORMATS = {
    "float16": Format(11, 2.0**-25, 65504.0),
    "bfloat16": Format(8, 2.0**-126, float(torch.finfo(torch.bfloat16).max)),
    "tfloat32": Format(11, 2.0**-126, float(torch.finfo(torch.float32).max)),
    "float32": Format(24, 2.0**-126, float(torch.finfo(torch.float32).max)),
    "float64": Format(53, 2.0**-1022, float(torch.finfo(torch.float64).max)),
}


def unit_roundoff(dtype_name: str) -> float:
    """Return `u = 2**-p` for `p` significant bits: half the distance from 1 to the next number.

    >>> [unit_roundoff(name) for name in ("bfloat16", "float16")] == [2**-8, 2**-11]
    True
    """
    return 2.0 ** -FORMATS[dtype_name].digits


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, as `Capabilities` spells it."""
    return str(tensor.dtype).removeprefix("torch.")


def drift(steps: Tensor | float, unit: float) -> Tensor:
    """Return the exponent that covers `steps` factors `(1 + d)` or `1 / (1 + d)`, `|d| <= unit`."""
    return torch.as_tensor(steps, dtype=torch.float64) * (unit / (1 - unit))


def relative(exponent: Tensor) -> Tensor:
    """Return `exp(exponent) - 1`, kept finite."""
    return exponent.clamp(max=600.0).expm1()


def sum_steps(terms: Tensor | float) -> Tensor:
    """Return the roundings in a sum of `terms` products, in any order.

    Each product and each addition rounds once. A tensor core adds at least four products to its
    accumulator at once, and cuts each of the five summands: five roundings for four terms.
    """
    count = torch.as_tensor(terms, dtype=torch.float64)
    return count + (count / 4).ceil() + 1


@dataclass(frozen=True)
class Precision:
    """Hold what an `Arithmetic` means for one kind of input.

    Args:
        scalar: error of one operation rounded to nearest.
        step: error of one operation inside a sum; tensor cores cut bits off, so twice `scalar`.
        flush: absolute error of one operation near 0.
        factors: exponent of the rounding of both factors of a product (tf32), or 0.
        probability: exponent of rounding a softmax numerator before it multiplies values.
        probability_flush: absolute error of that rounding near 0.
        probability_largest: the largest number of that format.
    """

    scalar: float
    step: float
    flush: float
    factors: float
    probability: float
    probability_flush: float
    probability_largest: float

    @classmethod
    def of(cls, arithmetic: Arithmetic, name: str) -> Precision:
        """Return the precision for inputs of the dtype `name`."""
        sums = max(FORMATS[arithmetic.accumulate], FORMATS[name], key=lambda f: f.digits)
        u = 2.0**-sums.digits
        rounds_factors = arithmetic.products == "tf32" and name == "float32"
        p_name = name if arithmetic.probabilities == "input" else arithmetic.probabilities
        p = FORMATS[p_name]
        p_unit = 2.0**-p.digits
        return cls(
            scalar=u,
            step=2 * u,
            flush=sums.smallest,
            factors=float(drift(2, 2 * unit_roundoff("tfloat32"))) if rounds_factors else 0.0,
            probability=float(drift(1, p_unit)) if p_unit > u else 0.0,
            probability_flush=p.smallest + sums.smallest,
            probability_largest=p.largest,
        )

    def summed(self, terms: Tensor | float, more: Tensor | float = 0.0) -> Tensor:
        """Return the exponent of a sum of `terms` products and of `more` further operations."""
        return drift(sum_steps(terms) + more, self.step)


def rounding(size: Tensor, name: str) -> Tensor:
    """Return the most that storing a number of this size in the dtype `name` may move it."""
    target = FORMATS[name]
    return torch.maximum(size * 2.0**-target.digits, size.clamp(max=target.smallest))


def stored(value: Tensor, error: Tensor, name: str) -> Tensor:
    """Return the error after rounding to the dtype `name` a number that is `error` off `value`.

    Rounding moves a number `x` by at most `u|x|`, near 0 by the format's `smallest`, and never by
    more than `|x|`. Where `x` may be too large for the format there is no bound.
    """
    size = value.abs() + error
    total = (error + rounding(size, name)).nan_to_num(nan=math.inf, posinf=math.inf)
    return total.masked_fill(~(size + rounding(size, name) <= FORMATS[name].largest), math.inf)


def finite(bound: Tensor) -> Tensor:
    """Replace infinite bounds by numbers that zero can multiply."""
    return bound.clamp(max=_HUGE)
