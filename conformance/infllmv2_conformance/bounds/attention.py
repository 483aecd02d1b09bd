"""Bounds of stage 5: attention over the selected blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.memory import remembered
from infllmv2_reference import attend_blocks
from infllmv2_reference.attend import causal_mask

from .model import Bounded, Precision, drift, dtype_name, finite, relative, stored
from .softmax import Softmax, dots, grouped, logit_error, query_chunks, ungrouped, weigh

_DIVISION_ROUNDINGS = 4
RESCALED = 2
"""Roundings of an online softmax per block that numerator and denominator do not share."""


@remembered
def attend(
    q: Float[Tensor, "T HQ D"],
    k: Float[Tensor, "S HK D"],
    v: Float[Tensor, "S HK D"],
    selected: Int[Tensor, "HK T K"],
    block_size: int,
    arithmetic: Arithmetic,
    out_dtype: str,
) -> tuple[Bounded, Bounded]:
    """Bound output and LSE of one sequence's attention over the selected blocks.

    Args:
        q: the queries, in the dtype that the implementation saw.
        k: the keys.
        v: the values.
        selected: block indices, then -1.
        block_size: B, tokens of one block.
        arithmetic: what the implementation computes in.
        out_dtype: the name of the dtype that the output is stored in.

    Returns:
        Output `[T, HQ, D]` and LSE `[T, HQ]`. A row with nothing to attend has output 0 and LSE
        -inf with bound 0.
    """
    parts: list[Rows] = []
    for rows in query_chunks(len(q), q.shape[1] * len(k)):
        end = len(k) - len(q) + rows.stop
        part = attend_rows(
            q[rows], k[:end], v[:end], selected[:, rows], block_size, arithmetic, out_dtype
        )
        part.release()
        parts.append(part)
    out, lse = [p.out for p in parts], [p.lse for p in parts]
    return _join(out), _join(lse)


def _join(parts: list[Bounded]) -> Bounded:
    values = torch.cat([ungrouped(p.value) for p in parts])
    return Bounded(values, torch.cat([ungrouped(p.bound) for p in parts]))


@dataclass
class Rows:
    """Hold the bounds of some queries, heads grouped, and the softmax they come from."""

    out: Bounded  # [HK, G, T, D]
    out_rounding: Float[Tensor, "HK G T D"]  # the part of its bound that storing it adds
    lse: Bounded  # [HK, G, T]
    softmax: Softmax | None

    def release(self) -> None:
        """Forget the softmax, which is large."""
        self.softmax = None


def attend_rows(
    q: Float[Tensor, "T HQ D"],
    k: Float[Tensor, "S HK D"],
    v: Float[Tensor, "S HK D"],
    selected: Int[Tensor, "HK T K"],
    block_size: int,
    arithmetic: Arithmetic,
    out_dtype: str,
) -> Rows:
    """Bound output and LSE of some queries, the last of them at the last key."""
    heads, precision = k.shape[1], Precision.of(arithmetic, dtype_name(v))
    rows = grouped(q, heads)
    mask, blocks = attended(len(q), len(k), selected, block_size)
    x = dots(rows, k) * q.shape[-1] ** -0.5
    error = logit_error(rows, k, precision)
    softmax = Softmax(x, error, mask, precision, blocks, rounded=True)
    out, lse = attend_blocks(q.double(), k.double(), v.double(), selected, block_size)
    out, lse = grouped(out, heads), grouped(lse, heads)
    error = _out_error(softmax, v, out)
    off = stored(out, error, out_dtype)
    rounding = finite(off) - error
    off = off.masked_fill(softmax.empty[..., None], 0.0)
    lse_off = stored(softmax.lse, softmax.lse_error, "float32").masked_fill(softmax.empty, 0.0)
    return Rows(Bounded(out, off), rounding, Bounded(lse, lse_off), softmax)


def attended(
    num_queries: int, num_keys: int, selected: Int[Tensor, "HK T K"], block_size: int
) -> tuple[Bool[Tensor, "HK 1 T S"], Float[Tensor, "HK 1 T"]]:
    """Say which tokens every query attends, and count the blocks that hold them."""
    blocks = -(-num_keys // block_size)
    ids = selected.long().where((selected >= 0) & (selected < blocks), blocks)
    member = torch.zeros(*selected.shape[:2], blocks + 1, dtype=torch.bool)
    member = member.scatter(-1, ids, True)[..., :blocks]  # [HK, T, N]
    tokens = member.repeat_interleave(block_size, dim=-1)[..., :num_keys]
    mask = tokens & causal_mask(num_queries, num_keys, selected.device)
    return mask[:, None], member.sum(-1).double()[:, None]


def _out_error(
    s: Softmax, v: Float[Tensor, "S HK D"], out: Float[Tensor, "HK G T D"]
) -> Float[Tensor, "HK G T D"]:
    """Bound the error of the output before it is stored."""
    c, size, values = s.precision, out.abs(), v.double().abs()
    magnitude = weigh(s.p, values)  # sum p|v|
    spread = weigh(s.p * s.relative, values)  # sum p a|v|
    growth = s.lse_error.clamp(max=200.0).exp()[..., None]  # of 1 / denominator
    whole_row = relative(s.common + s.mean_relative.log1p())[..., None]
    shift = growth * (spread + _rounding_error(s, v, size, magnitude, spread)) + whole_row * size
    sums = c.summed(s.count) + drift(RESCALED * s.updates, c.scalar)
    p_growth = math.exp(c.probability + c.factors)
    shift = shift + growth * p_growth * relative(sums)[..., None] * (magnitude + spread)
    return shift + relative(drift(_DIVISION_ROUNDINGS, c.scalar)) * (size + shift)


def _rounding_error(
    s: Softmax,
    v: Float[Tensor, "S HK D"],
    size: Float[Tensor, "HK G T D"],
    magnitude: Float[Tensor, "HK G T D"],
    spread: Float[Tensor, "HK G T D"],
) -> Float[Tensor, "HK G T D"]:
    """Bound the effect of rounding numerators, whether or not the denominator sums rounded ones."""
    c = s.precision
    deviation = torch.minimum(magnitude + size, _deviation(s, v, size))  # >= sum p|v - o|
    reach = torch.maximum(magnitude, deviation) + spread + s.mean_relative[..., None] * size
    lost = weigh(s.mask.double(), v.double().abs()) + s.count[..., None] * size
    return math.expm1(c.probability + c.factors) * reach + c.probability_flush * lost


def _deviation(
    s: Softmax, v: Float[Tensor, "S HK D"], size: Float[Tensor, "HK G T D"]
) -> Float[Tensor, "HK G T D"]:
    """Return the weighted standard deviation of the values, not below its rounding in float64."""
    squares = weigh(s.p, v.double().square())
    return ((squares - size.square()).clamp(min=0.0) + 1e-14 * squares).sqrt()
