"""Stage 7: keep K_C1 and K_C2 up to date while tokens arrive, and decode from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .attend import attend_blocks, attend_dense
from .compress import compress_keys
from .config import SparseConfig
from .geometry import num_windows
from .pipeline import Attention, check_selection_inputs, select_by_windows


@dataclass(frozen=True)
class Cache:
    """Hold the keys and values of one sequence and the windows that they complete.

    Args:
        keys: `[S, HK, D]`, what is attended.
        values: `[S, HK, D]`.
        selection_keys: `[S, HK, D]`, what is compressed; equal to `keys` without `use_nope`.
        k_c1: `[C, HK, D]`, the complete windows of (l1, s1).
        k_c2: `[C2, HK, D]`, the complete windows of (l2, s2).
    """

    keys: Float[Tensor, "S HK D"]
    values: Float[Tensor, "S HK D"]
    selection_keys: Float[Tensor, "S HK D"]
    k_c1: Float[Tensor, "C HK D"]
    k_c2: Float[Tensor, "C2 HK D"]


def empty_cache(
    num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Cache:
    """Return the cache of a sequence without tokens."""
    nothing = torch.empty(0, num_kv_heads, head_dim, dtype=dtype, device=device)
    return Cache(nothing, nothing, nothing, nothing, nothing)


def append_tokens(
    cache: Cache,
    k: Float[Tensor, "T HK D"],
    v: Float[Tensor, "T HK D"],
    config: SparseConfig,
    selection_k: Float[Tensor, "T HK D"] | None = None,
) -> Cache:
    """Return the cache with more tokens, and with exactly the windows that they complete.

    One token completes at most one window of each kind, many tokens may complete several, and a
    window that is complete never changes.

    Args:
        cache: what came before; it is not modified.
        k: the keys of the new tokens.
        v: the values of the new tokens.
        config: the window lengths and strides.
        selection_k: what is compressed in place of `k`, exactly if `config.use_nope`.

    Returns:
        A new cache.

    Raises:
        ValueError: `selection_k` is given without `use_nope`, or missing with it.

    Source: Eq. 4, one window at a time.
    """
    check_selection_inputs(config, selection_k=selection_k)
    selection_keys = torch.cat([cache.selection_keys, k if selection_k is None else selection_k])
    size, stride = config.kernel_size, config.kernel_stride
    lse_size, lse_stride = config.lse_kernel_size, config.lse_kernel_stride
    return Cache(
        keys=torch.cat([cache.keys, k]),
        values=torch.cat([cache.values, v]),
        selection_keys=selection_keys,
        k_c1=_append_windows(cache.k_c1, selection_keys, size, stride),
        k_c2=_append_windows(cache.k_c2, selection_keys, lse_size, lse_stride),
    )


def truncate(cache: Cache, num_keys: int, config: SparseConfig) -> Cache:
    """Return the cache of the first `num_keys` tokens: windows that end later are dropped.

    Raises:
        ValueError: the cache has fewer tokens, or `num_keys` is negative.
    """
    if not 0 <= num_keys <= len(cache.keys):
        raise ValueError(f"num_keys must be in 0..{len(cache.keys)}, but it is {num_keys}")
    num_c1 = num_windows(num_keys, config.kernel_size, config.kernel_stride)
    num_c2 = num_windows(num_keys, config.lse_kernel_size, config.lse_kernel_stride)
    return replace(
        cache,
        keys=cache.keys[:num_keys],
        values=cache.values[:num_keys],
        selection_keys=cache.selection_keys[:num_keys],
        k_c1=cache.k_c1[:num_c1],
        k_c2=cache.k_c2[:num_c2],
    )


def decode(
    cache: Cache,
    q: Float[Tensor, "T HQ D"],
    config: SparseConfig,
    selection_q: Float[Tensor, "T HQ D"] | None = None,
) -> Attention:
    """Attend from the queries of the last T tokens of the cache.

    The result is that of `attention` over the same keys and values: it does not depend on how the
    tokens arrived (chunk invariance), as long as the switch decides alike (decision D8).

    Args:
        cache: all tokens so far, those of the queries included.
        q: the queries of the last T tokens.
        config: every parameter of the attention.
        selection_q: what selects in place of `q` (un-rotated), exactly if `config.use_nope`.

    Returns:
        Output, LSE and selection, as `attention` does.

    Raises:
        ValueError: `selection_q` is given without `use_nope`, or missing with it.

    Source: Fig. 2 and Sec. 3.3, with the windows of the cache; the switch is decision D8.
    """
    check_selection_inputs(config, selection_q=selection_q)
    if not config.is_sparse(len(cache.keys)):
        return Attention(*attend_dense(q, cache.keys, cache.values), selected=None)
    selection_q = q if selection_q is None else selection_q
    selected = select_by_windows(selection_q, cache.k_c1, cache.k_c2, len(cache.keys), config)
    out, lse = attend_blocks(q, cache.keys, cache.values, selected, config.block_size)
    return Attention(out, lse, selected)


def _append_windows(
    windows: Float[Tensor, "C HK D"],
    keys: Float[Tensor, "S HK D"],
    kernel_size: int,
    kernel_stride: int,
) -> Float[Tensor, "C1 HK D"]:
    """Add the windows that have become complete, reading only the keys that they cover."""
    first_new = len(windows) * kernel_stride
    return torch.cat([windows, compress_keys(keys[first_new:], kernel_size, kernel_stride)])
