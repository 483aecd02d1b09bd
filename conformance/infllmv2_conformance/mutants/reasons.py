"""Why a rule stays that kills no mutant before another one does, or kills none at all.

`infllmv2 mutants` fails for a rule that kills nothing first and has no reason here, and for a
reason that no longer holds.
"""

from __future__ import annotations

_GUARDED = "Every call is guarded, so the first rule of the stage meets the fault; this names it."
REASONS: dict[str, str] = {
    "score.visibility": (
        "It finds nothing that score.values-* cannot: they draw lengths at random and mostly meet "
        "the position that matters. It visits every end of a window in every claimed shape, so "
        "that finding the fault is no luck, and its name says what to look at."
    ),
    "score.shift": (
        "score.invisible-not-read holds large windows as well, and rows that see them fail there "
        "first. Here all logits of all rows are large, some far below 0 and some far above, so "
        "that a lost maximum shows in every case instead of in some."
    ),
    "score.no-normaliser": (
        "It finds nothing that score.values-approximate cannot, whose prefills begin with such "
        "rows. Its failure says that decision D4 is what is broken."
    ),
    "score.large-logits": (
        "score.invisible-not-read holds windows so large that rows which see them overflow a naive "
        "exponential first. Here no window is out of the ordinary, only the logits are large, so "
        "that the failure speaks of overflow, and infinities beyond the range are admitted."
    ),
    "pool.edges": (
        "It finds nothing that pool.values cannot, which needed 22 cases for one of its faults. "
        "It visits the first, the last and the partial block in every claimed shape."
    ),
    "attend.gradient-repeatable": (
        "attend.gradients sees noise in the last bit where a gradient is exact and its bound 0. "
        "Here every bit of every gradient counts, whatever the arithmetic that is declared."
    ),
    "attend.every-token": (
        "attend.values draws the same regime, in one case of nine. Here every case has a channel "
        "for each token, which shows a lost one even where bounds are wide, because a kernel "
        "declares coarse arithmetic or the context is long."
    ),
    "attend.partial-block": (
        "It finds nothing that attend.values cannot. Every one of its sequences is short and most "
        "end inside a block: if it passes while attend.values fails, the end is not the fault."
    ),
    "attend.group-mapping": (
        "attend.values has several heads too, but of one magnitude. Here each key/value head has "
        "its own, so that a share of a wrong head stands out: by 4 to 16 times at most."
    ),
    "attention.permutation": (
        "It finds nothing that attention.values cannot, which draws lengths in any order. It "
        "reverses them, so that one of the two is not sorted, whatever the seed."
    ),
    "contract.inputs-unchanged": _GUARDED,
    "contract.fully-written": _GUARDED,
    "contract.red-zones": _GUARDED,
    "contract.streams": "It applies on CUDA alone, and mutants run on a CPU.",
}
"""Rules whose faults another rule meets before them, each with what it is there for."""
