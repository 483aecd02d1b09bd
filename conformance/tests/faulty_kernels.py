"""Small kernels, each wrong in one way, written without a look at the bank of mutants.

They share nothing with `eager`, which mutants are made of: the plain ones loop over sequences and
heads, the others take the reference and put a fault of their own beside it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from infllmv2_conformance.reference_impl import ReferenceImplementation


class _Only:
    """Offer one function of the reference."""

    def __init__(self) -> None:
        self.reference = ReferenceImplementation()

    capabilities = ReferenceImplementation.capabilities


def _sequences(lengths: dict[str, Any]) -> list[tuple[slice, slice]]:
    q, k = lengths["cu_seqlens_q"].tolist(), lengths["cu_seqlens_k"].tolist()
    return [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]


class PlainAttend:
    """Attend head by head with one dense mask; subclasses change a step."""

    capabilities = ReferenceImplementation.capabilities | {"returns_lse": True, "gradients": False}

    def attend(self, *, q, k, v, selected, block_size, **lengths):
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, keys in _sequences(lengths):
            for head in range(q.shape[1]):
                kv = self.kv_head(head, q.shape[1], k.shape[1])
                mask = self.mask(selected[kv, rows], rows, keys, block_size)
                logits = q[rows, head].to(lse.dtype) @ k[keys, kv].to(lse.dtype).T
                logits = (logits * self.scale(q.shape[2])).masked_fill(~mask, -torch.inf)
                lse[rows, head] = self.lse(logits)
                weights = (logits - logits.logsumexp(-1, keepdim=True)).exp().nan_to_num(0)
                out[rows, head] = (weights @ v[keys, kv].to(lse.dtype)).to(q.dtype)
        return out, lse

    def kv_head(self, head: int, num_heads: int, num_kv_heads: int) -> int:
        return head // (num_heads // num_kv_heads)

    def mask(self, selected: Tensor, rows: slice, keys: slice, block_size: int) -> Tensor:
        tokens = torch.arange(keys.stop - keys.start)
        positions = tokens[len(tokens) - (rows.stop - rows.start) :, None]
        chosen = (selected[:, :, None] == tokens // block_size).any(1)
        return self.causal(chosen, tokens, positions, block_size)

    def causal(self, chosen: Tensor, tokens: Tensor, positions: Tensor, block_size: int) -> Tensor:
        return chosen & (tokens <= positions)

    def scale(self, head_dim: int) -> float:
        return head_dim**-0.5

    def lse(self, logits: Tensor) -> Tensor:
        return logits.logsumexp(-1)


class ModuloHeads(PlainAttend):
    def kv_head(self, head, num_heads, num_kv_heads):
        return head % num_kv_heads


class Base2(PlainAttend):
    def lse(self, logits):
        return (logits.double().exp().sum(-1)).log2().to(logits.dtype)


class NoScale(PlainAttend):
    def scale(self, head_dim):
        return 1.0


class StrictlyCausal(PlainAttend):
    def causal(self, chosen, tokens, positions, block_size):
        return chosen & (tokens < positions)


class WholeBlocksOnly(PlainAttend):
    def causal(self, chosen, tokens, positions, block_size):
        whole = tokens // block_size < len(tokens) // block_size
        return chosen & (tokens <= positions) & whole


class NoCausalMask(PlainAttend):
    def causal(self, chosen, tokens, positions, block_size):
        return chosen.expand(len(positions), len(tokens))


class UnpaddedPooling(_Only):
    """Pool with max_pool1d from window B // s * b on, where the stride divides the block."""

    capabilities = _Only.capabilities | {
        "block_sizes": [64],
        "windows": [[32, 16]],
        "pooling_modes": ["overlap"],
    }

    def pool_blocks(self, *, scores, config, **lengths):
        per_block = config.block_size // config.kernel_stride
        blocks = -(-lengths["max_seqlen_k"] // config.block_size)
        scores = scores.clone()
        for rows, keys in _sequences(lengths):
            positions = torch.arange(keys.stop - keys.start)[-(rows.stop - rows.start) or 1 << 30 :]
            ends = torch.arange(scores.shape[2]) * config.kernel_stride + config.kernel_size - 1
            hidden = ends > positions[:, None]
            scores[:, rows] = scores[:, rows].masked_fill(hidden, -torch.inf)
        room = per_block * blocks - scores.shape[2]
        scores = torch.nn.functional.pad(scores, (0, max(room, 0)), value=-torch.inf)
        if 0 in scores.shape:
            return scores.new_empty(*scores.shape[:2], blocks)
        return max_pool1d(scores, per_block)[..., :blocks]


class MeanOverGroup(_Only):
    def score_windows(self, *, q, k_c1, **given):
        scores = self.reference.score_windows(q=q, k_c1=k_c1, **given)
        return scores * k_c1.shape[1] / q.shape[1]


class OneLocalBlockShort(_Only):
    capabilities = _Only.capabilities | {"pooling_modes": ["overlap"]}

    def select_blocks(self, *, config, **given):
        short = config.local_blocks - 1
        if not short:
            return self.reference.select_blocks(config=config, **given)
        changed = replace(config, local_override=short)
        more = config.budget - changed.budget
        return self.reference.select_blocks(
            config=replace(changed, topk=changed.topk + more), **given
        )


class LateWindows(_Only):
    def compress_keys(self, *, k, cu_seqlens_k, **given):
        ends = cu_seqlens_k.tolist()
        kept = [torch.arange(a, max(b - 1, a)) for a, b in pairwise(ends)]
        lengths = torch.tensor([0, *(len(rows) for rows in kept)])
        shorter = lengths.cumsum(0).to(cu_seqlens_k.dtype)
        rows = torch.cat([torch.arange(0), *kept])
        return self.reference.compress_keys(k=k[rows], cu_seqlens_k=shorter, **given)


class SwitchOneLate(_Only):
    def attention(self, *, config, **given):
        late = config.dense_len + 1 if config.dense_len >= 0 else -1
        return self.reference.attention(config=replace(config, dense_len=late), **given)


class ExactNormaliser(_Only):
    """Offer the fused selection alone, and take the exact normaliser for the approximate one."""

    def select(self, *, config, **given):
        return self.reference.select(config=replace(config, lse="exact"), **given)


class LastOfGroup(_Only):
    """Send gradients to keys and values from the last query head of each group alone."""

    def attend(self, *, q, k, v, **given):
        group = q.shape[1] // k.shape[1]
        last = torch.arange(q.shape[1], device=q.device) % group == group - 1
        with_grad = self.reference.attend(q=q, k=k, v=v, **given)
        without = self.reference.attend(q=q, k=k.detach(), v=v.detach(), **given)
        shape = last[:, None]
        return torch.where(shape, with_grad[0], without[0]), with_grad[1].detach()
