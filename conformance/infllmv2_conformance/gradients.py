"""Gradients of an implementation, and what they must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_reference.layout import Span

from . import bounds
from .bounds import Bounded
from .failure import fail
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
    """Call a function on leaves and send `sent`, or else `output_gradient`, back."""
    leaves = {n: given[n].detach().clone().requires_grad_() for n in ("q", "k", "v")}
    result = trial.candidate.call(function, **(given | leaves))
    trial.split(function, result)
    out = result[0]
    if not out.requires_grad:
        fail("the output is not differentiable, although gradients are claimed")
    try:
        out.backward(output_gradient(trial) if sent is None else sent)
    except RuntimeError as error:
        fail(f"the backward pass raised {type(error).__name__}: {error}")
    dq, dk, dv = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values())
    return dq, dk, dv
