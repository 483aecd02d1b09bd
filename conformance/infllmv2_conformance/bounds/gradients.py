"""Bounds of the gradients of stage 5."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.memory import remembered
from infllmv2_reference import attend_blocks

from .attention import RESCALED, Rows, attend_rows, attended
from .model import FORMATS, Bounded, Precision, drift, dtype_name, finite, relative, stored
from .softmax import dots, grouped, query_chunks, ungrouped, weigh


@remembered
def attend_gradients(
    q: Float[Tensor, "T HQ D"],
    k: Float[Tensor, "S HK D"],
    v: Float[Tensor, "S HK D"],
    selected: Int[Tensor, "HK T K"],
    grad_out: Float[Tensor, "T HQ D"],
    block_size: int,
    arithmetic: Arithmetic,
    out_dtype: str,
) -> tuple[Bounded, Bounded, Bounded]:
    """Bound the gradients of `sum(out * grad_out)` by q, k and v.

    Args:
        q: the queries, in the dtype that the implementation saw.
        k: the keys.
        v: the values.
        selected: block indices, then -1.
        grad_out: the gradient of the output.
        block_size: B, tokens of one block.
        arithmetic: what the implementation computes in.
        out_dtype: the name of the dtype that the output is stored in; the gradients are stored in
            the dtypes of their inputs.

    Returns:
        Gradients of q, k and v with their bounds; both are 0 for tokens that nobody attends.
    """
    dk, dv, dk_heads, dv_heads = (torch.zeros(k.shape, dtype=torch.float64) for _ in range(4))
    dk_off, dv_off, uses = (
        torch.zeros_like(dk),
        torch.zeros_like(dv),
        _uses(q, k, selected, block_size),
    )
    dq: list[Tensor] = []
    dq_off: list[Tensor] = []
    for rows in query_chunks(len(q), 2 * q.shape[1] * len(k)):
        end = len(k) - len(q) + rows.stop
        parts = q[rows], k[:end], v[:end], selected[:, rows], block_size
        g = grad_out[rows]
        values = _values(*parts, g)
        part = _Part(
            attend_rows(*parts, arithmetic, out_dtype), *parts[:3], g, uses[:, :end], arithmetic
        )
        dq.append(values[0])
        dq_off.append(part.dq())
        dk[:end] += values[1]
        dv[:end] += values[2]
        dk_off[:end] += part.dk()
        dv_off[:end] += part.dv()
        if arithmetic.group_sum == "input":
            dk_heads[:end] += part.dk_of_heads()
            dv_heads[:end] += part.dv_of_heads()
    if arithmetic.group_sum == "input":
        group = q.shape[1] // k.shape[1]
        dk_off = dk_off + _rounded_heads(dk_heads + dk_off, group, k)
        dv_off = dv_off + _rounded_heads(dv_heads + dv_off, group, v)
    unused = (uses == 0).T[..., None]
    return (
        _stored(torch.cat(dq), torch.cat(dq_off), q),
        _stored(dk, dk_off.masked_fill(unused, 0.0), k),
        _stored(dv, dv_off.masked_fill(unused, 0.0), v),
    )


def _stored(value: Tensor, error: Tensor, like: Tensor) -> Bounded:
    return Bounded(value, stored(value, error, dtype_name(like)))


def _rounded_heads(size: Tensor, group: int, like: Tensor) -> Tensor:
    """Bound what rounding each of a group's gradients costs; `size` sums their magnitudes."""
    form = FORMATS[dtype_name(like)]
    return size * 2.0**-form.digits + group * form.smallest


def _uses(q: Tensor, k: Tensor, selected: Tensor, block_size: int) -> Float[Tensor, "HK S"]:
    """Count the rows of the group, over all queries and heads, that attend each token."""
    mask, _ = attended(len(q), len(k), selected, block_size)
    return mask[:, 0].sum(1).double() * (q.shape[1] // k.shape[1])


def _values(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, block_size: int, grad_out: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the reference in float64."""
    with torch.enable_grad():
        q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
        out, _ = attend_blocks(q, k, v, selected, block_size)
        return torch.autograd.grad(out, (q, k, v), grad_out.double())


@dataclass
class _Part:
    """Bound the gradients from some queries, the last of them at the last key."""

    rows: Rows
    q: Float[Tensor, "T HQ D"]
    k: Float[Tensor, "S HK D"]
    v: Float[Tensor, "S HK D"]
    grad_out: Float[Tensor, "T HQ D"]
    uses: Float[Tensor, "HK S"]
    arithmetic: Arithmetic

    def __post_init__(self) -> None:
        softmax = self.rows.softmax
        assert softmax is not None
        self.s, self.c = softmax, Precision.of(self.arithmetic, dtype_name(self.v))
        heads = self.k.shape[1]
        self.g, self.queries = grouped(self.grad_out, heads), grouped(self.q, heads)
        lse_off = self.rows.lse.bound[..., None]
        self.p_exponent = self.s.exponent + lse_off  # of P = exp(x - lse)
        self.over_uses = self.c.summed(self.uses, more=4)[:, None, None]  # [HK, 1, 1, S]
        self._score_gradient()

    def _score_gradient(self) -> None:
        """Bound the error of `dS = P * (dP - delta)`: its own, and what a row shares."""
        c, p, g = self.c, self.s.p, self.g
        dims = g.shape[-1]
        sizes = dots(g.abs(), self.v.double().abs())
        product_off = relative(c.summed(dims, more=2) + c.factors) * sizes + dims * c.flush
        product = dots(g, self.v)
        delta = (g * self.rows.out.value).sum(-1, keepdim=True)  # [HK, G, T, 1]
        self.delta_off = self._delta_error(product, sizes, delta)[..., None]
        exponent = self.p_exponent + drift(2, c.scalar) + c.probability  # some use the rounded P
        rel, inner = relative(exponent), product - delta
        own = rel * (inner.abs() + self.delta_off) + (rel + 1) * product_off
        lost = c.probability_flush * (inner.abs() + self.delta_off + product_off) * self.s.mask
        own = own + 2 * c.scalar * (product.abs() + delta.abs())
        self.score_gradient = p * inner
        size = self.score_gradient.abs()
        own, shared = p * own + lost, p * self.delta_off
        total = size + own + shared
        own = (
            own + math.expm1(c.probability + c.factors) * total + c.probability_flush * self.s.mask
        )
        own = own.masked_fill(total > c.probability_largest, torch.inf)
        self.size, self.own, self.shared = size, finite(own), shared

    def _delta_error(
        self,
        product: Float[Tensor, "HK G T S"],
        sizes: Float[Tensor, "HK G T S"],
        delta: Float[Tensor, "HK G T 1"],
    ) -> Float[Tensor, "HK G T"]:
        """Bound the error of `delta = sum dO O`, which is also `sum P dP`.

        What the output loses by inexact probabilities reaches delta through `dP = dO . v`, so it is
        summed over the tokens, not over the channels.
        """
        c, s, g = self.c, self.s, self.g.abs()
        weighted, width = s.p * product.abs(), delta.abs().squeeze(-1)
        plain, spread = weighted.sum(-1), (weighted * s.relative).sum(-1)
        deviation = (s.p * (product - delta).abs()).sum(-1)
        reach = torch.maximum(plain, deviation) + spread + s.mean_relative * width
        lost = (s.mask * product.abs()).sum(-1) + s.count * width
        shift = spread + math.expm1(c.probability + c.factors) * reach + c.probability_flush * lost
        sums = c.summed(s.count) + drift(RESCALED * s.updates, c.scalar) + c.summed(g.shape[-1])
        summed = relative(sums + c.factors) * (s.p * (1 + s.relative) * sizes).sum(-1)
        growth = s.lse_error.clamp(max=200.0).exp()
        shift = growth * (shift + math.exp(c.probability + c.factors) * summed)
        shift = shift + relative(s.common + s.mean_relative.log1p()) * width
        stored_sizes = (g * (self.rows.out.value.abs() + finite(self.rows.out.bound))).sum(-1)
        last = relative(c.summed(g.shape[-1], more=4)) * stored_sizes
        return shift + last + (g * self.rows.out_rounding).sum(-1)

    def dq(self) -> Float[Tensor, "T HQ D"]:
        """Bound `scale * sum over j of dS k`; the error of delta multiplies the mean key."""
        c, s = self.c, self.s
        over_row = relative(c.summed(s.count, more=4) + drift(s.updates, c.scalar))[..., None]
        weights = self.own + over_row * (self.size + self.own + self.shared)
        error = weigh(weights, self.k.double().abs())
        error = error + self.delta_off * weigh(s.p, self.k).abs()
        error = error * self.q.shape[-1] ** -0.5 + c.flush * s.count[..., None]
        return ungrouped(error.masked_fill(s.empty[..., None], 0.0))

    def dk(self) -> Float[Tensor, "S HK D"]:
        """Bound `scale * sum over rows and heads of dS q`."""
        own = self.own + self.shared
        weights = own + relative(self.over_uses) * (self.size + own)
        error = _gather(weights, self.queries.abs()) * self.q.shape[-1] ** -0.5
        return error + self.c.flush * self.uses.T[..., None]

    def dk_of_heads(self) -> Float[Tensor, "S HK D"]:
        """Return the magnitudes of the gradients that each query head sends, summed over heads."""
        return _gather_heads(self.score_gradient, self.queries) * self.q.shape[-1] ** -0.5

    def dv_of_heads(self) -> Float[Tensor, "S HK D"]:
        """Return the magnitudes of the gradients that each query head sends, summed over heads."""
        return _gather_heads(self.s.p, self.g)

    def dv(self) -> Float[Tensor, "S HK D"]:
        """Bound `sum over rows and heads of P grad_out`."""
        c = self.c
        exponent = self.p_exponent + self.over_uses + (c.probability + c.factors)
        weights = self.s.p * relative(exponent) + c.probability_flush * self.s.mask
        return _gather(weights, self.g.abs()) + c.flush * self.uses.T[..., None]


def _gather(
    weights: Float[Tensor, "HK G T S"], rows: Float[Tensor, "HK G T D"]
) -> Float[Tensor, "S HK D"]:
    """Return for every token the sum over the rows of its head, times their weights."""
    total = weights.flatten(1, 2).transpose(1, 2) @ rows.flatten(1, 2)
    return total.transpose(0, 1)


def _gather_heads(
    weights: Float[Tensor, "HK G T S"], rows: Float[Tensor, "HK G T D"]
) -> Float[Tensor, "S HK D"]:
    """Return for every token the magnitude of each head's sum over rows, added over heads."""
    return (weights.transpose(2, 3) @ rows).abs().sum(1).transpose(0, 1)
