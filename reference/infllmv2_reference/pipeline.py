"""Stages 1 to 6 in order: the whole forward of one sequence, and the dense/sparse switch."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from .attend import attend_blocks, attend_dense
from .compress import compress_keys
from .config import SparseConfig
from .pool import pool_blocks
from .score import score_windows
from .select import select_blocks


class Attention(NamedTuple):
    """The result of a whole forward.

    Args:
        out: the attention output, `[T, HQ, D]`.
        lse: the natural logarithm of every softmax's denominator, `[T, HQ]`.
        selected: the selected blocks, int32 `[HK, T, K]`; None after dense attention.
    """

    out: Float[Tensor, "T HQ D"]
    lse: Float[Tensor, "T HQ"]
    selected: Int[Tensor, "HK T K"] | None


def attention(
    q: Float[Tensor, "T HQ D"],
    k: Float[Tensor, "S HK D"],
    v: Float[Tensor, "S HK D"],
    config: SparseConfig,
    selection_q: Float[Tensor, "T HQ D"] | None = None,
    selection_k: Float[Tensor, "S HK D"] | None = None,
) -> Attention:
    """Compute InfLLM-V2 attention: dense below `config.dense_len` keys, block-sparse from there.

    Args:
        q: the queries of one sequence, aligned with its last keys: `T = S` is prefill, `T < S` a
            chunk with history, `T = 1` decoding.
        k: the keys of the sequence.
        v: the values of the sequence.
        config: every parameter of the attention.
        selection_q: what selects in place of `q` (un-rotated), exactly if `config.use_nope`.
        selection_k: what selects in place of `k` (un-rotated), exactly if `config.use_nope`.

    Returns:
        Output, LSE and selection. Gradients flow to q, k and v through `attend_blocks` only.

    Raises:
        ValueError: `selection_q` or `selection_k` is given without `use_nope`, or missing with it.

    Source: Fig. 2 and Sec. 3.3; the switch is decision D8.
    """
    check_selection_inputs(config, selection_q=selection_q, selection_k=selection_k)
    if not config.is_sparse(len(k)):
        return Attention(*attend_dense(q, k, v), selected=None)
    selection_q = q if selection_q is None else selection_q
    selection_k = k if selection_k is None else selection_k
    k_c1, k_c2 = compress_for_selection(selection_k, config)
    selected = select_by_windows(selection_q, k_c1, k_c2, len(k), config)
    return Attention(*attend_blocks(q, k, v, selected, config.block_size), selected=selected)


def check_selection_inputs(config: SparseConfig, **inputs: Tensor | None) -> None:
    """Raise ValueError unless every input is given exactly if `config.use_nope`."""
    must, was = ("given", "None") if config.use_nope else ("None", "given")
    for name, value in inputs.items():
        if config.use_nope != (value is not None):
            raise ValueError(
                f"{name} must be {must} with use_nope={config.use_nope}, but it is {was}"
            )


def compress_for_selection(
    keys: Float[Tensor, "S HK D"], config: SparseConfig
) -> tuple[Float[Tensor, "C HK D"], Float[Tensor, "C2 HK D"]]:
    """Return K_C1, which is scored, and K_C2, which serves the approximate normaliser."""
    k_c1 = compress_keys(keys, config.kernel_size, config.kernel_stride)
    k_c2 = compress_keys(keys, config.lse_kernel_size, config.lse_kernel_stride)
    return k_c1, k_c2


def select_by_windows(
    q: Float[Tensor, "T HQ D"],
    k_c1: Float[Tensor, "C HK D"],
    k_c2: Float[Tensor, "C2 HK D"],
    num_keys: int,
    config: SparseConfig,
) -> Int[Tensor, "HK T K"]:
    """Score windows, pool them into blocks and select: stages 2 to 4, without gradient."""
    scores = score_windows(q.detach(), k_c1.detach(), k_c2.detach(), num_keys, config)
    return select_blocks(pool_blocks(scores, num_keys, config), num_keys, config)
