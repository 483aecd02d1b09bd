"""Wrong sums of attention: its softmax, its accumulators and its LSE."""

from __future__ import annotations

from infllmv2_conformance.mutants.model import Mutant

from .attend import GATHER, SPARSE_TILE, STEP, edit_attend, edit_tiles

_TOP = "top = logits.amax(dim=-1, keepdim=True)"
_LSE = "top + total.log()"
_VALUES = "values = weights @ tile.gather(values, q.dtype)"


MUTANTS = (
    Mutant(
        "attend.bf16-accumulation",
        "attend.values",
        "Sums of values are rounded to bfloat16 for every tile.",
        "An accumulator kept in the output's dtype.",
        (
            edit_attend(
                _VALUES, "values = (weights @ tile.gather(values, q.dtype)).bfloat16().to(q.dtype)"
            ),
        ),
    ),
    Mutant(
        "attend.fp16-accumulation",
        "attend.values",
        "Sums of values are rounded to float16: they overflow at 65504.",
        "Half-precision accumulators, fast on consumer GPUs.",
        (
            edit_attend(
                _VALUES, "values = (weights @ tile.gather(values, q.dtype)).half().to(q.dtype)"
            ),
        ),
    ),
    Mutant(
        "attend.rounded-probabilities",
        "attend.values",
        "Probabilities are rounded to bfloat16, although float32 is declared.",
        "FlashAttention's P tile: fine if it is said.",
        (edit_attend(_VALUES, f"{_VALUES.replace('weights', 'weights.bfloat16().to(q.dtype)')}"),),
    ),
    Mutant(
        "attend.naive-exponential",
        "attend.values",
        "No maximum is subtracted before the exponential.",
        "Textbook softmax: overflows at logits of 88.",
        (edit_attend(_TOP, "top = torch.zeros_like(logits[..., :1])"),),
    ),
    Mutant(
        "attend.maximum-from-zero",
        "attend.values",
        "The running maximum starts at 0, so that very negative logits underflow.",
        "m = 0 in place of -inf in an online softmax.",
        (edit_attend(_TOP, f"{_TOP}.clamp(min=0)"),),
    ),
    Mutant(
        "attend.not-rescaled",
        "attend.values",
        "What was summed before is not rescaled when a later block has a larger logit.",
        "The correction factor of an online softmax left out.",
        (
            edit_tiles(STEP, "step = 1"),
            edit_attend(
                "shares = [(x - _finite(top)).exp() for x in (a[1], b[1])]",
                "shares = [(x > -torch.inf).to(x.dtype) for x in (a[1], b[1])]\n"
                "    shares[1] = (b[1] - _finite(top)).exp()",
            ),
        ),
    ),
    Mutant(
        "attend.maximum-of-first-block",
        "attend.values",
        "The maximum of the first block stays: a much larger logit of a later one overflows.",
        "A running maximum that is raised only now and then, to save the rescaling.",
        (
            edit_tiles(STEP, "step = 1"),
            edit_attend(
                "top = torch.maximum(a[1], b[1])",
                "top = torch.where(a[1] == -torch.inf, b[1], a[1])",
            ),
        ),
    ),
    Mutant(
        "attend.max-before-mask",
        "attend.values",
        "The row's maximum is taken over all loaded tokens, the masked ones included.",
        "A maximum taken before the mask: harmless until a masked key is large.",
        (
            edit_tiles(
                SPARSE_TILE,
                "heads = torch.arange(len(tokens), device=tokens.device)[:, None, None]\n"
                "    there = tokens.clamp(min=0, max=int(positions[-1])).flatten(2)\n"
                "    return Tile(there * len(tokens) + heads, admitted.flatten(2))",
            ),
            edit_tiles(GATHER, "return gathered.to(dtype)"),
            edit_attend(
                f"    {_TOP}\n",
                "    every = tile.gather(keys, q.dtype)\n"
                "    every = q.reshape(*every.shape[:2], -1, q.shape[-1]) @ every.mT\n"
                "    top = (every * q.shape[-1] ** -0.5).amax(dim=-1, keepdim=True)\n"
                "    none = logits.amax(dim=-1, keepdim=True) == -torch.inf\n"
                "    top = top.masked_fill(none, -torch.inf)\n",
            ),
        ),
    ),
    Mutant(
        "attend.lse-base-2",
        "attend.lse",
        "The LSE is in base 2.",
        "exp2 kernels that forget to convert.",
        (edit_attend(_LSE, f"({_LSE}) * 1.4426950408889634"),),
    ),
    Mutant(
        "attend.lse-without-maximum",
        "attend.lse",
        "The LSE lacks the maximum that was subtracted.",
        "The logarithm of a sum of shifted exponentials.",
        (edit_attend(_LSE, "total.log()"),),
    ),
    Mutant(
        "attend.lse-off-by-constant",
        "attend.lse",
        "The LSE is too large by 1e-4.",
        "A constant epsilon added to the denominator.",
        (edit_attend(_LSE, f"{_LSE} + 1e-4"),),
    ),
    Mutant(
        "attend.empty-row-nan",
        "attend.few-blocks",
        "Rows with nothing to attend divide by zero.",
        "0 / 0 in the last step of an online softmax.",
        (edit_attend("out /= total_or_1[..., None]", "out /= total[..., None]"),),
    ),
    Mutant(
        "attend.empty-row-lse",
        "attend.few-blocks",
        "Rows with nothing to attend have LSE 0.",
        "-inf replaced by 0 to avoid NaN; it spoils a merge of partial results.",
        (edit_attend(_LSE, f"torch.where(total == 0, 0, {_LSE})"),),
    ),
)
