"""The backward pass, honest and faulty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import without_block, without_token
from .problem import Matmul, Problem, Triple, exact_matmul, tensor_core

_F64 = torch.float64


@dataclass(frozen=True)
class Backward:
    """The backward pass as kernels write it; the last fields are faults."""

    like: torch.dtype = torch.float32
    matmul: Matmul = exact_matmul
    round_out: bool = True
    narrow: bool = True
    scale_dq: bool = True
    lost_head: bool = False
    delta: bool = True
    mask: Callable[[Problem], Tensor] = lambda p: p.mask

    def __call__(self, p: Problem) -> Triple:
        q, k, v, g = (p.per_head(x, self.like) for x in p.inputs)
        scale, mm, mask = p.head_dim**-0.5, self.matmul, self.mask(p)
        x = (mm(q, k.transpose(1, 2)).to(self.like) * scale).masked_fill(~mask, -torch.inf)
        lse = x.logsumexp(-1, keepdim=True)
        weights = (x - lse.masked_fill(lse.isinf(), 0.0)).exp()
        low = p.narrow if self.narrow else lambda x: x
        out = mm(low(weights), v).to(self.like)
        out = p.narrow(out) if self.round_out else out
        delta = (g * out).sum(-1, keepdim=True) * self.delta
        ds = low(weights * (mm(g, v.transpose(1, 2)).to(self.like) - delta))
        dq = mm(ds, k) * (scale if self.scale_dq else 1.0)
        dk, dv = mm(ds.transpose(1, 2), q) * scale, mm(low(weights).transpose(1, 2), g)
        return self._store(p, dq, 1), self._store(p, dk, p.group), self._store(p, dv, p.group)

    def _store(self, p: Problem, x: Tensor, group: int) -> Tensor:
        per_kv_head = x.to(self.like).reshape(-1, group, *x.shape[1:])
        if self.lost_head and group > 1:
            per_kv_head = per_kv_head[:, :-1]
        return per_kv_head.sum(1).transpose(0, 1).to(p.inputs[0].dtype)


HONEST_GRADIENTS: dict[str, Callable[[Problem], Triple]] = {
    "flash": Backward(),
    "output not rounded": Backward(round_out=False),
    "eager float32": Backward(narrow=False),
    "tensor core": Backward(matmul=tensor_core),
}
FAULTY_GRADIENTS: dict[str, Callable[[Problem], Triple]] = {
    "dQ without the scale": Backward(_F64, narrow=False, scale_dq=False),
    "dK and dV without one head": Backward(_F64, narrow=False, lost_head=True),
    "no rowsum(dO * O)": Backward(_F64, narrow=False, delta=False),
    "a block dropped": Backward(_F64, narrow=False, mask=without_block),
    "a token dropped": Backward(_F64, narrow=False, mask=without_token),
}
