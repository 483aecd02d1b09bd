"""Wrong selections from given block scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infllmv2_conformance.mutants.model import Around, Edit, Mutant

from .faults import LONGEST_HISTORY, Arguments

_FREE = "ranked = torch.where(free, block_scores, -torch.inf)"
_FREE_SLOTS = "config.budget - forced.sum(dim=-1, keepdim=True)"
_SLOTS = f"slots = {_FREE_SLOTS}"
_RESULT = "return selected.scatter_(-1, column, ids)[..., :budget]"
_COLUMN = "column = torch.where(chosen, chosen.cumsum(dim=-1) - 1, budget)"
_VISIBLE = "visible = blocks <= own  # [t, N]"
_OWN = "own = positions.div(config.block_size"
_CLAMPED = Edit("blocks", _COLUMN, f"{_COLUMN}.clamp(max=budget)")


def _edit(before: str, after: str) -> tuple[Edit, ...]:
    return (Edit("blocks", before, after),)


def _batch_maximum(inner: Callable[..., Any], given: Arguments) -> Any:
    """Shift scores by the largest one of block 0: only a rule on neighbours makes it large."""
    scores = given["block_scores"].double()
    first = scores[..., 0] if scores.shape[-1] else scores.new_zeros(1)
    shift = first.nan_to_num(nan=0, posinf=0, neginf=0).amax() if first.numel() else 0
    return inner(**given | {"block_scores": scores - shift})


MUTANTS = (
    Mutant(
        "select.chunk-end-aligned",
        "select.exact",
        "All rows of a call use the block of its last row as their own.",
        "Local blocks counted from the end of the sequence.",
        _edit(_OWN, "own = positions[-1:].expand(len(positions)).div(config.block_size"),
    ),
    Mutant(
        "select.relative-to-chunk",
        "select.exact",
        "A row's own block is counted from the first query of the call.",
        "History forgotten in the selection alone.",
        _edit(_OWN, "own = (positions - positions[:1]).div(config.block_size"),
    ),
    Mutant(
        "select.budget-without-local",
        "select.exact",
        "The budget is topk alone, without the blocks of the window.",
        "topk of the configuration taken for the budget.",
        _edit(_SLOTS, "slots = config.topk - forced.sum(dim=-1, keepdim=True)"),
    ),
    Mutant(
        "select.worst-first",
        "select.exact",
        "The blocks with the lowest scores are taken.",
        "A heap with the order of a minimum.",
        _edit("descending=True, stable=True", "descending=False, stable=True"),
    ),
    Mutant(
        "select.longest-history-for-all",
        "select.exact",
        "max_seqlen_k - max_seqlen_q is used for the history of every sequence.",
        "Lengths of the longest sequence used for all, as in a padded batch.",
        LONGEST_HISTORY,
        functions=("select_blocks",),
    ),
    Mutant(
        "select.first-head-for-all",
        "select.exact",
        "All key/value heads select the blocks of the first.",
        "A block table shared by heads.",
        _edit(_RESULT, f"selected = {_RESULT[7:]}\n    return selected[:1].expand_as(selected)"),
    ),
    Mutant(
        "select.missing-skipped",
        "select.exact",
        "Blocks without a visible window are never taken, even if slots are left.",
        "A filter on finite scores.",
        _edit(
            "taken = candidate &", "taken = (ranked.gather(-1, order) > -torch.inf) & candidate &"
        ),
    ),
    Mutant(
        "select.rounded-scores",
        "select.exact",
        "Scores are rounded to bfloat16 before they are compared.",
        "Sort keys of 16 bits.",
        _edit("order = ranked.sort(", "order = ranked.bfloat16().sort("),
    ),
    Mutant(
        "select.ties-to-larger",
        "select.ties",
        "Of equal scores the larger index is taken.",
        "A sort that is not stable, or an index packed into the low bits of the key.",
        _edit(
            _FREE,
            f"{_FREE}.double()\n    ranked = ranked + 1e-12 * torch.arange(count, "
            "device=ranked.device)",
        ),
    ),
    Mutant(
        "select.zero-above-zero",
        "select.ties",
        "The least score taken is found among the bits of floats, where -0.0 comes before 0.0.",
        "A bisection or a radix select whose result is compared as a float: 0.0 > -0.0 is false.",
        _edit(
            "chosen = torch.zeros_like(taken).scatter_(-1, order, taken) | forced",
            """real = (free & (ranked > -torch.inf)).sum(dim=-1, keepdim=True)
    least = ranked.where(ranked > -torch.inf, torch.inf).amin(dim=-1, keepdim=True)
    lost = (real == slots) & (least == 0) & (ranked == 0)  # all real scores are wanted
    chosen = torch.zeros_like(taken).scatter_(-1, order, taken) & ~lost | forced""",
        ),
    ),
    Mutant(
        "select.local-one-short",
        "select.forced",
        "One local block fewer is forced.",
        "w / B blocks instead of w / B + 1: the sliding window is not covered.",
        _edit("blocks > own - config.local_blocks", "blocks > own - config.local_blocks + 1"),
    ),
    Mutant(
        "select.no-init",
        "select.forced",
        "Initial blocks are not forced.",
        "Sinks left to the scores, which usually like them.",
        _edit("(blocks < config.init_blocks) | ", ""),
    ),
    Mutant(
        "select.forced-are-free",
        "select.forced",
        "Forced blocks do not take a slot; what exceeds the budget falls off the end.",
        "topk scored blocks besides the forced ones, in a row of budget entries.",
        (Edit("blocks", _SLOTS, "slots = config.budget"), _CLAMPED),
    ),
    Mutant(
        "select.one-slot-at-least",
        "select.forced",
        "At least one block is taken by score, even if the forced ones fill the budget.",
        "max(k, 1) for topk, which refuses 0.",
        (Edit("blocks", _SLOTS, f"slots = ({_FREE_SLOTS}).clamp(min=1)"), _CLAMPED),
    ),
    Mutant(
        "select.additive-bonus",
        "select.forced",
        "Forced blocks get a bonus on their score instead of a place.",
        "scores + 1e4 at forced blocks, as long as scores are finite.",
        (
            Edit(
                "blocks",
                _FREE,
                "free = visible\n    slots = config.budget\n"
                "    ranked = torch.where(visible, block_scores + 1e4 * forced, -torch.inf)",
            ),
            Edit("blocks", "taken) | forced", "taken)"),
        ),
    ),
    Mutant(
        "select.local-by-token",
        "select.forced",
        "A block is local only if it holds one of the last w tokens.",
        "A sliding window of exactly w tokens: one block fewer at the end of each block.",
        _edit(
            "blocks > own - config.local_blocks",
            "(blocks + 1) * config.block_size > positions[:, None] + 1 - "
            "(config.local_blocks - 1) * config.block_size",
        ),
    ),
    Mutant(
        "select.finite-bonus",
        "select.forced",
        "Forced blocks get a bonus of 1e4 on their score instead of a place.",
        "Scores above it are rare, but the approximate normaliser knows no limit.",
        (
            Edit(
                "blocks",
                _FREE,
                "free = visible\n    slots = config.budget\n"
                "    bonus = 1e4 + block_scores.clamp(min=0)\n"
                "    ranked = torch.where(forced, bonus, block_scores.clamp(min=-1))\n"
                "    ranked = torch.where(visible, ranked, -torch.inf)",
            ),
            Edit("blocks", "taken) | forced", "taken)"),
        ),
    ),
    Mutant(
        "select.duplicates",
        "select.format",
        "A block that is initial and local stands twice.",
        "Forced and scored indices joined without a look for the same.",
        _edit(
            _RESULT,
            "result = selected.scatter_(-1, column, ids)[..., :budget]\n"
            "    again = (result[..., 1:] < 0) & (result[..., :-1] == 0)\n"
            "    result[..., 1:] = torch.where(again, 0, result[..., 1:])\n    return result",
        ),
    ),
    Mutant(
        "select.descending",
        "select.format",
        "Indices descend.",
        "Local blocks written first.",
        _edit(_RESULT, f"{_RESULT}.sort(dim=-1, descending=True).values"),
    ),
    Mutant(
        "select.padding-first",
        "select.format",
        "-1 stands before the indices.",
        "A plain sort of a row padded with -1.",
        _edit(_RESULT, f"{_RESULT}.sort(dim=-1).values"),
    ),
    Mutant(
        "select.padding-in-middle",
        "select.format",
        "-1 stands between initial and local blocks.",
        "Initial, scored and local indices each written to a region of their own.",
        _edit(
            _RESULT,
            "result = selected.scatter_(-1, column, ids)[..., :budget]\n"
            "    if budget > 2:\n"
            "        late = (result[..., -1:] < 0) & (result[..., 1:2] >= 0)\n"
            "        parts = result[..., :1], result[..., -1:], result[..., 1:-1]\n"
            "        moved = torch.cat(parts, -1)\n"
            "        result = torch.where(late, moved, result)\n    return result",
        ),
    ),
    Mutant(
        "select.padded-with-zero",
        "select.format",
        "Rows with fewer blocks than the budget are filled with block 0.",
        "A buffer of zeros.",
        _edit("(*rows, budget + 1), -1, dtype", "(*rows, budget + 1), 0, dtype"),
    ),
    Mutant(
        "select.by-score",
        "select.format",
        "Indices stand in the order of their scores.",
        "The output of a top-k, not sorted again.",
        _edit(
            _RESULT,
            "ranked = torch.where(forced, torch.inf, ranked).masked_fill(~chosen, -torch.inf)\n"
            "    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :budget]\n"
            "    there = chosen.gather(-1, order)\n"
            "    selected[..., : order.shape[-1]] = torch.where(there, order, -1)\n"
            "    return selected[..., :budget]",
        ),
    ),
    Mutant(
        "select.padding-up-to-64",
        "select.format",
        "Only the first 64 slots of a row are padded with -1.",
        "A fill by one warp, or by one tile: the released budget is 96.",
        _edit(
            "(*rows, budget + 1), -1, dtype=torch.int32, device=blocks.device)",
            "(*rows, budget + 1), -1, dtype=torch.int32, device=blocks.device)\n"
            "    selected[..., 64:] = 0",
        ),
        functions=("select_blocks",),
    ),
    Mutant(
        "select.future-block",
        "select.no-future",
        "The block behind the query's own is visible.",
        "`<=` on an exclusive end.",
        _edit(_VISIBLE, "visible = blocks <= own + 1"),
    ),
    Mutant(
        "select.future-on-tie",
        "select.no-future",
        "Slots that are left are filled with future blocks, whose score is -inf.",
        "A top-k over masked scores: -inf is still a candidate.",
        _edit("candidate = free.expand(", "candidate = (~forced).expand("),
    ),
    Mutant(
        "select.future-by-score",
        "select.no-future",
        "Future blocks are kept out by a score of -inf alone.",
        "A kernel that relies on what stage 3 left behind the query's own block.",
        _edit(
            "free = visible & ~forced", "free = (visible | (block_scores > -torch.inf)) & ~forced"
        ),
    ),
    Mutant(
        "select.at-most-16",
        "select.budget-covers-all",
        "At most 16 blocks are taken by score.",
        "A list of fixed size in registers.",
        _edit(_SLOTS, f"slots = ({_FREE_SLOTS}).clamp(max=16)"),
    ),
    Mutant(
        "select.row-maximum",
        "select.forced-not-read",
        "Scores are shifted by the row's maximum, forced blocks included.",
        "A softmax over all blocks before the selection: one NaN or infinity spoils the row.",
        _edit(
            _FREE,
            "shifted = torch.where(visible, block_scores, -torch.inf).double()\n"
            "    if count:\n        shifted = shifted - shifted.amax(-1, True).clamp(min=0)\n"
            "    ranked = torch.where(free, shifted, -torch.inf)",
        ),
    ),
    Mutant(
        "select.batch-maximum",
        "select.packed-alone",
        "Scores are shifted by the first block's largest score in the whole batch.",
        "One scale for a tensor.",
        wrap=Around(("select_blocks",), _batch_maximum),
    ),
)
