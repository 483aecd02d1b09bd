"""What a function must do at least: multiplications on matrix units, bytes moved, exponentials.

Each count is a floor, not what some kernel does: every input is read once and every output written
once, nothing in between is stored, invisible and unselected parts cost nothing, and a block that
is forced needs no score. `floor` turns it into seconds by the measured ceilings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infllmv2_reference.geometry import num_windows, overlapping_windows

from .workloads import Workload

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
INDEX_BYTES = 4
LSE_BYTES = 4
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Count:
    """Say what must be done.

    Args:
        flop: additions and multiplications of matrix products, two for each pair of factors.
        bytes: read from and written to memory.
        exps: exponentials.
    """

    flop: int = 0
    bytes: int = 0
    exps: int = 0

    def __add__(self, other: Count) -> Count:
        """Add up two pieces of work."""
        return Count(self.flop + other.flop, self.bytes + other.bytes, self.exps + other.exps)


@dataclass(frozen=True)
class Ceilings:
    """Hold what the machine reached in the same run; None where it was not measured.

    Args:
        copy: bytes per second of a large copy, read and written ones counted.
        matmul: floating-point operations per second of a large matrix product.
        exp: exponentials per second that leave the arithmetic units.
    """

    copy: float | None = None
    matmul: float | None = None
    exp: float | None = None


def floor(count: Count, ceilings: Ceilings) -> tuple[float, str]:
    """Return the seconds below which no implementation gets, and what binds it.

    >>> floor(Count(flop=10, bytes=40), Ceilings(copy=10.0, matmul=10.0))
    (4.0, 'bytes')
    """
    kinds = (
        ("flop", count.flop, ceilings.matmul),
        ("bytes", count.bytes, ceilings.copy),
        ("exps", count.exps, ceilings.exp),
    )
    times = [(amount / rate, name) for name, amount, rate in kinds if rate]
    return max(times, default=(0.0, ""))


def count(function: str, workload: Workload, score_bytes: int = 4) -> Count:
    """Count the work of a function of the contract, of its backward, or of dense attention.

    Args:
        function: such as `attend`, `attend.backward`, `compress_keys[k_c2]` or `dense`.
        workload: the shapes.
        score_bytes: of one stored score, as the implementation declares.
    """
    return _COUNTS[function](_Sizes(workload, score_bytes))


class _Sizes:
    """Count tokens, windows and blocks over the queries of one sequence."""

    def __init__(self, workload: Workload, score_bytes: int) -> None:
        self.w, self.config, self.score_bytes = workload, workload.config, score_bytes
        shape = workload.shape
        self.group, self.query_heads, self.kv_heads = shape.group, shape.query_heads, shape.kv_heads
        self.dim, self.batch = shape.head_dim, workload.batch
        self.element = DTYPE_BYTES[workload.dtype]
        self.positions: Counts = np.arange(workload.length - workload.queries, workload.length)
        self.own = self.positions // shape.block_size

    def rows(self, tokens: int, heads: int, width: int | None = None) -> int:
        """Return the bytes of a tensor of the inputs' dtype."""
        return self.batch * tokens * heads * (width or self.dim) * self.element

    @property
    def q(self) -> int:
        return self.rows(self.w.queries, self.query_heads)

    @property
    def kv(self) -> int:
        return self.rows(self.w.length, self.kv_heads)

    @property
    def lse(self) -> int:
        return self.batch * self.w.queries * self.query_heads * LSE_BYTES

    @property
    def selected(self) -> int:
        return self.batch * self.w.queries * self.kv_heads * self.config.budget * INDEX_BYTES

    def windows(self, which: int) -> int:
        """Return the bytes of K_C1 (`which` 1) or K_C2 (2)."""
        return self.rows(num_windows(self.w.length, *self._kernel(which)), self.kv_heads)

    def _kernel(self, which: int) -> tuple[int, int]:
        c = self.config
        if which == 1:
            return c.kernel_size, c.kernel_stride
        return c.lse_kernel_size, c.lse_kernel_stride

    def visible(self, which: int) -> Counts:
        """Return the windows that every query sees."""
        size, stride = self._kernel(which)
        counts = (self.positions + 1 - size) // stride + 1
        return np.where(self.positions + 1 >= size, counts, 0)

    def forced(self) -> Counts:
        """Return the forced blocks of every query."""
        return np.minimum(self.own + 1, self.config.init_blocks + self.config.local_blocks)

    def competing_windows(self) -> Counts:
        """Return the visible windows that touch a block which is selected by its score."""
        c = self.config
        blocks = (c.block_size, c.kernel_size, c.kernel_stride)
        first = overlapping_windows(c.init_blocks, *blocks)[0]
        last = self.own - c.local_blocks  # the last block that is not local
        ends = -(-(last + 1) * c.block_size // c.kernel_stride)  # as `overlapping_windows`
        inside = np.maximum(np.minimum(ends, self.visible(1)) - first, 0)
        return np.where(last >= c.init_blocks, inside, 0)

    def attended(self) -> int:
        """Return the pairs of a query and a token of a selected block, for one kv head."""
        blocks = np.minimum(self.own + 1, self.config.budget)
        future = self.config.block_size - 1 - self.positions % self.config.block_size
        return int((blocks * self.config.block_size - future).sum())

    def distinct(self) -> int:
        """Return the bytes of the keys that must be read: of one query, those that it attends."""
        tokens = self.attended() if self.w.queries == 1 else self.w.length
        return self.rows(min(tokens, self.w.length), self.kv_heads)

    def pairs(self, per_kv_head: int) -> int:
        """Return the pairs of a query head and a token, in all sequences."""
        return per_kv_head * self.query_heads * self.batch


def _compress(s: _Sizes, which: int = 1) -> Count:
    return Count(bytes=s.kv + s.windows(which))


def _append(s: _Sizes) -> Count:
    """Count one new token of each sequence: it is stored; a window now and then is left out."""
    return Count(bytes=4 * s.rows(1, s.kv_heads))


def _scoring(s: _Sizes, scored: Counts) -> Count:
    """Count scores of `scored` windows per query, their normaliser included."""
    if s.config.lse == "exact":
        products = exps = int(s.visible(1).sum())
    else:
        products = exps = int(scored.sum() + s.visible(2).sum())
    read = s.q + s.windows(1) + (s.windows(2) if s.config.lse == "approximate" else 0)
    return Count(2 * s.dim * s.pairs(products), read, s.pairs(exps))


def _scores(s: _Sizes, amount: Counts) -> int:
    return int(amount.sum()) * s.kv_heads * s.batch * s.score_bytes


def _score_windows(s: _Sizes) -> Count:
    return _scoring(s, s.visible(1)) + Count(bytes=_scores(s, s.visible(1)))


def _pool_blocks(s: _Sizes) -> Count:
    return Count(bytes=_scores(s, s.visible(1)) + _scores(s, s.own + 1))


def _select_blocks(s: _Sizes) -> Count:
    return Count(bytes=_scores(s, s.own + 1 - s.forced()) + s.selected)


def _score_blocks(s: _Sizes) -> Count:
    written = _scores(s, s.own + 1 - s.forced())
    return _scoring(s, s.competing_windows()) + Count(bytes=written)


def _select(s: _Sizes) -> Count:
    return _scoring(s, s.competing_windows()) + Count(bytes=s.selected)


def _attend(s: _Sizes) -> Count:
    pairs = s.pairs(s.attended())
    moved = 2 * s.q + s.lse + s.selected + 2 * s.distinct()
    return Count(4 * s.dim * pairs, moved, pairs)


def _attend_backward(s: _Sizes) -> Count:
    """Count five products; q, k, v, out, its gradient, LSE and indices in, three gradients out."""
    pairs = s.pairs(s.attended())
    moved = 4 * s.q + s.lse + s.selected + 4 * s.kv
    return Count(10 * s.dim * pairs, moved, pairs)


def _attention(s: _Sizes) -> Count:
    """Count selection and attention; q and k are read once for both, and no window is stored."""
    selection = _scoring(s, s.competing_windows())
    attend = _attend(s)
    return Count(selection.flop + attend.flop, attend.bytes, selection.exps + attend.exps)


def _decode(s: _Sizes) -> Count:
    """Count as `attention`, but the windows lie in the cache and must be read."""
    return _attention(s) + Count(bytes=s.windows(1) + s.windows(2))


def _dense_pairs(s: _Sizes) -> int:
    return s.pairs(int((s.positions + 1).sum()))


def _dense(s: _Sizes) -> Count:
    pairs = _dense_pairs(s)
    return Count(4 * s.dim * pairs, 2 * s.q + s.lse + 2 * s.kv, pairs)


def _dense_backward(s: _Sizes) -> Count:
    pairs = _dense_pairs(s)
    return Count(10 * s.dim * pairs, 4 * s.q + s.lse + 4 * s.kv, pairs)


_COUNTS: dict[str, Callable[[Any], Count]] = {
    "compress_keys": _compress,
    "compress_keys[k_c2]": lambda s: _compress(s, 2),
    "score_windows": _score_windows,
    "pool_blocks": _pool_blocks,
    "select_blocks": _select_blocks,
    "score_blocks": _score_blocks,
    "select": _select,
    "attend": _attend,
    "attend.backward": _attend_backward,
    "attention": _attention,
    "attention.backward": _attend_backward,
    "append": _append,
    "decode": _decode,
    "dense": _dense,
    "dense.backward": _dense_backward,
}
FUNCTIONS = tuple(_COUNTS)
