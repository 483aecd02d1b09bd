"""The inputs that the bounds are tried on, what the oracle says of them, and tensor cores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from infllmv2_conformance import bounds
from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_reference import SparseConfig, select_blocks
from infllmv2_reference.attend import causal_mask

DTYPES = ("float16", "bfloat16", "float32")
LOG2E = math.log2(math.e)
Triple = tuple[Tensor, Tensor, Tensor]


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    return q, k, v


def _correlated(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    for x in (q, k, v):
        for t in range(1, len(x)):
            x[t] = 0.97 * x[t - 1] + (1 - 0.97**2) ** 0.5 * x[t]
    return q, k, v


def _indexed(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    tokens = torch.arange(len(k))
    v = torch.zeros_like(v)
    v[tokens, :, tokens % v.shape[-1]] = (1 + (tokens % 7) / 8)[:, None]
    return q * 0.5, k, v


def _signed(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    sign = 1 - 2 * ((torch.arange(len(k)) // 64) % 2)
    return q.abs(), k.abs() * sign[:, None, None], v.abs()


SHAPES = {"short": (40, 40), "long": (3, 6000), "long indexed": (3, 6000)}
"""Query and key tokens, where they are not 24 and 300."""
REGIMES: dict[str, Callable[[Tensor, Tensor, Tensor], Triple]] = {
    "normal": _plain,
    "peaked": lambda q, k, v: (q * 8, k, v),
    "correlated": _correlated,
    "tiny": lambda q, k, v: (q * 1e-4, k * 1e-4, v * 1e-4),
    "huge": lambda q, k, v: (q * 16, k * 16, v * 2000),
    "short": _plain,
    "long": _plain,
    "indexed": _indexed,
    "long indexed": _indexed,
    "signed": _signed,
}


@dataclass(frozen=True)
class Problem:
    """One sequence with everything that the stages need."""

    regime: str
    dtype: str
    lse: str = "approximate"
    products: str = "ieee"
    heads: int = 2
    group: int = 2
    head_dim: int = 64
    block_size: int = 16

    @cached_property
    def config(self) -> SparseConfig:
        blocks = -(-self.shape[1] // self.block_size) if "long" in self.regime else 9
        return SparseConfig(
            block_size=self.block_size,
            kernel_size=8,
            kernel_stride=4,
            window_size=2 * self.block_size,
            topk=blocks - 2 + 1,
            dense_len=-1,
            lse=self.lse,  # pyright: ignore[reportArgumentType]
        )

    @cached_property
    def arithmetic(self) -> Arithmetic:
        wide = "float64" if self.dtype == "float64" else "float32"
        return Arithmetic(wide, self.products, scores=wide)

    @property
    def shape(self) -> tuple[int, int]:
        return SHAPES.get(self.regime, (24, 300))

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v and the gradient of the output."""
        num_queries, num_keys = self.shape
        heads = (self.heads * self.group, self.heads, self.heads)
        generator = torch.Generator().manual_seed(1)
        draws = [torch.randn(num_keys, h, self.head_dim, generator=generator) for h in heads]
        q, k, v = REGIMES[self.regime](*draws)
        g = torch.randn(num_queries, heads[0], self.head_dim, generator=generator)
        kind = getattr(torch, self.dtype)
        return q[num_keys - num_queries :].to(kind), k.to(kind), v.to(kind), g.to(kind)

    @cached_property
    def windows(self) -> tuple[Tensor, Tensor]:
        k, c = self.inputs[1], self.config
        first, _ = bounds.stored_windows(k, c.kernel_size, c.kernel_stride, self.arithmetic)
        second, _ = bounds.stored_windows(
            k, c.lse_kernel_size, c.lse_kernel_stride, self.arithmetic
        )
        return first, second

    @cached_property
    def scores(self) -> Bounded:
        return bounds.scores(
            self.inputs[0], *self.windows, self.shape[1], self.config, self.arithmetic
        )

    @cached_property
    def blocks(self) -> Bounded:
        return bounds.block_scores(self.scores, self.shape[1], self.config)

    @cached_property
    def selected(self) -> Tensor:
        return select_blocks(self.blocks.value, self.shape[1], self.config)

    @cached_property
    def mask(self) -> Tensor:
        """Return which tokens each row attends, `[HQ, T, S]`."""
        ids = torch.arange(self.shape[1]) // self.block_size
        tokens = (self.selected[..., None] == ids).any(2) & causal_mask(*self.shape, ids.device)
        return tokens.repeat_interleave(self.group, 0)

    @cached_property
    def attention(self) -> tuple[Bounded, Bounded]:
        q, k, v, _ = self.inputs
        return bounds.attend(q, k, v, self.selected, self.block_size, self.arithmetic, self.dtype)

    @cached_property
    def gradients(self) -> tuple[Bounded, Bounded, Bounded]:
        q, k, v, g = self.inputs
        return bounds.attend_gradients(
            q, k, v, self.selected, g, self.block_size, self.arithmetic, self.dtype
        )

    def per_head(self, x: Tensor, like: torch.dtype = torch.float32) -> Tensor:
        """Return `[tokens, heads, D]` as `[HQ, tokens, D]`."""
        repeats = self.heads * self.group // x.shape[1]
        return x.to(like).repeat_interleave(repeats, 1).transpose(0, 1)

    def narrow(self, x: Tensor) -> Tensor:
        """Round to the dtype of the inputs and widen again."""
        return x.to(getattr(torch, self.dtype)).to(x.dtype)


def worst(actual: Tensor, expected: Bounded) -> float:
    """Return the largest error over its bound; an infinite bound admits all but NaN."""
    actual = actual.detach().double()
    same = actual == expected.value
    error = (actual - expected.value).abs().masked_fill(same, 0.0)
    ratio = (error / expected.bound).masked_fill(error == 0, 0.0)
    ratio = ratio.masked_fill(expected.bound.isinf() & ~actual.isnan(), 0.0)
    return float(ratio.nan_to_num(nan=math.inf, posinf=math.inf).max()) if ratio.numel() else 0.0


def cut(x: Tensor, digits: int = 24) -> Tensor:
    """Cut float64 numbers to a number of significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**digits).trunc(), exponent - digits)


Matmul = Callable[[Tensor, Tensor], Tensor]


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply in the dtype of the factors."""
    return a @ b


def tfloat32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply after cutting both factors to the 11 bits of tf32."""
    return cut(a.double(), 11).float() @ cut(b.double(), 11).float()


def tensor_core(a: Tensor, b: Tensor, width: int = 8) -> Tensor:
    """Multiply as tensor cores do: `width` products a step, aligned to the largest and cut."""
    a, b = a.double(), b.double()
    acc = torch.zeros(*a.shape[:-1], b.shape[-1]).double()
    for first in range(0, a.shape[-1], width):
        step = slice(first, first + width)
        terms = a[..., step].unsqueeze(-1) * b[..., step, :].unsqueeze(-3)  # [.., M, width, N]
        largest = torch.maximum(terms.abs().amax(-2), acc.abs())
        exponent = torch.frexp(largest)[1] - 24

        def align(x: Tensor, exponent: Tensor) -> Tensor:
            return torch.ldexp(torch.ldexp(x, -exponent).trunc(), exponent)

        total = align(terms, exponent.unsqueeze(-2)).sum(-2) + align(acc, exponent)
        acc = cut(total)
    return acc.float()
