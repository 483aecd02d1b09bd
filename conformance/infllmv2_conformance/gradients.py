"""Gradients of an implementation, and what they must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_reference.layout import Span

from . import bounds
from .bounds import Bounded
from .failure import fail
from .guards import Loan
from .returned import check_plain
from .trial import Trial

Gradients = tuple[Tensor, Tensor, Tensor]


def expected_gradients(trial: Trial, span: Span, selected: Tensor) -> tuple[Bounded, ...]:
    """Return the oracle's dq, dk and dv for the output gradient of `output_gradient`."""
    inputs = trial.inputs
    return bounds.attend_gradients(
        inputs.q[span.queries].cpu(),
        inputs.k[span.keys].cpu(),
        inputs.v[span.keys].cpu(),
        selected,
        output_gradient(trial)[span.queries].cpu(),
        trial.case.block_size,
        trial.capabilities.arithmetic,
        trial.case.dtype,
    )


def output_gradient(trial: Trial) -> Tensor:
    """Return the gradient of the output that is sent back, `[total_q, HQ, D]`."""
    generator = torch.Generator().manual_seed(trial.case.seed + 5)
    q = trial.inputs.q
    return torch.randn(q.shape, generator=generator).to(q.dtype).to(q.device)


def differentiate(
    trial: Trial, function: str, given: dict[str, Any], sent: Tensor | None = None
) -> Gradients:
    """Call a function on leaves and send a gradient back through its output.

    Arguments and the gradient lie between red zones until the backward pass is over, too, unless
    `sent` is given: the tensors of a long context are too large to be copied.

    Args:
        trial: the case and the implementation.
        function: `attend` or `attention`.
        given: its arguments.
        sent: what to send back, `[total_q, HQ, D]`; `output_gradient` unless given.
    """
    candidate = trial.candidate
    loan = Loan(
        given | {"grad_out": output_gradient(trial)} if sent is None else {},
        candidate.surroundings.zones,
    )
    lent = loan.arguments if sent is None else given | {"grad_out": sent}
    grad_out = lent.pop("grad_out")
    lent |= {name: lent[name].detach().requires_grad_() for name in ("q", "k", "v")}
    leaves = [lent[name] for name in ("q", "k", "v")]
    constant = [name for name in ("selection_q", "selection_k") if lent.get(name) is not None]
    lent |= {name: lent[name].detach().requires_grad_() for name in constant}
    result = candidate.call_on(function, **lent)
    trial.split(function, result)
    out = result[0]
    if not out.requires_grad:
        fail("the output is not differentiable, although gradients are claimed")
    candidate.guarded(f"the backward pass of {function}", lambda: out.backward(grad_out))
    loan.check()
    for name in constant:
        grad = lent[name].grad
        if grad is not None and grad.any():
            fail(f"{name} has a gradient, but the selection is a constant")
    gradients = [_gradient(name, x) for name, x in zip("qkv", leaves, strict=True)]
    return gradients[0], gradients[1], gradients[2]


def _gradient(name: str, leaf: Tensor) -> Tensor:
    """Return a copy of what arrived at a leaf; nothing is 0."""
    if leaf.grad is None:
        return torch.zeros_like(leaf)
    check_plain(f"gradient of {name}", leaf.grad)
    return leaf.grad.clone()
