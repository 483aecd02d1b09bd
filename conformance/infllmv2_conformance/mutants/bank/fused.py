"""Faults of kernels that fuse scoring, pooling and selection, and of nothing else."""

from __future__ import annotations

from infllmv2_conformance.mutants.model import Around, Edit, Mutant

from .faults import positions, shared_scale

_POOLED = "if pooled:\n                scores = pool(scores, positions, place.num_keys, config)"
_SELECT = "result[:, rows] = select(block_scores, positions, config)\n\n\ndef select_by_keys"
_POOL_THEN_SELECT = "block_scores = pool(scores, positions, place.num_keys, config)"


def _fused(before: str, after: str) -> tuple[Edit, ...]:
    return (Edit("blocks", before, after),)


MUTANTS = (
    Mutant(
        "score_blocks.no-padding",
        "score_blocks.values",
        "The fused kernel pools without the window that begins before the block.",
        "Max pooling in a fused kernel, whose tile begins with the block.",
        _fused(
            'first = (starts - size).div(stride, rounding_mode="floor") + 1',
            'first = (starts + stride - 1).div(stride, rounding_mode="floor")',
        ),
        functions=("score_blocks",),
    ),
    Mutant(
        "score_blocks.bf16",
        "score_blocks.values",
        "Block scores are rounded to bfloat16.",
        "A result stored in the input's dtype, against what is declared.",
        _fused(_POOLED, f"{_POOLED}.bfloat16().to(q.dtype)"),
        functions=("score_blocks",),
        claims={"dtypes": ("float32", "float64")},
    ),
    Mutant(
        "score_blocks.max-before-sum",
        "score_blocks.values",
        "Each head is pooled by itself; the maxima are summed.",
        "A fused kernel that loops over heads outside.",
        (
            Edit(
                "blocks",
                "for rows, positions, scores in _score_chunks(q, k_c1, k_c2, place, config):\n"
                "            if pooled:",
                "for rows, positions, scores in _score_chunks(q, k_c1, k_c2, place, config):\n"
                "            if pooled and q.shape[1] > k_c1.shape[1]:\n"
                "                heads = q.unflatten(1, (k_c1.shape[1], -1)).unbind(2)\n"
                "                each = [next(s for r, _, s in _score_chunks(h, k_c1, k_c2, place, "
                "config) if r == rows) for h in heads]\n"
                "                scores = sum(pool(s, positions, place.num_keys, config) "
                "for s in each)\n"
                "            elif pooled:",
            ),
        ),
        functions=("score_blocks",),
    ),
    Mutant(
        "score_blocks.batch-scale",
        "score_blocks.packed-alone",
        "All queries of a batch share one scale.",
        "Quantised products with one scale for a tensor.",
        wrap=Around(("score_blocks",), shared_scale("q")),
    ),
    Mutant(
        "fused_select.bf16-scores",
        "fused_select.certificate",
        "Block scores are rounded to bfloat16 before they are compared.",
        "Selection by sort keys of 16 bits.",
        _fused(
            _POOL_THEN_SELECT + "\n        result",
            _POOL_THEN_SELECT + ".bfloat16()\n        result",
        ),
        functions=("select",),
    ),
    Mutant(
        "fused_select.first-head-only",
        "fused_select.certificate",
        "Blocks are chosen by the first head of the group alone.",
        "The sum over the group left to a second pass that never runs.",
        (
            Edit(
                "windows",
                "range(1, per_head.shape[2])",
                "range(1, 1)",
            ),
        ),
        functions=("select",),
    ),
    Mutant(
        "fused_select.history-ignored",
        "fused_select.certificate",
        "The fused kernel places queries at the start of their keys.",
        "Top-left aligned masks.",
        (positions("torch.arange(self.num_queries, device=device)"),),
        functions=("select",),
    ),
    Mutant(
        "fused_select.ties-to-larger",
        "fused_select.ties",
        "Of equal scores the larger index is taken, in the fused kernel alone.",
        "A bitonic sort, or a scan from the last block to the first.",
        _fused(
            _SELECT,
            "later = 1 + 1e-9 * torch.arange(block_scores.shape[2], device=q.device, "
            "dtype=torch.float64)\n"
            "        result[:, rows] = select(block_scores.double() * later, positions, config)"
            "\n\n\ndef select_by_keys",
        ),
        functions=("select",),
    ),
    Mutant(
        "fused_select.padded-with-zero",
        "fused_select.format",
        "Rows with fewer blocks than the budget are filled with block 0.",
        "A buffer of zeros.",
        _fused("(*rows, budget + 1), -1, dtype", "(*rows, budget + 1), 0, dtype"),
        functions=("select",),
    ),
    Mutant(
        "fused_select.padding-up-to-64",
        "fused_select.format",
        "Only the first 64 slots of a row are padded with -1.",
        "A fill by one warp, or by one tile: the released budget is 96.",
        _fused(
            "(*rows, budget + 1), -1, dtype=torch.int32, device=blocks.device)",
            "(*rows, budget + 1), -1, dtype=torch.int32, device=blocks.device)\n"
            "    selected[..., 64:] = 0",
        ),
        functions=("select",),
    ),
    Mutant(
        "fused_select.batch-scale",
        "fused_select.packed-alone",
        "All queries of a batch share one scale.",
        "Quantised products with one scale for a tensor.",
        wrap=Around(("select",), shared_scale("q")),
    ),
)
