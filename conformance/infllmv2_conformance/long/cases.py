"""Which long calls are made: as many queries as the device can answer in the time of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from infllmv2_conformance.capabilities import Capabilities
from infllmv2_conformance.cases import Case
from infllmv2_conformance.strategies import shape_classes
from infllmv2_reference.geometry import num_blocks, num_windows

RELEASED = {
    "group": 16,
    "kv_heads": 2,
    "head_dim": 128,
    "block_size": 64,
    "kernel_size": 32,
    "kernel_stride": 16,
}
BLOCK_FIELDS = ("block_size", "kernel_size", "kernel_stride")
SHORT = (33, 700)
"""Queries and keys of the sequence that stands before the long one, if batches are claimed."""
CPU_WORK, CPU_SIZE = 1 << 33, 1 << 28
"""What a CPU can do in about half a minute, and the bytes of a tensor that it can hold many of."""
NARROW_DIM, NARROW_GROUP = 64, 8
"""Narrower heads and groups cost as much: what is not multiplied is still moved."""


@dataclass(frozen=True)
class Means:
    """Say what one call may cost.

    Args:
        work: products of queries with windows and tokens, over all heads and channels.
        size: bytes of the largest tensor.
    """

    work: int
    size: int

    @classmethod
    def of(cls, device: torch.device) -> Means:
        """Return what a device can do in about half a minute, and in a part of its memory.

        On CUDA the work admits a prefill of 2**20 tokens with 32 heads, and the size, where there
        is that much memory, scores whose offsets exceed 2**31.
        """
        if device.type == "cpu":
            return cls(CPU_WORK, CPU_SIZE)
        _, total = torch.cuda.mem_get_info(device)
        return cls(work=1 << 49, size=min(total // 5, 9 << 30))


@dataclass(frozen=True)
class Plan:
    """Make the long cases of one implementation.

    Args:
        claims: what it claims.
        means: what one call may cost.
        length: keys of the long sequence.
    """

    claims: Capabilities
    means: Means
    length: int

    def released(self, columns: str = "", **fields: Any) -> Case:
        """Return a case of the released shape, or of the claimed one that is most like it.

        Args:
            columns: "windows" or "blocks" if the call holds a number for each and every query.
            fields: other fields of the case; `rows` for the number of queries.
        """
        shape = _nearest(self.claims)
        budget: dict[str, Any] = {"window_size": 4 * shape["block_size"], "topk": 16}
        if shape["block_size"] == RELEASED["block_size"]:
            budget = {"window_size": 2048, "topk": 64}
        values = {"dtype": self._dtype(0), "lse": self._lse(0)}
        values |= shape | budget | {"dense_len": min(8192, self.length)}
        return self._history(values | fields, columns)

    def fine(self, columns: str = "", **fields: Any) -> Case:
        """Return a case with few small heads and the smallest claimed blocks: many blocks."""
        shape = _finest(self.claims)
        budget = {"window_size": shape["block_size"], "topk": 24, "init_blocks": 2}
        values = {"dtype": self._dtype(1), "lse": self._lse(1)}
        return self._history(values | shape | budget | fields, columns)

    def wide(self, **fields: Any) -> Case:
        """Return a prefill with few small heads, as long as the work admits: many queries."""
        shape = _finest(self.claims)
        if _claims_released_blocks(self.claims):
            shape |= {name: RELEASED[name] for name in BLOCK_FIELDS}
        budget = {"window_size": shape["block_size"], "topk": 6}
        values = {"dtype": self._dtype(1), "lse": self._lse(0)}
        case = self._case(values | shape | budget | fields, 1)
        length = self.length
        if self.claims.history:
            while length > 256 and _work(case, length) * length > self.means.work:
                length = length * 7 // 8
        return case.with_(sequences=((length, length),))

    def dense(self, **fields: Any) -> Case:
        """Return a case of the released shape that is one key too short to run sparse."""
        case = self.released(dense_len=self.length + 1, **fields)
        *others, (rows, keys) = case.sequences
        row = 4 * keys * case.query_heads * max(case.head_dim, NARROW_DIM)
        if self.claims.history:
            rows = max(1, min(rows, self.means.work // row))
        return case.with_(sequences=(*others, (rows, keys)))

    def _history(self, fields: dict[str, Any], columns: str) -> Case:
        """Return a case of the last queries of a long history, after a short sequence."""
        rows = fields.pop("rows", 0)
        case = self._case(fields, 1)
        if not rows:
            rows = max(1, self.means.work // _work(case, self.length))
            if columns:
                rows = max(1, min(rows, self.means.size // _row_bytes(case, columns, self.length)))
        if rows >= self.length or not self.claims.history:
            rows = self.length
        short = SHORT if self.claims.history else (SHORT[1], SHORT[1])
        long = (rows, self.length)
        return case.with_(sequences=(short, long) if self.claims.packed else (long,))

    def _case(self, fields: dict[str, Any], rows: int) -> Case:
        pooling = self.claims.pooling_modes
        values: dict[str, Any] = {"pooling": pooling[0] if pooling else "overlap"}
        return Case(((rows, self.length),), **(values | fields))

    def _lse(self, index: int) -> str:
        """Return the approximate normaliser if it is claimed; `index` 1 asks for the other one."""
        modes = [m for m in ("approximate", "exact") if m in self.claims.lse_modes]
        return modes[index % len(modes)] if modes else "approximate"

    def _dtype(self, index: int) -> str:
        """Return bfloat16 if it is claimed; `index` 1 asks for another one."""
        order = ("bfloat16", "float16", "float32", "float64")
        claimed = [d for d in order if d in self.claims.dtypes]
        return claimed[index % len(claimed)]


def _row_bytes(case: Case, columns: str, length: int) -> int:
    """Return the bytes of one query's scores of windows or blocks."""
    if columns == "blocks":
        return max(1, num_blocks(length, case.block_size) * case.kv_heads * 4)
    return max(1, num_windows(length, case.kernel_size, case.kernel_stride) * case.kv_heads * 4)


def _work(case: Case, length: int) -> int:
    """Return what one query over `length` keys costs: scoring windows and attending blocks."""
    windows = num_windows(length, case.kernel_size, case.kernel_stride)
    attended = min(case.config.budget * case.block_size, length)
    heads = case.kv_heads * max(case.group, NARROW_GROUP)
    return (windows * case.query_heads + attended * heads) * max(case.head_dim, NARROW_DIM)


def _nearest(claims: Capabilities) -> dict[str, int]:
    """Return the claimed shape that is most like the released one."""
    shape = dict(RELEASED)
    shape["group"] = _nearest_to(claims.group_sizes, RELEASED["group"])
    shape["head_dim"] = _nearest_to(claims.head_dims, RELEASED["head_dim"])
    if not _claims_released_blocks(claims):
        first = shape_classes(claims, 1)[0]
        shape |= {name: first[name] for name in BLOCK_FIELDS}
    return shape


def _finest(claims: Capabilities) -> dict[str, int]:
    """Return the claimed shape with the smallest blocks and heads."""
    classes = shape_classes(claims, 1)
    least = min(classes, key=lambda c: (c["block_size"], -c["kernel_size"] % c["kernel_stride"]))
    return {
        **{name: least[name] for name in BLOCK_FIELDS},
        "group": min(claims.group_sizes or (2,)),
        "head_dim": min(claims.head_dims or (32,)),
        "kv_heads": 1,
    }


def _nearest_to(claimed: tuple[int, ...] | None, wanted: int) -> int:
    return min(claimed or (wanted,), key=lambda n: abs(n - wanted))


def _claims_released_blocks(claims: Capabilities) -> bool:
    sizes, windows = claims.block_sizes, claims.windows
    window = (RELEASED["kernel_size"], RELEASED["kernel_stride"])
    return (sizes is None or RELEASED["block_size"] in sizes) and (
        windows is None or window in windows
    )
