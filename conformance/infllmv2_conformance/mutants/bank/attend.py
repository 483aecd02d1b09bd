"""Wrong attention over given blocks: which tokens, which heads, which rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from infllmv2_conformance.mutants.model import Around, Edit, Mutant

from .faults import (
    FIRST_HISTORY,
    LONGEST_HISTORY,
    Arguments,
    shared_scale,
    wrapped_offsets,
)

_ADMITTED = "admitted = (selected[..., None] >= 0) & (tokens <= positions[:, None, None])"
SPARSE_TILE = "return _tile(tokens.flatten(2), admitted.flatten(2))"
GATHER = "return gathered.masked_fill_(~self.admitted[..., None], 0).to(dtype)"
_MASK = (
    "logits = (rows @ k.mT).mul_(k.shape[-1] ** -0.5)\n"
    "    return logits.masked_fill_(~tile.admitted[:, :, None], -torch.inf)"
)
_TOKENS = "tokens = selected[..., None].long() * block_size"
STEP = "step = max(1, min(slots, CHUNK_BYTES // max(1, sizes.bytes(block_size))))"
_PARTS = "[_sparse_tile(part, at, block_size) for part in parts]"
_OWN_BLOCK = "(at // block_size)[None, :, None].expand(len(blocks), -1, -1)"
_USED = "used = min(slots, last // block_size + 1)"
_FUNCTIONS = ("attend", "attention")
_ROWS = "return x[place.keys].reshape(-1, x.shape[2])"


def edit_attend(before: str, after: str) -> Edit:
    """Return an edit of the sums."""
    return Edit("attend", before, after)


def edit_tiles(before: str, after: str) -> Edit:
    """Return an edit of what is read."""
    return Edit("tiles", before, after)


_SOFT_MASK = (
    edit_tiles("    admitted: Tensor\n\n", "    admitted: Tensor\n    strict: object = None\n\n"),
    edit_attend(
        _MASK,
        f"{_MASK.splitlines()[0]}\n"
        "    if tile.strict is not None:\n"
        "        logits = logits - 1e4 * ~tile.strict[:, :, None]\n"
        "    return logits.masked_fill_(~tile.admitted[:, :, None], -torch.inf)",
    ),
)
"""A tile may admit tokens that are masked by a finite number."""

FINITE_CAUSAL_MASK = (
    *_SOFT_MASK,
    edit_tiles(
        SPARSE_TILE,
        "heads = torch.arange(len(tokens), device=tokens.device)[:, None, None]\n"
        "    there = tokens.clamp(min=0, max=int(positions[-1])).flatten(2) * len(tokens) + heads\n"
        "    soft = (tokens <= positions[-1]) & (selected[..., None] >= 0)\n"
        "    return Tile(there, soft.flatten(2), admitted.flatten(2))",
    ),
)
"""Future tokens of a selected block are masked by a finite number."""

_FINITE_SPARSE_MASK = (
    *_SOFT_MASK,
    edit_tiles(
        SPARSE_TILE,
        "every = torch.arange(int(positions[-1]) + 1, device=tokens.device)\n"
        "    hits = (selected[..., None] == every // block_size).any(dim=2)\n"
        "    soft = hits.any(dim=-1, keepdim=True) & (every <= positions[:, None])\n"
        "    heads = torch.arange(len(tokens), device=tokens.device)[:, None, None]\n"
        "    return Tile((every * len(tokens)).expand_as(hits) + heads, soft, hits)",
    ),
    edit_tiles(
        STEP,
        "step = max(slots, 1)",
    ),
)
"""Tokens of blocks that are not selected are masked by a finite number."""


def _cached_by_keys() -> Callable[..., Any]:
    """Return a body that remembers the last result for a content of q, k and selection."""
    last: dict[str, Any] = {}

    def body(inner: Callable[..., Any], given: Arguments) -> Any:
        read = [given[n].detach().clone() for n in ("q", "k", "selected", "cu_seqlens_q")]
        if last and not given["v"].requires_grad:
            known = last["read"]
            if all(
                a.shape == b.shape and torch.equal(a, b) for a, b in zip(read, known, strict=True)
            ):
                return last["result"]
        last["read"], last["result"] = read, inner(**given)
        return last["result"]

    return body


def _first_16_of_group(inner: Callable[..., Any], given: Arguments) -> Any:
    out, lse = inner(**given)
    group = out.shape[1] // given["k"].shape[1]
    kept = torch.arange(out.shape[1], device=out.device) % group < 16
    return out * kept[:, None].to(out.dtype), lse


def _power_of_two_channels(inner: Callable[..., Any], given: Arguments) -> Any:
    out, lse = inner(**given)
    width = 1 << (out.shape[2].bit_length() - 1)
    return out * (torch.arange(out.shape[2], device=out.device) < width).to(out.dtype), lse


def _odd_row_unwritten(inner: Callable[..., Any], given: Arguments) -> Any:
    out, lse = inner(**given)
    written = torch.empty(1 << 24, dtype=out.dtype, device=out.device)[: out.numel()].view(
        out.shape
    )
    written[: len(out) // 2 * 2] = out[: len(out) // 2 * 2]
    return written, lse


MUTANTS = (
    Mutant(
        "attend.diagonal-mask",
        "attend.values",
        "Tokens are masked by the last query of the call, not by each one.",
        "The causal mask left out of a block kernel, because blocks are causal.",
        (edit_tiles("(tokens <= positions[:, None, None])", "(tokens <= positions[-1])"),),
    ),
    Mutant(
        "attend.history-ignored",
        "attend.values",
        "Queries are placed at the start of their keys, in the causal mask alone.",
        "Top-left aligned masks.",
        (
            edit_tiles(
                "blocks, at = selected[:, chunk, :used], positions[chunk]",
                "blocks, at = selected[:, chunk, :used], positions[chunk] - positions[0]",
            ),
        ),
    ),
    Mutant(
        "attend.no-scale",
        "attend.values",
        "Logits are not scaled by 1 / sqrt(D).",
        "The paper's Eq. 5 and 8 read literally.",
        (
            edit_attend(
                "logits = (rows @ k.mT).mul_(k.shape[-1] ** -0.5)\n", "logits = rows @ k.mT\n"
            ),
        ),
    ),
    Mutant(
        "attend.neighbour-keys",
        "attend.values",
        "Keys and values are read one row early.",
        "An offset of the sequence before.",
        (edit_attend(_ROWS, "return x.roll(1, 0)[place.keys].reshape(-1, x.shape[2])"),),
    ),
    Mutant(
        "attend.block-lost-for-one-head",
        "attend.values",
        "The last selected block is dropped for the last key/value head.",
        "A loop over slots that ends one early for a ragged tile.",
        (
            edit_tiles(
                _ADMITTED,
                f"{_ADMITTED}\n    if selected.shape[2] > 1:\n        admitted[-1, :, -1] = False",
            ),
        ),
    ),
    Mutant(
        "attend.first-history-for-all",
        "attend.values",
        "The history of the first sequence is used for all.",
        "One scalar cache length for a batch.",
        FIRST_HISTORY,
        functions=("attend",),
    ),
    Mutant(
        "attend.longest-history-for-all",
        "attend.values",
        "max_seqlen_k - max_seqlen_q is used for the history of every sequence.",
        "Lengths of the longest sequence used for all, as in a padded batch.",
        LONGEST_HISTORY,
        functions=("attend",),
    ),
    Mutant(
        "attend.padding-is-block-0",
        "attend.values",
        "Slots that hold -1 attend block 0 again.",
        "Indices clamped to 0, so that loads stay in bounds, and not masked.",
        (
            edit_tiles(_TOKENS, _TOKENS.replace("selected", "selected.clamp(min=0)")),
            edit_tiles("(selected[..., None] >= 0) & ", ""),
        ),
    ),
    Mutant(
        "attend.group-of-16",
        "attend.values",
        "Query heads behind the 16th of a group get no output.",
        "The group size of the released model compiled into a tile.",
        wrap=Around(("attend",), _first_16_of_group),
    ),
    Mutant(
        "attend.head-dim-cut",
        "attend.values",
        "Channels behind the largest power of two are not written, and stay 0.",
        "A tile over the head dim that is a power of two, without a second one.",
        wrap=Around(("attend",), _power_of_two_channels),
    ),
    Mutant(
        "attend.last-row-unwritten",
        "attend.values",
        "The last query of the call is not written if their number is odd.",
        "A grid of pairs of rows.",
        wrap=Around(("attend",), _odd_row_unwritten),
    ),
    Mutant(
        "attend.offset-overflow",
        "attend.values",
        "Offsets overflow: rows of keys beyond 2^15 elements are read from the start.",
        "32-bit offsets at 2^31 elements; here at fewer, so that it shows on small cases.",
        wrap=Around(("attend",), wrapped_offsets("k", "v")),
    ),
    Mutant(
        "attend.token-lost-for-one-head",
        "attend.every-token",
        "Token 5 is dropped for the first key/value head.",
        "A lane of a tile masked wrongly.",
        (edit_tiles(_ADMITTED, f"{_ADMITTED}\n    admitted[0] &= tokens[0] != 5"),),
    ),
    Mutant(
        "attend.own-block-twice",
        "attend.every-token",
        "The query's own block is attended once more.",
        "A diagonal block handled after the loop, and in it as well.",
        (edit_tiles(_PARTS, _PARTS.replace("parts]", f"(*parts, {_OWN_BLOCK})]")),),
    ),
    Mutant(
        "attend.own-token-lost",
        "attend.every-token",
        "A query does not attend its own token.",
        "`<` for `<=` in the causal mask.",
        (
            edit_tiles(
                "(tokens <= positions[:, None, None])", "(tokens < positions[:, None, None])"
            ),
        ),
    ),
    Mutant(
        "attend.next-token",
        "attend.causal",
        "A query attends the token behind it.",
        "`<=` on an exclusive end.",
        (
            edit_tiles(
                "(tokens <= positions[:, None, None])",
                "(tokens <= (positions[:, None, None] + 1).clamp(max=positions[-1]))",
            ),
        ),
    ),
    Mutant(
        "attend.finite-causal-mask",
        "attend.causal",
        "Future tokens of a selected block get -1e4 instead of -inf.",
        "A mask made for half precision: a large key behind the query beats it.",
        FINITE_CAUSAL_MASK,
        functions=_FUNCTIONS,
    ),
    Mutant(
        "attend.partial-block-lost",
        "attend.partial-block",
        "The last block is attended only if it is complete.",
        "Floor division for the number of blocks.",
        (
            edit_tiles(
                _ADMITTED,
                f"{_ADMITTED}\n"
                "    end = (int(positions[-1]) + 1) // block_size * block_size\n"
                "    admitted &= tokens < end",
            ),
        ),
    ),
    Mutant(
        "attend.last-token-lost",
        "attend.partial-block",
        "The last token of a partial block is dropped.",
        "A tail handled in pairs of tokens.",
        (
            edit_tiles(
                _ADMITTED,
                f"{_ADMITTED}\n"
                "    if (int(positions[-1]) + 1) % block_size % 2:\n"
                "        admitted &= tokens < int(positions[-1])",
            ),
        ),
    ),
    Mutant(
        "attend.own-block-always",
        "attend.few-blocks",
        "The query's own block is attended even if it is not selected.",
        "A diagonal block handled apart, because selections from stage 4 hold it.",
        (
            edit_tiles(
                "blocks, at = selected[:, chunk, :used], positions[chunk]",
                "blocks, at = selected[:, chunk, :used], positions[chunk]\n"
                f"        own = {_OWN_BLOCK}.to(blocks.dtype)\n"
                "        there = (blocks == own).any(dim=-1, keepdim=True)\n"
                "        blocks = torch.cat([blocks, torch.where(there, -1, own)], dim=-1)\n"
                "        used += 1",
            ),
        ),
    ),
    Mutant(
        "attend.no-blocks-is-block-0",
        "attend.few-blocks",
        "A row without any block attends block 0.",
        "The first index clamped to 0, so that no softmax is over nothing.",
        (
            edit_tiles(
                _TOKENS,
                "first = selected[..., :1]\n"
                "    selected = torch.cat([first.clamp(min=0), selected[..., 1:]], dim=-1)\n"
                f"    {_TOKENS}",
            ),
        ),
    ),
    Mutant(
        "attend.finite-sparse-mask",
        "attend.unselected-no-effect",
        "All tokens are attended, those of unselected blocks with -1e4 added to their logits.",
        "Sparsity by an additive mask made for half precision.",
        _FINITE_SPARSE_MASK,
        functions=_FUNCTIONS,
    ),
    Mutant(
        "attend.masked-tokens-read",
        "attend.unselected-not-read",
        "Token 0 is loaded in place of every masked one, and weighted by 0.",
        "Clamped addresses: 0 times NaN is NaN.",
        (edit_tiles(GATHER, "return gathered.to(dtype)"),),
    ),
    Mutant(
        "attend.interleaved-heads",
        "attend.group-mapping",
        "Query head h reads key/value head h % HK.",
        "torch.repeat for repeat_interleave.",
        (
            edit_attend(
                "return x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).contiguous()",
                "return x.unflatten(1, (-1, num_kv_heads)).transpose(1, 2).transpose(0, 1)"
                ".contiguous()",
            ),
            edit_attend(
                "return x.transpose(0, 1).flatten(1, 2)",
                "return x.transpose(0, 1).transpose(1, 2).flatten(1, 2)",
            ),
        ),
    ),
    Mutant(
        "attend.first-selection-for-all",
        "attend.group-mapping",
        "All key/value heads attend the blocks of the first.",
        "A block table shared by heads.",
        (
            edit_tiles(
                "blocks, at = selected[:, chunk, :used]",
                "blocks, at = selected[:1, chunk, :used].expand(len(selected), -1, -1)",
            ),
        ),
    ),
    Mutant(
        "attend.cached-by-keys",
        "attend.value-scale",
        "The last result is returned again while q, k and the selection stay the same.",
        "A prefix cache with a key that forgets the values.",
        wrap=Around(("attend",), _cached_by_keys, fresh=True),
    ),
    Mutant(
        "attend.at-most-16-blocks",
        "attend.equals-dense",
        "At most 16 blocks of a row are attended.",
        "A block table of fixed size in shared memory.",
        (edit_tiles(_USED, "used = min(slots, last // block_size + 1, 16)"),),
    ),
    Mutant(
        "attend.batch-scale",
        "attend.packed-alone",
        "All queries of a batch share one scale.",
        "Quantised products with one scale for a tensor.",
        wrap=Around(("attend",), shared_scale("q")),
    ),
)
