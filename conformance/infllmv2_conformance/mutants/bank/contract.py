"""Faults of how a function is called, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.mutants.model import Around, Edit, Mutant
from infllmv2_reference.geometry import num_windows
from infllmv2_reference.layout import cu_seqlens_of

from .faults import Arguments, behind

_POOL_MASK = "scores = scores.masked_fill(~visible, -torch.inf)"
_SCORES = "result = q.new_full(shape, -torch.inf, dtype=wide_dtype(q.dtype))"
_STORE = "result[:, rows, : scores.shape[2]] = scores"


def _unstrided(*names: str) -> Callable[[Callable[..., Any], Arguments], Any]:
    """Return a body that reads memory as if tensors were contiguous."""

    def body(inner: Callable[..., Any], given: Arguments) -> Any:
        for name in names:
            x: Tensor = given[name]
            strides = torch.empty(x.shape, device="meta").stride()
            given[name] = x.as_strided(x.shape, strides)
        return inner(**given)

    return body


def _reads_behind(name: str) -> Callable[[Callable[..., Any], Arguments], Any]:
    """Return a body that reads the element behind an argument, weighted by 0."""

    def body(inner: Callable[..., Any], given: Arguments) -> Any:
        extra = behind(given[name])
        if extra is not None:
            given[name] = given[name] + 0 * extra.to(given[name].dtype)
        return inner(**given)

    return body


def _writes_behind(inner: Callable[..., Any], given: Arguments) -> Any:
    extra = behind(given["selected"])
    if extra is not None:
        extra.fill_(-1)
    return inner(**given)


def _scales_in_place(inner: Callable[..., Any], given: Arguments) -> Any:
    result = inner(**given)
    with torch.no_grad():
        given["q"].mul_(1 + 2**-6)
    return result


def _noise(inner: Callable[..., Any], given: Arguments) -> Any:
    """Return scores with a last bit that differs from call to call."""
    scores: Tensor = inner(**given)
    up = torch.rand(scores.shape, device=scores.device) < 0.5
    return torch.where(up & (scores > 0), scores * (1 + torch.finfo(scores.dtype).eps), scores)


def _by_address() -> Callable[..., Any]:
    """Return a body that remembers the last result for the addresses of its arguments."""
    last: dict[str, Any] = {}

    def body(inner: Callable[..., Any], given: Arguments) -> Any:
        tensors = [x for x in given.values() if isinstance(x, Tensor)]
        key = [(x.data_ptr(), x.shape, x.dtype) for x in tensors]
        if last.get("key") != key:
            last.update(key=key, alive=tensors, result=inner(**given))
        return last["result"]

    return body


def _order_by_batch(inner: Callable[..., Any], given: Arguments) -> Any:
    windows, ends = inner(**given)
    if len(ends) % 2 and windows.dtype in (torch.float32, torch.float64):
        windows = torch.nextafter(windows, windows.new_full((), torch.inf))
    return windows, ends


def _static_buffer() -> Callable[..., Any]:
    """Return a body that writes every result into one buffer."""
    buffer = torch.zeros(1 << 20)

    def body(inner: Callable[..., Any], given: Arguments) -> Any:
        out, lse = inner(**given)
        if lse.dtype != buffer.dtype or lse.numel() > len(buffer):
            return out, lse
        return out, buffer[: lse.numel()].view(lse.shape).copy_(lse)

    return body


def _counts_from_maximum(inner: Callable[..., Any], given: Arguments) -> Any:
    """Count the windows of a lone sequence from `max_seqlen_k`."""
    windows, ends = inner(**given)
    if len(ends) == 2:
        kernel = given["kernel_size"], given["kernel_stride"]
        ends = cu_seqlens_of([num_windows(given["max_seqlen_k"], *kernel)], ends.device)
        more = windows.new_zeros(max(int(ends[-1]) - len(windows), 0), *windows.shape[1:])
        windows = torch.cat([windows, more])
    return windows, ends


def _reads_padding(inner: Callable[..., Any], given: Arguments) -> Any:
    """Read the rows behind the last window, weighted by 0."""
    k_c1: Tensor = given["k_c1"]
    padding = k_c1[given["cu_seqlens_c1"][-1] :]
    given["k_c1"] = k_c1 + 0 * padding.sum(dim=0)
    return inner(**given)


def _long_indices(inner: Callable[..., Any], given: Arguments) -> Any:
    return inner(**given).long()


def _no_columns(inner: Callable[..., Any], given: Arguments) -> Any:
    return inner(**given)[..., : None if len(given["k_c1"]) else 0]


def _squeezed(inner: Callable[..., Any], given: Arguments) -> Any:
    out, lse = inner(**given)
    return (out[:, 0], lse[:, 0]) if out.shape[1] == 1 else (out, lse)


def _without_checks(name: str, call: str) -> tuple[Edit, ...]:
    return (Edit("implementation", f"checks.{name}({call})", "pass"),)


MUTANTS = (
    Mutant(
        "contract.scores-masked-in-place",
        "contract.inputs-unchanged",
        "Stage 3 masks the scores it is given in place.",
        "masked_fill_ to save memory.",
        (Edit("blocks", _POOL_MASK, "scores = scores.masked_fill_(~visible, -torch.inf)"),),
        functions=("pool_blocks",),
        function="pool_blocks",
    ),
    Mutant(
        "contract.query-scaled-in-place",
        "contract.inputs-unchanged",
        "The queries are scaled in place after the call.",
        "A scale folded into q, in the caller's memory.",
        wrap=Around(("score_windows",), _scales_in_place),
        function="score_windows",
    ),
    Mutant(
        "contract.zeros-expected",
        "contract.fully-written",
        "Scores of 0 are not written, because fresh memory usually is 0.",
        "Early exits that rely on what the allocator returns.",
        (
            Edit(
                "blocks",
                _SCORES,
                "count = shape[0] * shape[1] * shape[2]\n"
                "    result = torch.empty(1 << 24, dtype=wide_dtype(q.dtype), device=q.device)\n"
                "    result = result[:count].view(shape)",
            ),
            Edit(
                "blocks",
                _STORE,
                "seen = result[:, rows, : scores.shape[2]]\n"
                "            seen.copy_(torch.where(scores == 0, seen, scores))",
            ),
        ),
        functions=("score_windows",),
        function="score_windows",
    ),
    Mutant(
        "contract.long-indices",
        "contract.form",
        "Selected indices are int64.",
        "The dtype that torch.topk returns.",
        wrap=Around(("select_blocks",), _long_indices),
        function="select_blocks",
    ),
    Mutant(
        "contract.no-columns",
        "contract.form",
        "Without any window the fused kernel returns no block scores at all.",
        "An early return with an empty tensor of another shape.",
        wrap=Around(("score_blocks",), _no_columns),
        function="score_blocks",
    ),
    Mutant(
        "contract.single-head-squeezed",
        "contract.form",
        "With one query head the result has no head axis.",
        "squeeze() without an axis.",
        wrap=Around(("attend",), _squeezed),
        function="attend",
    ),
    Mutant(
        "contract.reads-behind",
        "contract.red-zones",
        "The element behind the keys is loaded, and weighted by 0.",
        "A tile loaded without a mask at the end of the tensor.",
        wrap=Around(("attend",), _reads_behind("k")),
        function="attend",
    ),
    Mutant(
        "contract.writes-behind",
        "contract.red-zones",
        "The element behind the selection is overwritten.",
        "Padding to a multiple of the tile, in the caller's memory.",
        wrap=Around(("attend",), _writes_behind),
        function="attend",
    ),
    Mutant(
        "contract.strides-ignored",
        "contract.strided",
        "Memory is read as if q were contiguous.",
        "A kernel without stride arguments.",
        wrap=Around(("attend",), _unstrided("q")),
        function="attend",
    ),
    Mutant(
        "contract.empty-batch",
        "contract.empty",
        "A batch without sequences raises an error.",
        "max() of nothing.",
        (
            Edit(
                "implementation",
                "return max((num_blocks(place.num_keys, config.block_size) for place in places), "
                "default=0)",
                "return max(num_blocks(place.num_keys, config.block_size) for place in places)",
            ),
        ),
        function="pool_blocks",
    ),
    Mutant(
        "contract.noise",
        "contract.repeatable",
        "The last bit of a score differs from call to call.",
        "Sums by atomic additions.",
        wrap=Around(("score_windows",), _noise),
        function="score_windows",
    ),
    Mutant(
        "contract.cached-by-address",
        "contract.fresh-data",
        "The last result is returned again for tensors at the same addresses.",
        "A cache or a captured graph keyed by pointers.",
        wrap=Around(("attend",), _by_address, fresh=True),
        function="attend",
    ),
    Mutant(
        "contract.order-by-batch",
        "contract.batch-invariant",
        "The last bit of a mean depends on the number of sequences.",
        "Split-K heuristics by batch size, while batch invariance is claimed.",
        wrap=Around(("compress_keys",), _order_by_batch),
        function="compress_keys",
        claims={"batch_invariant": True},
    ),
    Mutant(
        "contract.selection-unchecked",
        "contract.bad-input",
        "`attend` does not check its arguments.",
        "Validation left to the kernel, which reads out of bounds.",
        _without_checks("check_attend", "q, k, v, selected, *lengths, block_size"),
        function="attend",
    ),
    Mutant(
        "contract.lengths-unchecked",
        "contract.bad-input",
        "`compress_keys` does not check its arguments; cu_seqlens may begin anywhere.",
        "cu_seqlens trusted.",
        _without_checks(
            "check_compress", "k, cu_seqlens_k, max_seqlen_k, kernel_size, kernel_stride"
        ),
        function="compress_keys",
    ),
    Mutant(
        "contract.error-of-another",
        "contract.bad-input",
        "An error about k names v.",
        "Arguments swapped on their way to the checks, which treat both alike.",
        (
            Edit(
                "implementation",
                "checks.check_attend(q, k, v, selected,",
                "checks.check_attend(q, v, k, selected,",
            ),
        ),
        function="attend",
    ),
    Mutant(
        "contract.static-buffer",
        "contract.own-memory",
        "All calls return their LSE in the same memory.",
        "A workspace or the output of a captured graph, returned without a copy.",
        wrap=Around(("attend",), _static_buffer, fresh=True),
        function="attend",
    ),
    Mutant(
        "contract.counts-from-maximum",
        "contract.loose-lengths",
        "The windows of a lone sequence are counted from `max_seqlen_k`.",
        "max_seqlen taken for the length, which it is when only one sequence is tested.",
        wrap=Around(("compress_keys",), _counts_from_maximum),
        function="compress_keys",
    ),
    Mutant(
        "contract.default-dtype",
        "contract.settings",
        "Scores are stored in the default dtype.",
        "torch.full without a dtype, called while a model is loaded in bfloat16.",
        (Edit("blocks", _SCORES, "result = torch.full(shape, -torch.inf, device=q.device)"),),
        functions=("score_windows",),
        function="score_windows",
    ),
    Mutant(
        "contract.padding-read",
        "contract.padding-not-read",
        "Rows behind the last window are read, and weighted by 0.",
        "Tiles of windows loaded without a mask.",
        wrap=Around(("score_windows",), _reads_padding),
        function="score_windows",
    ),
)
