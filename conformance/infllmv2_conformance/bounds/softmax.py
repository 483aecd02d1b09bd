"""What scoring and attention share: logits, the exponential and the logarithm of the denominator.

Heads are grouped: `[T, HQ, D]` becomes `[HK, G, T, D]`, next to the keys `[S, HK, D]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .model import Precision, drift, relative

ARGUMENT_ROUNDINGS = 9
"""Roundings of an exponent: 3 for `x log2(e) - m log2(e)`, 3 to rescale, 3 to merge splits."""
EXP_ROUNDINGS = 4
"""Error of one exponential in unit roundoffs: `ex2.approx` is good to 2**-22."""
LOG_ROUNDINGS = 8
"""Roundings of `m + log(sum)` in units of its parts: logarithm 4, change of base 3, addition 1."""
RESCALE_ROUNDINGS = EXP_ROUNDINGS + 1
"""Roundings when a running sum moves to a new maximum: an exponential and a product."""
TILE = 16
"""Fewest windows or tokens that a running softmax takes in at once."""
_CHUNK_ELEMENTS = 4_000_000


def query_chunks(num_queries: int, elements_per_query: int) -> Iterator[slice]:
    """Cut the queries into slices of bounded memory; no queries give one empty slice."""
    rows = max(_CHUNK_ELEMENTS // max(elements_per_query, 1), 1)
    for first in range(0, max(num_queries, 1), rows):
        yield slice(first, min(first + rows, num_queries))


def grouped(x: Float[Tensor, "T HQ *D"], num_kv_heads: int) -> Float[Tensor, "HK G T *D"]:
    """Put the heads first, those of one key/value head together, in float64."""
    group = x.shape[1] // num_kv_heads
    return x.double().reshape(len(x), num_kv_heads, group, *x.shape[2:]).movedim(0, 2)


def ungrouped(x: Float[Tensor, "HK G T *D"]) -> Float[Tensor, "T HQ *D"]:
    """Undo `grouped`."""
    return x.movedim(2, 0).flatten(1, 2)


def dots(
    rows: Float[Tensor, "HK G T D"], keys: Float[Tensor, "S HK D"]
) -> Float[Tensor, "HK G T S"]:
    """Return the products of every row with the keys of its head."""
    product = rows.flatten(1, 2) @ keys.double().permute(1, 2, 0)
    return product.reshape(*rows.shape[:3], len(keys))


def weigh(
    weights: Float[Tensor, "HK G T S"], values: Float[Tensor, "S HK D"]
) -> Float[Tensor, "HK G T D"]:
    """Return for every row the sum of its head's values times its weights."""
    total = weights.flatten(1, 2) @ values.double().transpose(0, 1)
    return total.reshape(*weights.shape[:3], values.shape[-1])


def logit_error(
    q: Float[Tensor, "HK G T D"],
    k: Float[Tensor, "S HK D"],
    precision: Precision,
    slack: Float[Tensor, "S HK D"] | None = None,
) -> Float[Tensor, "HK G T S"]:
    """Bound the error of `scale * q . k` when every key may be `slack` off: D products, the scale.

    `scale * (gamma sum |q|(|k| + slack) + sum |q| slack)`; the four further roundings are those of
    the scale, of its product, and of both factors when they are converted.
    """
    head_dim = q.shape[-1]
    exponent = precision.summed(head_dim, more=4) + precision.factors
    sizes = k.double().abs()
    error = dots(q.abs(), sizes if slack is None else sizes + slack) * relative(exponent)
    if slack is not None and bool(slack.any()):
        error = error + dots(q.abs(), slack)
    return error * head_dim**-0.5 + head_dim * precision.flush


def exponent_error(
    x: Float[Tensor, "HK G T S"],
    error: Float[Tensor, "HK G T S"],
    reach: Float[Tensor, "HK G T"],
    precision: Precision,
) -> Float[Tensor, "HK G T S"]:
    """Bound the logarithm of the relative error of `exp(x - y)`, `x` being `error` off.

    `reach` bounds `|y|` and all that a running or split softmax puts in its place.
    """
    size = x.abs() + error + reach[..., None]
    return error + drift(ARGUMENT_ROUNDINGS * size + EXP_ROUNDINGS, precision.scalar)


class Softmax:
    """Hold one softmax per row, over the admitted entries, and the error of each of its parts.

    Args:
        x: exact logits `[HK, G, T, S]`.
        error: bound of their errors.
        mask: which entries take part, `[HK or 1, 1, T, S]`.
        precision: what the implementation computes in.
        updates: how often a running softmax moves to a new maximum, per row.
        rounded: whether the denominator may be a sum of rounded numerators.
    """

    def __init__(
        self,
        x: Float[Tensor, "HK G T S"],
        error: Float[Tensor, "HK G T S"],
        mask: Bool[Tensor, "HK 1 T S"],
        precision: Precision,
        updates: Float[Tensor, "HK 1 T"] | None = None,
        rounded: bool = False,
    ) -> None:
        self.mask, self.precision = mask, precision
        self.count = mask.sum(-1).double()  # [HK, 1, T]
        self.updates = self.count / TILE + 1 if updates is None else updates
        self.empty = self.count == 0
        masked = x.masked_fill(~mask, -torch.inf)
        lse = masked.logsumexp(-1)  # [HK, G, T]
        self.lse = lse.masked_fill(self.empty, 0.0)
        self.p = (masked - self.lse[..., None]).exp()  # [HK, G, T, S]
        log_count = self.count.clamp(min=1).log()
        self.reach = self.lse.abs() + log_count  # at least |max| and |lse|
        self.exponent = exponent_error(x, error, self.reach, precision)
        self.relative = relative(self.exponent)
        self.mean_relative = (self.p * self.relative).sum(-1)  # [HK, G, T]
        self.common = self._common_error(rounded)
        self.lse_error = self.common + self.mean_relative.log1p()
        self.lse_error = self.lse_error + (precision.probability if rounded else 0.0)
        self.lse_error = self.lse_error.masked_fill(self.empty, 0.0)

    def _common_error(self, rounded: bool) -> Float[Tensor, "HK G T"]:
        """Bound what the sum, its rescaling and the logarithm add to the error of the LSE."""
        c = self.precision
        sums = c.summed(self.count) + drift(RESCALE_ROUNDINGS * self.updates, c.scalar)
        lost = self.count * (c.probability_flush if rounded else c.flush)
        lost = lost * (1 + self.mean_relative)  # of a denominator of at least 1 / (1 + that)
        final = drift(LOG_ROUNDINGS * (self.reach + 1), c.scalar)
        return sums + final - (-lost.clamp(max=0.5)).log1p()
