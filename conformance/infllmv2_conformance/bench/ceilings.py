"""Measure what the machine can do: copy, multiply matrices, exponentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .counts import Ceilings
from .stats import median
from .watches import Watch

_ROUNDS = 10
_EXPS_PER_ELEMENT = 1024
_EXP_CODE = """
template <typename T> T many_exps(T x) {
    float a = x, b = x + 1.0f;
    #pragma unroll 16
    for (int i = 0; i < STEPS; i++) {
        asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(a) : "f"(-a));
        asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(-b));
    }
    return a + b;
}
""".replace("STEPS", str(_EXPS_PER_ELEMENT // 2))
"""Two chains in registers, so that neither memory nor the latency of one chain is measured."""


def measure_ceilings(watch: Watch, device: torch.device, dtype: str) -> Ceilings:
    """Time a large copy, a large matrix product of random numbers, and many exponentials.

    What cannot be measured here is None: exponentials need a run-time compiler of CUDA code.
    """
    on_cuda = device.type == "cuda"
    size, side, elements = (1 << 30, 8192, 1 << 20) if on_cuda else (1 << 25, 512, 1 << 14)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copy = _rate(watch, 2 * size, lambda: target.copy_(source))
    del source, target
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    matmul = _rate(watch, 2 * side**3, lambda: a @ b)
    x = torch.rand(elements, device=device)
    exp = _cuda_exps(watch, x) if on_cuda else _rate(watch, elements, lambda: x.exp())
    return Ceilings(copy, matmul, exp)


def _cuda_exps(watch: Watch, x: Tensor) -> float | None:
    try:
        create: Any = torch.cuda.jiterator._create_jit_fn  # pyright: ignore[reportPrivateUsage]
        many = create(_EXP_CODE)
        many(x)
    except Exception:
        return None
    return _rate(watch, x.numel() * _EXPS_PER_ELEMENT, lambda: many(x))


def _rate(watch: Watch, amount: int, call: Callable[[], Any]) -> float:
    """Return the median amount per second, after a warm-up."""
    for _ in range(3):
        call()
    return amount / median([watch.time(call)[0].device for _ in range(_ROUNDS)])
