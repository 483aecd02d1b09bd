"""Take results apart: check their form, then cut them into sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .failure import fail
from .oracle import Oracle
from .returned import check_plain

Piece = tuple[Tensor | None, ...]
"""The tensors of one sequence that a function returned."""


def split(function: str, result: Any, oracle: Oracle, returns: frozenset[str]) -> list[Piece]:
    """Check the form of a result and return the part of every sequence.

    Args:
        function: the contract function.
        result: what it returned.
        oracle: what the sizes follow from.
        returns: which optional results are claimed: "lse" and "selection".

    Raises:
        ConformanceFailure: a shape, dtype, device or count is wrong.
    """
    if function == "compress_keys":
        return _split_windows(result, oracle)
    if function in ("attend", "attention"):
        return _split_attention(function, result, oracle, returns)
    widths = {
        "score_windows": [len(w[0][0]) for w in oracle.windows],
        "pool_blocks": [-(-s.num_keys // oracle.config.block_size) for s in oracle.spans],
    }
    widths["score_blocks"] = widths["pool_blocks"]
    selects = function in ("select", "select_blocks")
    width = oracle.config.budget if selects else max(widths[function], default=0)
    heads, total = oracle.case.kv_heads, len(oracle.inputs.q)
    kinds = (torch.int32,) if selects else ()
    _check_tensor(function, result, (heads, total, width), oracle, kinds, wider=not selects)
    return [
        (result[:, s.queries, : width if selects else widths[function][s.sequence]],)
        for s in oracle.spans
    ]


def _split_windows(result: Any, oracle: Oracle) -> list[Piece]:
    if not isinstance(result, tuple) or len(result) != 2:
        fail("compress_keys must return (windows, cu_seqlens_c)", actual=repr(type(result)))
    windows, cu_seqlens = result
    _, expected = oracle.packed_windows(0)
    _check_tensor("cu_seqlens_c", cu_seqlens, tuple(expected.shape), oracle, (torch.int32,))
    if cu_seqlens.tolist() != expected.tolist():
        counts, wanted = cu_seqlens.diff().tolist(), expected.diff().tolist()
        first = next((i for i, (a, b) in enumerate(zip(counts, wanted, strict=True)) if a != b), 0)
        fail(
            "the number of windows is wrong",
            where={"sequence": first, "keys": oracle.spans[first].num_keys if oracle.spans else 0},
            expected=f"cu_seqlens_c {expected.tolist()}",
            actual=f"cu_seqlens_c {cu_seqlens.tolist()}",
        )
    k = oracle.inputs.k
    shape = (int(expected[-1]), *k.shape[1:])
    _check_tensor("windows", windows, shape, oracle, (k.dtype,), longer=True)
    ends = expected.tolist()
    return [(windows[ends[i] : ends[i + 1]],) for i in range(len(ends) - 1)]


def _split_attention(
    function: str, result: Any, oracle: Oracle, returns: frozenset[str]
) -> list[Piece]:
    count = 2 if function == "attend" else 3
    if not isinstance(result, tuple) or len(result) != count:
        names = ("out", "lse", "selected")[:count]
        fail(f"{function} must return ({', '.join(names)})", actual=repr(type(result)))
    parts: list[Any] = [*result, None]
    out, lse, selected = parts[:3]
    q, config = oracle.inputs.q, oracle.config
    _check_tensor("out", out, tuple(q.shape), oracle, (q.dtype,))
    if "lse" in returns:
        wide = (torch.float32, torch.float64)
        _check_tensor("lse", lse, (len(q), q.shape[1]), oracle, wide)
    else:
        lse = None
    if function == "attention" and "selection" in returns:
        shape = (oracle.case.kv_heads, len(q), config.budget)
        _check_tensor("selected", selected, shape, oracle, (torch.int32,))
    else:
        selected = None
    pieces = [
        (
            out[s.queries],
            None if lse is None else lse[s.queries],
            None if selected is None else selected[:, s.queries],
        )
        for s in oracle.spans
    ]
    return [piece[:count] for piece in pieces]


def _check_tensor(
    name: str,
    value: Any,
    shape: tuple[int, ...],
    oracle: Oracle,
    dtypes: tuple[torch.dtype, ...] = (),
    *,
    wider: bool = False,
    longer: bool = False,
) -> None:
    """Fail unless `value` is a plain tensor of this form; `wider`/`longer` admit padding."""
    if not isinstance(value, Tensor):
        fail(f"the result {name} is not a tensor", actual=repr(type(value)))
    check_plain(name, value)
    actual = tuple(value.shape)
    fits = len(actual) == len(shape)
    if fits:
        padded = {len(shape) - 1} if wider else {0} if longer else set[int]()
        fits = all(
            a == b or (i in padded and a > b)
            for i, (a, b) in enumerate(zip(actual, shape, strict=True))
        )
    if not fits:
        more = " or more in the last" if wider else " or more in the first" if longer else ""
        fail(
            f"the result {name} has the wrong shape",
            expected=f"{list(shape)}{more}",
            actual=str(list(actual)),
        )
    if dtypes and value.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes)
        fail(f"the result {name} has the wrong dtype", expected=expected, actual=str(value.dtype))
    if value.device.type != oracle.inputs.q.device.type:
        fail(
            f"the result {name} is on the wrong device",
            expected=str(oracle.inputs.q.device),
            actual=str(value.device),
        )
