"""The synthetic inputs of the studies, and what is measured on selections."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

SEED = 0
STRETCH = 256
"""Tokens that share the slow part of a background."""


def generator(*names: object) -> torch.Generator:
    """Return a generator of numbers that depend on `SEED` and `names`, not on earlier draws."""
    text = "/".join(str(name) for name in (SEED, *names))
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def background(
    random: torch.Generator, num_keys: int, heads: int, dim: int, drift: float
) -> Tensor:
    """Return keys `[S, HK, D]`, every number normal with variance 1.

    A share `drift` of the variance is common to stretches of 256 tokens; the rest is white.
    """
    keys = torch.randn(num_keys, heads, dim, generator=random)
    if drift:
        slow = torch.randn(-(-num_keys // STRETCH), heads, dim, generator=random)
        slow = slow.repeat_interleave(STRETCH, dim=0)[:num_keys]
        keys = (1 - drift) ** 0.5 * keys + drift**0.5 * slow
    return keys


def towards(q: Tensor, logit: float) -> Tensor:
    """Return the shortest vector `[D]` that adds `logit` to the logit of every query, `[G, D]`."""
    return torch.linalg.pinv(q).sum(dim=1) * logit * q.shape[1] ** 0.5


def half_of_the_weight(num_keys: int, length: int, scale: float) -> float:
    """Return the logit that gives `length` tokens half the weight of dense softmax attention.

    The logits of the other tokens are normal with standard deviation `scale`; their exponentials
    sum to about `S exp(scale^2 / 2)`.
    """
    total = torch.tensor(num_keys / length, dtype=torch.float64).log() + scale**2 / 2
    return float(total)


def attended_tokens(selected: Tensor, block_size: int, first: int, length: int) -> float:
    """Return which part of the tokens `first .. first + length - 1` one row `[K]` attends."""
    blocks = torch.arange(first, first + length) // block_size
    return float(torch.isin(blocks, selected.long()).double().mean())


def block_weights(q: Tensor, keys: Tensor, block_size: int) -> Tensor:
    """Return the dense softmax weight of every block, the mean over heads: `[N]`.

    Args:
        q: the last token's queries of one group, `[G, D]`.
        keys: `[S, D]`.
        block_size: B, which must divide S.
    """
    weights = (q @ keys.T * q.shape[1] ** -0.5).softmax(dim=-1).mean(dim=0)  # [S]
    return weights.unflatten(0, (-1, block_size)).sum(dim=-1)
