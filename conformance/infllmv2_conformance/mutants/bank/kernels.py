"""Faults of the kind that GPU kernels have, in small Triton kernels that run in the interpreter."""

from __future__ import annotations

from infllmv2_conformance.mutants.model import Edit, Mutant


def _triton(
    id: str, rule: str, sentence: str, seen: str, function: str, *edits: tuple[str, str]
) -> Mutant:
    """Return a mutant of the module that holds one function."""
    module = "attend" if function == "attend" else "windows"
    changes = tuple(Edit(module, before, after) for before, after in edits)
    return Mutant(id, rule, sentence, seen, changes, functions=(function,), base="triton")


_ANY_HEAD = "(group < GROUP)[:, None] & (at_q < total_q * HEADS * GROUP * DIM)"
_ACCUMULATORS = (
    'top = tl.full([GROUP_TILE], -float("inf"), tl.float32)',
    "total = tl.zeros([GROUP_TILE], tl.float32)",
    "sums = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)",
)
_ROW = "row = tl.program_id(0) * ROWS + step"
_LOOP = "    for step in range(ROWS):\n"
_VALUES = "tl.load(v + at_k, mask=loaded, other=0.0)"

MUTANTS = (
    _triton(
        "compress.triton-unmasked-load",
        "compress.tail-not-read",
        "A tile is loaded up to its power of two, and weighted by 0 behind the window.",
        "A bounds mask left out of a load: 0 times NaN is NaN.",
        "compress_keys",
        ("mask=real, other=0.0)", "mask=(columns < ROW)[None, :], other=0.0)"),
        ("tl.sum(keys, 0) / SIZE", "tl.sum(keys * (tokens < SIZE)[:, None], 0) / SIZE"),
    ),
    _triton(
        "compress.triton-offset-overflow",
        "compress.values",
        "Offsets into the keys keep 10 bits.",
        "32-bit offsets at 2^31 elements; here at fewer, so that it shows on small cases.",
        "compress_keys",
        ("tl.load(k + at, mask=real", "tl.load(k + (at & 1023), mask=real"),
    ),
    _triton(
        "pool.triton-other-0",
        "pool.values",
        "Masked lanes of a load hold 0, not -inf.",
        "`other=` left out of a load, or with the number of another reduction.",
        "pool_blocks",
        ('other=-float("inf")', "other=0.0"),
    ),
    _triton(
        "attend.triton-masked-lanes",
        "attend.values",
        "Masked lanes of a load of values hold NaN, and are weighted by 0.",
        "`other=` left out of a load: the lanes hold whatever the registers held.",
        "attend",
        (_VALUES, _VALUES.replace("0.0", 'float("nan")')),
    ),
    _triton(
        "attend.triton-accumulator-kept",
        "attend.values",
        "The maximum and the sums of a row begin with those of the row before.",
        "An accumulator cleared outside the loop of a persistent kernel.",
        "attend",
        *((f"        {line}\n", "") for line in _ACCUMULATORS),
        (_LOOP, "".join(f"    {line}\n" for line in _ACCUMULATORS) + _LOOP),
    ),
    _triton(
        "attend.triton-store-too-wide",
        "attend.values",
        "Channels are stored up to the tile's power of two, into the next head.",
        "A mask left out of a store. Two programs write one place; here the wrong one comes last.",
        "attend",
        (_ROW, _ROW.replace("tl.program_id(0)", "(tl.num_programs(0) - 1 - tl.program_id(0))")),
        ("sums / some[:, None], mask=real)", f"sums / some[:, None], mask={_ANY_HEAD})"),
    ),
    _triton(
        "attend.triton-grid-rounded-down",
        "attend.values",
        "The last rows have no program, unless their number is a multiple of those of one.",
        "`//` for `cdiv` in the grid.",
        "attend",
        ("triton.cdiv(total_q, ROWS)", "total_q // ROWS"),
    ),
    _triton(
        "attend.triton-offset-overflow",
        "attend.values",
        "Offsets into keys and values keep 10 bits.",
        "32-bit offsets at 2^31 elements; here at fewer, so that it shows on small cases.",
        "attend",
        ("tl.load(k + at_k,", "tl.load(k + (at_k & 1023),"),
        ("tl.load(v + at_k,", "tl.load(v + (at_k & 1023),"),
    ),
)
