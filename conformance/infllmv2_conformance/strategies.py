"""Draw cases that an implementation claims to support, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from .capabilities import Capabilities
from .cases import REGIMES, Case

if TYPE_CHECKING:
    from .runner import Runner

GROUPS = (2, 1, 16, 7, 4, 8, 32)
HEAD_DIMS = (64, 128, 32, 96, 256)
KV_HEADS = (2, 1, 3)
BLOCKS = (
    (16, 8, 4),
    (64, 32, 16),
    (32, 16, 8),
    (16, 5, 3),
    (64, 64, 64),
    (128, 64, 32),
    (32, 32, 32),
    (16, 24, 8),
    (48, 12, 7),
)
"""(block size, kernel size, kernel stride): the released one scaled, 1-stage, and odd ones."""
LSE_RATIOS = (4, 2, 1, 3)
BLOCKS_AT_LEAST = 10
"""The longest sequence has so many blocks, whatever the profile: else few would compete."""


def shape_classes(claims: Capabilities, count: int) -> list[dict[str, Any]]:
    """Return combinations of group, head dim, heads, block and windows that are claimed.

    They are few, because each one is a compilation for an implementation that specialises, and
    they walk through each list with a step of its own, so that every claimed value occurs.
    """
    groups = claims.group_sizes or GROUPS
    dims = claims.head_dims or HEAD_DIMS
    blocks = _claimed_blocks(claims)
    classes: list[dict[str, Any]] = []
    for i in range(max(count, len(groups), len(dims), len(blocks))):
        block_size, kernel_size, kernel_stride = blocks[i % len(blocks)]
        classes.append(
            {
                "group": groups[i % len(groups)],
                "head_dim": dims[(i + i // len(groups)) % len(dims)],
                "kv_heads": KV_HEADS[i % len(KV_HEADS)],
                "block_size": block_size,
                "kernel_size": kernel_size,
                "kernel_stride": kernel_stride,
            }
        )
    return classes


def _claimed_blocks(claims: Capabilities) -> list[tuple[int, int, int]]:
    if claims.windows is None and claims.block_sizes is None:
        return list(BLOCKS)
    known = [
        row
        for row in BLOCKS
        if (claims.block_sizes is None or row[0] in claims.block_sizes)
        and (claims.windows is None or row[1:] in claims.windows)
    ]
    sizes = claims.block_sizes or (64,)
    windows = claims.windows or ((32, 16),)
    every = [(size, length, stride) for size in sizes for length, stride in windows]
    return known + [row for row in every if row not in known]


def corner(
    claims: Capabilities, shape: dict[str, Any], *sequences: tuple[int, int], **fields: Any
) -> Case:
    """Return a case of chosen lengths, in the first claimed dtype and modes."""
    claimed: dict[str, Any] = {
        "dtype": claims.dtypes[0],
        "window_size": shape["block_size"],
        "lse": claims.lse_modes[0] if claims.lse_modes else "approximate",
        "lse_ratio": (claims.lse_ratios or LSE_RATIOS)[0],
        "pooling": claims.pooling_modes[0] if claims.pooling_modes else "overlap",
    }
    return Case(sequences, **(shape | claimed | fields))


def many_blocks(run: Runner, count: int = 100) -> list[Case]:
    """Return a case with more blocks than any released budget, in the smallest claimed block."""
    claims = run.candidate.capabilities
    shapes = shape_classes(claims, run.profile.shape_classes)
    shape = min(shapes, key=lambda s: (s["block_size"], s["group"] * s["head_dim"]))
    keys = min(count * shape["block_size"], claims.longest_context)
    if not claims.history:
        keys = min(keys, int((run.profile.max_pairs / shape["group"]) ** 0.5))
    queries = 3 if claims.history else keys
    return [corner(claims, shape, (queries, keys), kv_heads=1)]


def lengths(shape: dict[str, Any], longest: int) -> st.SearchStrategy[int]:
    """Draw a number of keys: any, or a corner of windows and blocks, and one to either side."""
    size, stride, b = shape["kernel_size"], shape["kernel_stride"], shape["block_size"]
    corners = {0, 1, size - 1, size, size + stride - 1, size + stride, 4 * size - 1, 4 * size}
    corners |= {b - 1, b, b + 1}
    corners |= {m * b + d for m in (2, 3, 5, 8) for d in (-1, 0, 1)}
    usable = sorted(c for c in corners if 0 <= c <= longest)
    return st.one_of(st.sampled_from(usable), st.integers(0, longest))


def cases(
    run: Runner,
    *,
    regimes: tuple[str, ...] = REGIMES,
    lse: tuple[str, ...] = ("approximate", "exact"),
    min_sequences: int = 0,
    max_sequences: int = 3,
    min_keys: int = 0,
    max_keys: int | None = None,
    supply: bool = False,
    dense: bool = False,
    spare_budget: bool = True,
    use_nope: bool = False,
    competing: bool = False,
) -> st.SearchStrategy[Case]:
    """Draw cases for a rule.

    Args:
        run: whose claims and profile limit what is drawn.
        regimes: kinds of input.
        lse: normalisers of the scores.
        min_sequences: fewest sequences of a batch.
        max_sequences: most sequences of a batch.
        min_keys: fewest keys of a sequence.
        max_keys: most keys of a sequence; the profile's unless given.
        supply: every key has a query, and no limit on their product: for rules that call with
            parts of the tensors.
        dense: draw `dense_len` near the lengths, instead of always sparse.
        spare_budget: the budget may exceed the forced blocks.
        use_nope: draw `use_nope` too, if claimed.
        competing: the first sequence has more blocks than the budget, so that its last rows pass
            some over: for rules that show through the selection alone.
    """
    claims = run.candidate.capabilities
    classes = shape_classes(claims, run.profile.shape_classes)
    longest = max_keys or run.profile.max_keys
    modes = [m for m in lse if m in claims.lse_modes]
    lowest = 0 if claims.empty_sequences else 1
    at_least, at_most = max(min_sequences, 1), max_sequences if claims.packed else 1

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        shape = draw(st.sampled_from(classes))
        window_blocks = draw(st.integers(0, 3))
        init_blocks = draw(st.sampled_from((1, 0, 2)))
        extra = draw(st.integers(1 if competing else 0, 5)) if spare_budget else 0
        override = draw(st.sampled_from((None, max(window_blocks, 1))))
        local_blocks = override or window_blocks + 1
        budget = init_blocks + local_blocks + extra
        most_keys = longest if max_keys else max(longest, BLOCKS_AT_LEAST * shape["block_size"])
        most_keys = min(most_keys, claims.longest_context)
        keys = lengths(shape, most_keys).filter(lambda s: s >= max(min_keys, lowest))
        sequences: list[tuple[int, int]] = []
        room = max(run.profile.max_pairs // (shape["group"] * shape["kv_heads"]), 1)
        for i in range(draw(st.integers(min(at_least, at_most), at_most))):
            num_keys = draw(keys)
            if competing and i == 0:
                blocks = budget + 1 + draw(st.integers(0, 3))
                num_keys = blocks * shape["block_size"] + draw(st.integers(0, shape["block_size"]))
                num_keys = min(num_keys, claims.longest_context)
            most = min(num_keys, max(room // max(num_keys, 1), 1))
            num_queries = num_keys
            if not supply and not claims.history:
                num_keys = num_queries = min(num_keys, int(room**0.5))
            elif not supply:
                corners = [t for t in (num_keys, 1) if lowest <= t <= most]
                num_queries = draw(
                    st.one_of(st.sampled_from(corners or [most]), st.integers(lowest, most))
                )
            sequences.append((num_queries, num_keys))
        return Case(
            sequences=tuple(sequences),
            **shape,
            dtype=draw(st.sampled_from(claims.dtypes)),
            init_blocks=init_blocks,
            window_size=window_blocks * shape["block_size"],
            local_override=override,
            topk=budget - window_blocks,
            dense_len=draw(_dense_lens(sequences)) if dense else -1,
            use_nope=draw(st.booleans()) if use_nope and claims.use_nope else False,
            lse=draw(st.sampled_from(modes)) if modes else "approximate",
            lse_ratio=draw(st.sampled_from(claims.lse_ratios or LSE_RATIOS)),
            pooling=draw(_pooling(claims, shape)),
            regime=draw(st.sampled_from(regimes)),
            seed=draw(st.integers(0, 9999)),
            choice=draw(st.integers(0, 9999)),
        )

    return draw_case()


def _dense_lens(sequences: list[tuple[int, int]]) -> st.SearchStrategy[int]:
    near = {max(s + d, 0) for _, s in sequences for d in (-1, 0, 1)}
    return st.sampled_from([-1, *sorted(near)])


def _pooling(claims: Capabilities, shape: dict[str, Any]) -> st.SearchStrategy[str]:
    stride = shape["kernel_stride"]
    divides = shape["block_size"] % stride == 0 and shape["kernel_size"] % stride == 0
    return st.sampled_from([m for m in claims.pooling_modes if m == "overlap" or divides])
