"""The tasks of a backward: autograd of what claims to be differentiable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.candidate import Candidate

from .field import Field
from .sampled import LAST_ROWS, Site, Worst
from .stages import Maker
from .tasks import NotRun, Task, make_task, require_tensor, require_tuple

Gradients = tuple[Tensor, Tensor, Tensor]


def _backward(candidate: Candidate, field: Field, function: str) -> Task:
    """Return the task of one backward; its forward runs here, once."""
    given = dict(field.attending)
    if function == "attention":
        if not candidate.capabilities.returns_selection:
            raise NotRun("without its selection the gradients cannot be judged")
        del given["selected"], given["block_size"]
        given["config"] = field.config
    leaves = {name: given[name].detach().requires_grad_() for name in ("q", "k", "v")}
    result = candidate.call_unguarded(function, **(given | leaves))
    out = require_tensor("out", result[0], tuple(field.tensors.q.shape))
    if not out.requires_grad:
        raise NotRun("the output is not differentiable, although gradients are claimed")
    selected = field.selected if function == "attend" else result[2]
    call = differentiate(field, out, tuple(leaves.values()))
    kept = _Kept(candidate, field, selected)
    return make_task(
        candidate,
        field,
        f"{function}.backward",
        call,
        kept.sample,
        kept.judge,
        replayable=False,
        before=partial(kept.judge_everywhere, call),
    )


def differentiate(
    field: Field, out: Tensor, leaves: tuple[Tensor, ...]
) -> Callable[..., Gradients]:
    """Return a call that sends a gradient back through `out`, again and again."""

    def call(gradient: Tensor | None = None) -> Gradients:
        gradient = field.gradient if gradient is None else gradient
        return torch.autograd.grad(out, leaves, gradient, retain_graph=True)  # type: ignore[return-value]

    return call


class _Kept:
    """Sample and judge the gradients of one backward."""

    def __init__(self, candidate: Candidate, field: Field, selected: Tensor) -> None:
        self.candidate, self.field, self.selected = candidate, field, selected
        self.rows = min(LAST_ROWS, field.workload.length)

    def sample(self, result: Any) -> tuple[Gradients, list[Tensor]]:
        """Copy the gradients of the last rows and tokens, and those of the sites' queries."""
        self._require(result)
        last = tuple(x[-self.rows :].cpu() for x in result)
        return last, [result[0][site.row].cpu() for site in self.field.sites]  # type: ignore[return-value]

    def judge(self, kept: tuple[Gradients, list[Tensor]]) -> float:
        """Judge what was sampled: no other row attends the last tokens, so they are known."""
        worst, oracle = Worst(), self.field.oracle(self.candidate)
        gradient = self._gradient()
        oracle.check_gradients(kept[0], self._last(), gradient[-self.rows :], worst, False)
        for site, dq in zip(self.field.sites, kept[1], strict=True):
            blocks = self.selected[:, site.row].cpu()
            oracle.check_query_gradient(dq, site, blocks, gradient[site.row], worst)
        return worst.ratio

    def judge_everywhere(self, call: Callable[..., Gradients]) -> float:
        """Judge the gradients of all keys and values, if only the last rows send anything back."""
        gradient = self._gradient().clone()
        gradient[: -self.rows] = 0
        result = call(gradient)
        self._require(result)
        worst, oracle = Worst(), self.field.oracle(self.candidate)
        oracle.check_gradients(result, self._last(), gradient[-self.rows :], worst, True)
        return worst.ratio

    def _require(self, result: Any) -> None:
        t = self.field.tensors
        for name, x, like in zip("qkv", require_tuple(result, 3), (t.q, t.k, t.v), strict=True):
            require_tensor(f"gradient of {name}", x, tuple(like.shape), (like.dtype,))

    def _gradient(self) -> Tensor:
        assert self.field.gradient is not None
        return self.field.gradient

    def _last(self) -> Tensor:
        return self.selected[:, -self.rows :].cpu()


BACKWARDS: dict[str, Maker] = {
    "attend.backward": partial(_backward, function="attend"),
    "attention.backward": partial(_backward, function="attention"),
}
"""How to prepare each backward."""


def sites_within(field: Field, reach: int) -> list[Site]:
    """Return the sites whose dense oracle is affordable, at least one."""
    return [site for site in field.sites if site.position < reach] or field.sites[:1]
