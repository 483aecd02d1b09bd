"""Faults that show behind a long context alone: no profile draws more than 8000 tokens.

Offsets overflow at 2**31 in practice, which takes a GPU's memory to reach; here a power of two
stands for it that no ordinary case reaches, and that a long case on a CPU does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infllmv2_conformance.mutants.model import Around, Edit, Mutant

from .faults import Arguments

_MEANS = "means[start - first : stop - first] = _sliding_sums(tokens, size)[::stride] / size"
_ROWS = "torch.where(admitted, tokens, 0) * num_kv_heads + heads"
_QUERIES = "queries = _by_kv_head(q[rows].to(wide), k.shape[1])\n                sums"
_FREE = "free = visible & ~forced"
_SHARED = "tiles.append(_shared_tile(tokens, sizes.num_kv_heads))"
_TABLE = "exists = (table >= 0) & (table < end[:, None].clamp(max=count))"
_STORE = "windows[sequence, first:last] = compress(keys, size, stride, first)"
_SCORES = 1 << 22


def _wrapped_offsets(inner: Callable[..., Any], given: Arguments) -> Any:
    """Write every element at its offset modulo `_SCORES`; what lies behind is left 0."""
    result = inner(**given)
    flat = result.view(-1)
    for start in range(_SCORES, flat.numel(), _SCORES):
        late = flat[start : start + _SCORES].clone()
        flat[start : start + _SCORES] = 0
        flat[: len(late)] = late
    return result


MUTANTS = (
    Mutant(
        "long.running-sum",
        "long.compress",
        "Windows of long sequences are differences of one running sum in float32.",
        "A scan for large inputs: the sum grows, and its last digits with it.",
        (
            Edit(
                "windows",
                _MEANS,
                "if len(keys) > 12288:\n"
                "            sums = keys.float().cumsum(dim=0)\n"
                "            begin = torch.arange(start, stop, device=keys.device) * stride\n"
                "            before = sums[begin - 1] * (begin > 0)[:, None, None]\n"
                "            windows = (sums[begin + size - 1] - before) / size\n"
                "            means[start - first : stop - first] = windows\n"
                "            continue\n"
                f"        {_MEANS}",
            ),
        ),
    ),
    Mutant(
        "long.normaliser-split-lost",
        "long.score",
        "The normaliser sums the first 4096 windows.",
        "A split reduction with a fixed number of splits, too few for a long context.",
        (
            Edit(
                "windows",
                "lse = normaliser.logsumexp(dim=-1, keepdim=True)",
                "lse = normaliser[..., :4096].logsumexp(dim=-1, keepdim=True)",
            ),
        ),
    ),
    Mutant(
        "long.scores-offset",
        "long.score",
        f"Offsets into the scores of windows wrap at {_SCORES}, for 2**31.",
        "head * T * C + row * C + column in 32-bit integers.",
        wrap=Around(("score_windows",), _wrapped_offsets),
    ),
    Mutant(
        "long.window-limit",
        "long.pool",
        "Blocks pool from the first 4096 windows.",
        "A table of windows of fixed size.",
        (Edit("blocks", _TABLE, f"{_TABLE} & (table < 4096)"),),
        functions=("pool_blocks",),
    ),
    Mutant(
        "long.block-scores-offset",
        "long.block-scores",
        f"Offsets into the scores of blocks wrap at {_SCORES}, for 2**31.",
        "head * T * N + row * N + block in 32-bit integers.",
        wrap=Around(("score_blocks",), _wrapped_offsets),
    ),
    Mutant(
        "long.first-blocks",
        "long.select",
        "Only the first 512 blocks compete.",
        "A top-k whose candidates must fit into shared memory.",
        (Edit("blocks", _FREE, f"{_FREE} & (blocks < 512)"),),
        functions=("select_blocks",),
    ),
    Mutant(
        "long.int16-ids",
        "long.select",
        "Block ids pass through int16: from 32768 on they are negative.",
        "Candidates packed into half a word beside their scores.",
        (Edit("blocks", "ids = blocks.to(torch.int32)", "ids = blocks.to(torch.int16).int()"),),
    ),
    Mutant(
        "long.first-blocks-fused",
        "long.fused-select",
        "Only the first 512 blocks compete, in the fused selection.",
        "The same top-k behind fused scores.",
        (Edit("blocks", _FREE, f"{_FREE} & (blocks < 512)"),),
        functions=("select",),
    ),
    Mutant(
        "long.key-offset",
        "long.attend",
        "Rows of keys and values are read at their offset modulo 2**15, for 2**31.",
        "token * HK * D in 32-bit integers.",
        (Edit("tiles", _ROWS, f"({_ROWS}) % (1 << 15)"),),
        functions=("attend",),
    ),
    Mutant(
        "long.query-offset",
        "long.attend",
        "Rows of q are read at their offset modulo 2**13, for 2**31.",
        "row * HQ * D in 32-bit integers: 524288 rows of 32 heads are enough.",
        (
            Edit(
                "attend",
                _QUERIES,
                "at = torch.arange(rows.start, rows.stop, device=q.device) % (1 << 13)\n"
                f"                {_QUERIES.replace('q[rows]', 'q[at]')}",
            ),
        ),
        functions=("attend",),
    ),
    Mutant(
        "long.gradient-offset",
        "long.gradients",
        "Gradients of keys and values are added at their offset modulo 2**15, for 2**31.",
        "A backward whose forward was checked at length.",
        (
            Edit(
                "tiles",
                "rows.index_add_(0, self.tokens.flatten(), values)",
                "rows.index_add_(0, self.tokens.flatten() % (1 << 15), values)",
            ),
        ),
    ),
    Mutant(
        "long.dense-split-lost",
        "long.attention",
        "Of dense attention's splits of 4096 tokens the fourth is lost.",
        "A split-KV kernel that merges a power of two of splits, rounded down.",
        (
            Edit(
                "tiles",
                _SHARED,
                "tokens = tokens[tokens // 4096 != 3]\n"
                f"            {_SHARED.replace('tiles.append', 'len(tokens) and tiles.append')}",
            ),
        ),
    ),
    Mutant(
        "long.append-limit",
        "long.decode",
        "An append adds at most 1024 windows of each kind.",
        "A launch whose grid has a fixed size, made for decoding.",
        (
            Edit(
                "cache",
                _STORE,
                "new = min(last, first + 1024)\n"
                "            added = compress(keys, size, stride, first)[: new - first]\n"
                "            windows[sequence, first:new] = added",
            ),
        ),
    ),
)
