"""What a call returned: plain tensors in memory of their own, and copies that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .failure import fail
from .guards import extent

NAMES = {
    "compress_keys": ("windows", "cu_seqlens_c"),
    "score_windows": ("scores",),
    "pool_blocks": ("block_scores",),
    "select_blocks": ("selected",),
    "score_blocks": ("block_scores",),
    "select": ("selected",),
    "attend": ("out", "lse"),
    "attention": ("out", "lse", "selected"),
    "decode": ("out", "lse", "selected"),
    "cached_windows": ("k_c1", "cu_seqlens_c1", "k_c2", "cu_seqlens_c2"),
}
"""What each function returns."""


def take(function: str, result: Any, lent: Mapping[str, Tensor]) -> Any:
    """Check the memory of a result, and return a copy that nobody else can reach.

    Args:
        function: the contract function.
        result: what it returned; what is no tensor is returned as it is.
        lent: the memory of each argument, red zones included.

    Raises:
        ConformanceFailure: a tensor is of another type, shares memory, or wants gradients.
    """
    if function not in NAMES:
        return result
    alone = not isinstance(result, tuple)
    parts: tuple[Any, ...] = (result,) if alone else result
    named = {n: x for n, x in zip(NAMES[function], parts, strict=False) if isinstance(x, Tensor)}
    for name, x in named.items():
        check_plain(name, x)
        check_own_memory(name, x, lent)
        if x.requires_grad:
            fail(f"the result {name} requires a gradient, although no argument does")
    for (name, x), (other, y) in combinations(named.items(), 2):
        if overlap(x, y):
            fail(f"the results {name} and {other} share memory")
    copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in parts)
    return copies[0] if alone else copies


def check_plain(name: str, x: Tensor) -> None:
    """Fail unless `x` is a `torch.Tensor` itself, dense, and holds the numbers that it shows."""
    if type(x) is not Tensor:
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        fail(f"the result {name} is not a plain torch.Tensor", actual=kind)
    if x.layout != torch.strided or x.is_quantized:
        fail(f"the result {name} is not a dense tensor", actual=f"{x.layout}, {x.dtype}")
    if x.is_neg() or x.is_conj():
        fail(f"the result {name} is a lazy view: call resolve_neg or resolve_conj")


def check_own_memory(name: str, x: Tensor, others: Mapping[str, Tensor]) -> None:
    """Fail if elements of `x` share memory with one another or with one of `others`."""
    if any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True)):
        fail(
            f"elements of the result {name} share memory",
            expected="one place for each element",
            actual=f"shape {list(x.shape)} with strides {list(x.stride())}",
        )
    for other, y in others.items():
        if overlap(x, y):
            fail(f"the result {name} shares memory with the argument {other}")


def overlap(x: Tensor, y: Tensor) -> bool:
    """Say whether two dense tensors have a byte in common."""
    if x.device != y.device or not x.numel() or not y.numel() or x.device.type == "meta":
        return False
    (a, b), (c, d) = _bytes(x), _bytes(y)
    if b <= c or d <= a:
        return False
    return bool(torch.isin(_addresses(x), _addresses(y)).any())


def _bytes(x: Tensor) -> tuple[int, int]:
    """Return the address of the first byte, and the one behind the last."""
    start = x.data_ptr()
    return start, start + extent(x.shape, x.stride()) * x.element_size()


def _addresses(x: Tensor) -> Tensor:
    """Return the address of every byte."""
    at = torch.arange(x.element_size()) + x.data_ptr()
    for n, stride in zip(x.shape, x.stride(), strict=True):
        at = (at[:, None] + torch.arange(n) * (stride * x.element_size())).flatten()
    return at
