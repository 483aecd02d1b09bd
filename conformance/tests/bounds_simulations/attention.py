"""Attention, honest and faulty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import LOG2E, Matmul, Problem, exact_matmul, tensor_core

_F64 = torch.float64


def flash(
    p: Problem, *, base2: bool, sum_rounded: bool = False, part: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend block by block with a running maximum, in float32; `part` restricts the tokens."""
    mask = p.mask if part is None else p.mask & part
    q, k, v = (p.per_head(x) for x in p.inputs[:3])
    unit, power = p.head_dim**-0.5, torch.exp
    if base2:
        unit, power = unit * LOG2E, torch.exp2
    top = torch.full((*q.shape[:2], 1), -torch.inf)
    total, acc = torch.zeros_like(top), torch.zeros_like(q)
    for first in range(0, k.shape[1], p.block_size):
        tile = slice(first, first + p.block_size)
        x = (q @ k[:, tile].transpose(1, 2)).masked_fill(~mask[..., tile], -torch.inf)
        new = torch.maximum(top, x.amax(-1, keepdim=True))
        base = new.masked_fill(new.isinf(), 0.0)
        weights, rescale = power((x - base) * unit), power((top - base) * unit)
        rounded = p.narrow(weights)
        total = total * rescale + (rounded if sum_rounded else weights).sum(-1, keepdim=True)
        acc, top = acc * rescale + rounded @ v[:, tile], new
    lse = (top * p.head_dim**-0.5 + total.log()).squeeze(-1).T
    out = (acc / total.masked_fill(total == 0, 1.0)).transpose(0, 1)
    out = out if part is not None else out.to(p.inputs[0].dtype)
    return out, lse.masked_fill(~mask.any(-1).T, -torch.inf)


def split(p: Problem, parts: int = 3) -> tuple[Tensor, Tensor]:
    """Attend parts of the keys on their own and merge them by their LSEs, as decoding does."""
    owner = torch.arange(p.shape[1]) * parts // p.shape[1]
    outs, lses = zip(*(flash(p, base2=True, part=owner == i) for i in range(parts)), strict=True)
    lse = torch.stack(lses).logsumexp(0)  # [T, HQ]
    weights = [(part - lse).exp()[..., None] for part in lses]
    out = sum(w * o for w, o in zip(weights, outs, strict=True))
    return torch.as_tensor(out).to(p.inputs[0].dtype), lse


def _logits(p: Problem, matmul: Matmul, like: torch.dtype) -> Tensor:
    q, k = (p.per_head(x, like) for x in p.inputs[:2])
    x = matmul(q, k.transpose(1, 2)).to(like) * p.head_dim**-0.5
    return x.masked_fill(~p.mask, -torch.inf)


def normalised(
    p: Problem, *, matmul: Matmul = exact_matmul, narrow: bool = True
) -> tuple[Tensor, Tensor]:
    """Attend all tokens at once, with normalised probabilities, in float32."""
    x = _logits(p, matmul, torch.float32)
    weights, lse = x.softmax(-1).nan_to_num(nan=0.0), x.logsumexp(-1).T
    weights = p.narrow(weights) if narrow else weights
    out = matmul(weights, p.per_head(p.inputs[2])).transpose(0, 1)
    return out.to(p.inputs[0].dtype), lse


HONEST_ATTEND: dict[str, Callable[[Problem], tuple[Tensor, Tensor]]] = {
    "flash": lambda p: flash(p, base2=True),
    "flash, rounded sum": lambda p: flash(p, base2=False, sum_rounded=True),
    "split": split,
    "normalised": normalised,
    "eager float32": lambda p: normalised(p, narrow=False),
    "tensor core": lambda p: normalised(p, matmul=tensor_core),
}


@dataclass(frozen=True)
class AttendFault:
    """Attention in float64 with one fault."""

    mask: Callable[[Problem], Tensor] = lambda p: p.mask
    scale: float = 1.0
    values: Callable[[Problem, Tensor], Tensor] = lambda p, v: v
    running: torch.dtype | None = None
    lse_factor: float = 1.0

    def __call__(self, p: Problem) -> tuple[Tensor, Tensor]:
        q, k = (p.per_head(x, _F64) for x in p.inputs[:2])
        v = self.values(p, p.per_head(p.inputs[2], _F64))
        mask = self.mask(p)
        x = q @ k.transpose(1, 2) * (p.head_dim**-0.5 * self.scale)
        x = x.masked_fill(~mask, -torch.inf)
        weights = x.softmax(-1).nan_to_num(nan=0.0)
        out = self._running_sum(p, weights, v) if self.running else weights @ v
        lse = x.logsumexp(-1) * self.lse_factor
        return out.transpose(0, 1).to(p.inputs[0].dtype), lse.T.float()

    def _running_sum(self, p: Problem, weights: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros(*weights.shape[:2], v.shape[-1]).double()
        for first in range(0, v.shape[1], 16):
            part = weights[..., first : first + 16] @ v[:, first : first + 16]
            out = (out + part).to(self.running).double()
        return out


def without_block(p: Problem) -> Tensor:
    """Drop each row's second selected block that is not its own."""
    ids = torch.arange(p.shape[1]) // p.block_size
    own = (torch.arange(p.shape[1])[p.shape[1] - p.shape[0] :] // p.block_size)[:, None]
    drop = p.selected[:, :, 1:2].where(p.selected[:, :, 1:2] != own, -1)
    return p.mask & (ids != drop).repeat_interleave(p.group, 0)


def without_token(p: Problem) -> Tensor:
    """Drop the middle one of each row's tokens."""
    place = p.mask.cumsum(-1)
    return p.mask & (place != (p.mask.sum(-1, keepdim=True) + 1) // 2)


def _diagonal(p: Problem, by: int) -> Tensor:
    positions = torch.arange(p.shape[1] - p.shape[0], p.shape[1])[:, None]
    tokens = torch.arange(p.shape[1])
    if by < 0:
        return p.mask & (tokens < positions)
    return p.mask | (tokens == positions + 1)


def _reversed_blocks(p: Problem, v: Tensor) -> Tensor:
    whole = p.shape[1] // p.block_size * p.block_size
    order = torch.arange(p.shape[1])
    order[:whole] = order[:whole].reshape(-1, p.block_size).flip(-1).flatten()
    return v[:, order]


FAULTY_ATTEND: dict[str, Callable[[Problem], tuple[Tensor, Tensor]]] = {
    "a block dropped": AttendFault(mask=without_block),
    "a token dropped": AttendFault(mask=without_token),
    "scale off by 1 %": AttendFault(scale=1.01),
    "values of a block permuted": AttendFault(values=_reversed_blocks),
    "output accumulated in bfloat16": AttendFault(running=torch.bfloat16),
    "LSE in base 2": AttendFault(lse_factor=LOG2E),
    "a token too many on the diagonal": AttendFault(mask=lambda p: _diagonal(p, 1)),
    "a token too few on the diagonal": AttendFault(mask=lambda p: _diagonal(p, -1)),
}
