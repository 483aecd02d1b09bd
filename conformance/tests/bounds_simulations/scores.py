"""Windows and scores, honest and faulty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infllmv2_reference.score import visible_windows

from .problem import LOG2E, Matmul, Problem, cut, exact_matmul, tensor_core


def _spans(p: Problem, like: torch.dtype = torch.float64) -> Tensor:
    return p.inputs[1].to(like).unfold(0, p.config.kernel_size, p.config.kernel_stride)


def _running_mean(p: Problem, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    windows, total = _spans(p), torch.zeros(())
    for i in range(windows.shape[-1]):
        total = rounded(total + windows[..., i])
    return total / windows.shape[-1]


def _to_low(p: Problem, x: Tensor) -> Tensor:
    low = torch.float16 if p.dtype == "float16" else torch.bfloat16
    return x.to(low).double()


HONEST_WINDOWS: dict[str, Callable[[Problem], Tensor]] = {
    "mean": lambda p: p.narrow(_spans(p, torch.float32).mean(-1)),
    "scaled first": lambda p: p.narrow((_spans(p, torch.float32) * (1 / 8)).sum(-1)),
    "cut": lambda p: p.narrow(_running_mean(p, cut)),
}
FAULTY_WINDOWS: dict[str, Callable[[Problem], Tensor]] = {
    "sum in low precision": lambda p: p.narrow(_running_mean(p, lambda x: _to_low(p, x))),
    "a token too few": lambda p: p.narrow(_spans(p)[..., :-1].mean(-1)),
    "scale off by 1 %": lambda p: p.narrow(_spans(p).mean(-1) * 1.01),
}


_F64 = torch.float64


@dataclass(frozen=True)
class ScoreVariant:
    """Scores, computed in some way; every field after the first three is a fault."""

    like: torch.dtype = torch.float32
    matmul: Matmul = exact_matmul
    base2: bool = False
    scale: float = 1.0
    lse_factor: float = 1.0
    combine: str = "sum"
    heads_as: torch.dtype | None = None
    shift: int = 0

    def __call__(self, p: Problem) -> Tensor:
        q, c = p.per_head(p.inputs[0], self.like), p.config
        k1, k2 = (p.per_head(w, self.like) for w in p.windows)
        scale = p.head_dim**-0.5 * self.scale
        x1, x2 = (self.matmul(q, k.transpose(1, 2)).to(self.like) for k in (k1, k2))
        seen = visible_windows(*p.shape, c.kernel_size, c.kernel_stride)
        usable = seen
        if c.lse == "approximate":
            usable = visible_windows(*p.shape, c.lse_kernel_size, c.lse_kernel_stride)
        dead = ~usable.any(-1)[None, :, None]
        if self.shift:
            count = (usable.sum(-1, keepdim=True) + self.shift).clamp(min=1)
            usable = torch.arange(usable.shape[1]) < count
        per_head = self._exponentials(x1, x1 if c.lse == "exact" else x2, scale, usable)
        per_head = per_head.masked_fill(dead, 0.0).reshape(p.heads, p.group, *per_head.shape[1:])
        if self.heads_as:
            per_head = per_head.to(self.heads_as).to(self.like)
        total = per_head.sum(1) if self.combine == "sum" else per_head.amax(1)
        return total.masked_fill(~seen, -torch.inf)

    def _exponentials(self, x1: Tensor, x: Tensor, scale: float, usable: Tensor) -> Tensor:
        unit = scale * LOG2E if self.base2 else scale
        power = torch.exp2 if self.base2 else torch.exp
        top = (x * unit).masked_fill(~usable, -torch.inf).amax(-1, keepdim=True)
        top = top.masked_fill(top.isinf(), 0.0)
        total = power((x * unit - top).masked_fill(~usable, -torch.inf)).sum(-1, keepdim=True)
        lse = (top + (total.log2() if self.base2 else total.log())) * self.lse_factor
        return power(x1 * unit - lse)


HONEST_SCORES: dict[str, Callable[[Problem], Tensor]] = {
    "eager": ScoreVariant(),
    "base 2": ScoreVariant(base2=True),
    "tensor core": ScoreVariant(matmul=tensor_core, base2=True),
}
FAULTY_SCORES: dict[str, Callable[[Problem], Tensor]] = {
    "scale off by 1 %": ScoreVariant(_F64, scale=1.01),
    "LSE in base 2": ScoreVariant(_F64, lse_factor=LOG2E),
    "max instead of sum over the group": ScoreVariant(_F64, combine="max"),
    "heads in bfloat16 before the group sum": ScoreVariant(_F64, heads_as=torch.bfloat16),
    "normaliser sees a window too few": ScoreVariant(_F64, shift=-1),
    "normaliser sees a window too many": ScoreVariant(_F64, shift=1),
}
