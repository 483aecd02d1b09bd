"""Dense causal attention of PyTorch, forced to one backend: what a sparse kernel must beat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from infllmv2_conformance.capabilities import Arithmetic

from .backward import differentiate, sites_within
from .counts import count
from .field import Field
from .sampled import DENSE_REACH, RowOracle, Worst
from .tasks import Task, require_tensor

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
DENSE = {"cuda": ("cudnn", "flash"), "cpu": ("flash", "math")}
"""By device type, what is timed unless other baselines are asked for."""


def dense_task(name: str, field: Field) -> Callable[[], Task]:
    """Return how to prepare dense attention by a backend, in the direction of the workload."""
    if field.workload.task == "backward":
        return partial(_backward, name, field)
    return partial(_forward, name, field)


def _forward(name: str, field: Field) -> Task:
    q, k, v = _by_head(field, field.tensors.q, field.tensors.k, field.tensors.v)
    sites = sites_within(field, DENSE_REACH)

    def sample(result: Any) -> list[Tensor]:
        out = require_tensor("out", result, tuple(q.shape), (q.dtype,))
        packed = out.transpose(1, 2).flatten(0, 1)  # [batch * T, HQ, D]
        return [packed[site.row].cpu() for site in sites]

    def judge(kept: list[Tensor]) -> float:
        worst, oracle = Worst(), _oracle(field)
        for site, out in zip(sites, kept, strict=True):
            oracle.check_output(out, None, site, None, worst)
        return worst.ratio

    call = partial(_attend, name, q, k, v, field.workload.task != "decode")
    return Task(name, "dense", call, sample, judge, count("dense", field.workload))


def _backward(name: str, field: Field) -> Task:
    t = field.tensors
    leaves = tuple(x.detach().requires_grad_() for x in (t.q, t.k, t.v))
    out = _attend(name, *_by_head(field, *leaves), causal=True)
    call = differentiate(field, out.transpose(1, 2).flatten(0, 1), leaves)
    sites = sites_within(field, DENSE_REACH)

    def sample(result: Any) -> list[Tensor]:
        return [result[0][site.row].cpu() for site in sites]

    def judge(kept: list[Tensor]) -> float:
        assert field.gradient is not None
        worst, oracle = Worst(), _oracle(field)
        for site, dq in zip(sites, kept, strict=True):
            oracle.check_query_gradient(dq, site, None, field.gradient[site.row], worst)
        return worst.ratio

    work = count("dense.backward", field.workload)
    return Task(name, "dense.backward", call, sample, judge, work, replayable=False)


def _oracle(field: Field) -> RowOracle:
    return RowOracle(field.workload, field.tensors, Arithmetic())


def _by_head(field: Field, *packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """View packed `[batch * T, H, D]` as `[batch, H, T, D]`."""
    batch = field.workload.batch
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in packed)
    return q, k, v


def _attend(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel([BACKENDS[name]]):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
