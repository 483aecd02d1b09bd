"""Wrong pooling of windows into blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infllmv2_conformance.mutants.model import Around, Edit, Mutant

from .faults import Arguments

_FIRST = 'first = (starts - size).div(stride, rounding_mode="floor") + 1'
_END = 'end = (starts + block_size - 1).div(stride, rounding_mode="floor") + 1'
_MASK = "scores = scores.masked_fill(~visible, -torch.inf)"
_ONE_KIND = "visible = visible_windows(positions, count, config.kernel_size, config.kernel_stride)"


def _edit(before: str, after: str) -> tuple[Edit, ...]:
    return (Edit("blocks", before, after),)


def _shifted(inner: Callable[..., Any], given: Arguments) -> Any:
    scores = given["scores"]
    base = scores[:, -1:, :1].double().nan_to_num(nan=0, posinf=0, neginf=0)
    base = base.amax() if base.numel() else 0
    return inner(**given | {"scores": (scores.double() - base + base).to(scores.dtype)})


MUTANTS = (
    Mutant(
        "pool.no-padding",
        "pool.values",
        "A window that begins before the block does not count, although it overlaps it.",
        "Max pooling without padding on the left.",
        _edit(_FIRST, 'first = (starts + stride - 1).div(stride, rounding_mode="floor")'),
    ),
    Mutant(
        "pool.clamped-start",
        "pool.values",
        "The span of windows is moved to begin at 0: the first block pools one that it misses.",
        "max(start, 0) with a fixed width.",
        _edit(_END, f"{_END}\n        end, first = end - first.clamp(max=0), first.clamp(min=0)"),
    ),
    Mutant(
        "pool.paper-span",
        "pool.values",
        "The span of windows is the paper's literal one.",
        "Eq. 7 read literally: one window too late.",
        _edit('if config.pooling == "overlap":', "if False:"),
    ),
    Mutant(
        "pool.mean",
        "pool.values",
        "A block's score is the mean of its windows'.",
        "Average pooling.",
        _edit(
            "unflatten(2, table.shape).amax(dim=-1)",
            "unflatten(2, table.shape).where(pooled.unflatten(2, table.shape) > -torch.inf, "
            "torch.nan).nanmean(dim=-1).nan_to_num(nan=-torch.inf)",
        ),
    ),
    Mutant(
        "pool.visible-from-start",
        "pool.values",
        "A window counts for the block as soon as it has begun.",
        "Visibility by block in stage 3, by token in stage 2.",
        _edit(_ONE_KIND, "visible = visible_windows(positions, count, 1, config.kernel_stride)"),
    ),
    Mutant(
        "pool.zero-for-none",
        "pool.values",
        "A block without a visible window scores 0 instead of -inf.",
        "A maximum that starts from 0.",
        _edit("(0, 1), value=-torch.inf)", "(0, 1), value=0.0)"),
    ),
    Mutant(
        "pool.window-too-many",
        "pool.values",
        "A block also pools the first window behind it.",
        "An inclusive end taken for an exclusive one.",
        _edit(_END, f"{_END} + 1"),
    ),
    Mutant(
        "pool.window-too-few",
        "pool.values",
        "A block does not pool the last window that begins in it.",
        "Windows counted that lie within the block, not those that overlap it.",
        _edit(_END, _END.removesuffix(" + 1")),
    ),
    Mutant(
        "pool.history-ignored",
        "pool.values",
        "Queries are placed at the start of their keys, in stage 3 alone.",
        "Top-left aligned masks.",
        _edit(
            "positions = place.positions(scores.device)",
            "positions = torch.arange(place.num_queries, device=scores.device)",
        ),
    ),
    Mutant(
        "pool.chunk-end-aligned",
        "pool.values",
        "All rows of a call pool the windows that its last row sees.",
        "One mask for a tile of queries.",
        _edit(_ONE_KIND, _ONE_KIND.replace("(positions,", "(positions[-1:].expand_as(positions),")),
    ),
    Mutant(
        "pool.rounded",
        "pool.values",
        "Block scores are rounded to bfloat16.",
        "A score buffer in the dtype of the inputs, against what is declared.",
        _edit(
            "return pooled.unflatten",
            "pooled = pooled.bfloat16().to(scores.dtype)\n    return pooled.unflatten",
        ),
    ),
    Mutant(
        "pool.last-window-lost",
        "pool.edges",
        "A window that begins in the last, uneven part of a block does not count.",
        "A span of B // s windows where the stride does not divide the block.",
        _edit(_END, 'end = starts.div(stride, rounding_mode="floor") + block_size // stride'),
    ),
    Mutant(
        "pool.last-block-lost",
        "pool.edges",
        "The partial block at the end has no score.",
        "Floor division for the number of blocks.",
        _edit(
            "table = _windows_of_blocks(num_blocks(num_keys, config.block_size), count, config)",
            "table = _windows_of_blocks(num_blocks(num_keys, config.block_size), count, config)\n"
            "    table[num_keys // config.block_size :] = count",
        ),
    ),
    Mutant(
        "pool.trusts-padding",
        "pool.invisible-not-read",
        "Invisible windows are told by NaN instead of by their position.",
        "A kernel that relies on what another one left in its padding.",
        _edit(_MASK, "scores = scores.nan_to_num(nan=-torch.inf)"),
    ),
    Mutant(
        "pool.batch-shift",
        "pool.packed-alone",
        "Scores are shifted by one of the last query's, and back.",
        "Scores stored as small differences with one base for a tensor.",
        wrap=Around(("pool_blocks",), _shifted),
    ),
)
