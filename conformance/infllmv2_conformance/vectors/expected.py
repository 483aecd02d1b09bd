"""Compute what a vector's results must be: the oracle's values and bounds, from stored inputs.

Values and bounds are float64. Each result has one of three checks, which `compare.py` applies and
`docs/vectors.md` describes: "bound", "exact" or "certificate".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infllmv2_conformance import bounds
from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.cases import Case
from infllmv2_conformance.masks import competing_blocks, members, visible_blocks
from infllmv2_conformance.oracle import Oracle
from infllmv2_conformance.programs import parse_steps
from infllmv2_reference import pool_blocks, select_blocks
from infllmv2_reference.geometry import num_blocks, num_windows
from infllmv2_reference.layout import Span, cu_seqlens_of, spans
from infllmv2_reference.score import visible_windows

from .catalogue import Vector
from .draw import Given, inputs_of

ARITHMETIC = Arithmetic()
"""What the stored bounds allow for: float32 sums, numerators rounded to the dtype of v."""
INVISIBLE, FORCED, COMPETING = 0, 1, 2


class UncertainError(ValueError):
    """A vector's selection is not the only one that an honest implementation may return."""


@dataclass(frozen=True)
class Expected:
    """Say what one result must be.

    Args:
        name: of the result.
        check: "bound", "exact" or "certificate".
        tensors: "value", "bound" and "defined"; of a certificate "value", "bound" and "kind".
        optional: whether an implementation may leave the result out.
        ties: of a certificate: whether equal scores go to the smaller index.
    """

    name: str
    check: str
    tensors: dict[str, Tensor]
    optional: bool = False
    ties: bool = False


def expect(vector: Vector, given: Given) -> list[Expected]:
    """Return what the results of a vector's function must be."""
    return _EXPECTED[vector.function](vector, given)


def _spans(given: Given) -> list[Span]:
    return list(spans(given["cu_seqlens_q"], given["cu_seqlens_k"]))


def _compress(vector: Vector, given: Given) -> list[Expected]:
    c = vector.case.config
    keys = given["k"].split(given["cu_seqlens_k"].diff().tolist())
    parts = [bounds.compress(k, c.kernel_size, c.kernel_stride, ARITHMETIC) for k in keys]
    windows = Bounded(torch.cat([p.value for p in parts]), torch.cat([p.bound for p in parts]))
    counts = cu_seqlens_of([len(p.value) for p in parts])
    return [_bound("windows", windows), _exact("cu_seqlens_c", counts)]


def _scores(vector: Vector, given: Given) -> list[Expected]:
    c = vector.case.config
    defined = [
        visible_windows(s.num_queries, s.num_keys, c.kernel_size, c.kernel_stride)
        for s in _spans(given)
    ]
    return [_bound("scores", *_packed(_window_scores(vector, given), defined))]


def _block_scores(vector: Vector, given: Given) -> list[Expected]:
    rows, config = _pooled_scores(vector, given), vector.case.config
    defined = [competing_blocks(span, config) for span in _spans(given)]
    return [_bound("block_scores", *_packed(rows, defined))]


def _window_scores(vector: Vector, given: Given) -> list[Bounded]:
    """Return the scores of the windows of every sequence."""
    parts = [given[n].split(given[f"cu_seqlens_{n[2:]}"].diff().tolist()) for n in ("k_c1", "k_c2")]
    return [
        bounds.scores(given["q"][s.queries], c1, c2, s.num_keys, vector.case.config, ARITHMETIC)
        for s, c1, c2 in zip(_spans(given), *parts, strict=True)
    ]


def _pooled_scores(vector: Vector, given: Given) -> list[Bounded]:
    return [
        bounds.block_scores(score, span.num_keys, vector.case.config)
        for score, span in zip(_window_scores(vector, given), _spans(given), strict=True)
    ]


def _pool(vector: Vector, given: Given) -> list[Expected]:
    c, rows, defined = vector.case.config, list[Bounded](), list[Tensor]()
    for span in _spans(given):
        count = num_windows(span.num_keys, c.kernel_size, c.kernel_stride)
        scores = given["scores"][:, span.queries, :count]
        value = pool_blocks(scores, span.num_keys, c).double()
        rows.append(Bounded(value, torch.zeros_like(value)))
        defined.append(visible_blocks(span, c))
    return [_bound("block_scores", *_packed(rows, defined))]


def _select(vector: Vector, given: Given) -> list[Expected]:
    c = vector.case.config
    rows = [
        select_blocks(
            given["block_scores"][:, s.queries, : num_blocks(s.num_keys, c.block_size)],
            s.num_keys,
            c,
        )
        for s in _spans(given)
    ]
    return [_exact("selected", torch.cat(rows, dim=1))]


def _fused_select(vector: Vector, given: Given) -> list[Expected]:
    config = vector.case.config
    scores = _pooled_scores(vector, given)
    value, _ = _packed(scores, [visible_blocks(s, config) for s in _spans(given)])
    kinds = [visible_blocks(s, config).int() + competing_blocks(s, config) for s in _spans(given)]
    width = value.value.shape[-1]
    kind = torch.cat([torch.nn.functional.pad(k, (0, width - k.shape[-1])) for k in kinds])
    tensors = {"value": value.value, "bound": value.bound, "kind": kind.to(torch.uint8)}
    return [Expected("selected", "certificate", tensors, ties=vector.kind == "ties")]


def _attend(vector: Vector, given: Given) -> list[Expected]:
    parts = [
        bounds.attend(
            given["q"][s.queries],
            given["k"][s.keys],
            given["v"][s.keys],
            given["selected"][:, s.queries],
            given["block_size"],
            ARITHMETIC,
            vector.case.dtype,
        )
        for s in _spans(given)
    ]
    return _outputs([out for out, _ in parts], [lse for _, lse in parts])


def _gradients(vector: Vector, given: Given) -> list[Expected]:
    parts = [
        bounds.attend_gradients(
            given["q"][s.queries],
            given["k"][s.keys],
            given["v"][s.keys],
            given["selected"][:, s.queries],
            given["grad_out"][s.queries],
            given["block_size"],
            ARITHMETIC,
            vector.case.dtype,
        )
        for s in _spans(given)
    ]
    named = zip(("grad_q", "grad_k", "grad_v"), zip(*parts, strict=True), strict=True)
    return [_bound(name, _end_to_end(list(part))) for name, part in named]


def _attention(vector: Vector, given: Given, prefix: str = "") -> list[Expected]:
    """Return output, LSE and selection, which must be certain in every sparse row."""
    oracle = Oracle(vector.case, inputs_of(given), ARITHMETIC)
    outs: list[Bounded] = []
    lses: list[Bounded] = []
    chosen: list[Tensor] = []
    defined: list[Tensor] = []
    for span in oracle.spans:
        sparse = oracle.config.is_sparse(span.num_keys)
        selected = oracle.selected[span.sequence]
        if sparse:
            _check_certain(vector, oracle, span)
        out, lse = oracle.attend(span, selected if sparse else oracle.everything(span))
        outs.append(out)
        lses.append(lse)
        chosen.append(selected if sparse else torch.full_like(selected, -1))
        defined.append(torch.full(selected.shape, sparse))
    selection = _exact(
        f"{prefix}selected", torch.cat(chosen, dim=1), torch.cat(defined, dim=1), optional=True
    )
    return [*_outputs(outs, lses, prefix), selection]


def _check_certain(vector: Vector, oracle: Oracle, span: Span) -> None:
    """Raise unless every block that is selected provably scores more than any that is not."""
    scores = oracle.end_to_end_block_scores[span.sequence]
    competing = competing_blocks(span, oracle.config)
    chosen = members(oracle.selected[span.sequence], scores.value.shape[-1])
    low = (scores.value - scores.bound).where(chosen & competing, torch.inf).amin(-1)
    high = (scores.value + scores.bound).where(~chosen & competing, -torch.inf).amax(-1)
    if bool((low <= high).logical_and(high > -torch.inf).any()):
        raise UncertainError(f"{vector.name}: a selection is not certain; give it another seed")


def _decode(vector: Vector, given: Given) -> list[Expected]:
    """Return the results of every decode of a vector's steps."""
    results: list[Expected] = []
    held: list[dict[str, Tensor]] = [{} for _ in vector.case.sequences]
    for step, (op, counts) in enumerate(parse_steps(vector.case.steps)):
        if op == "a":
            for name in ("k", "v", "selection_k"):
                if f"{step}.{name}" in given:
                    _append(held, name, given[f"{step}.{name}"].split(list(counts)))
        elif op == "d":
            now = _step_inputs(held, given, step, counts)
            lengths = tuple(zip(counts, now["cu_seqlens_k"].diff().tolist(), strict=True))
            case: Case = vector.case.with_(sequences=lengths, steps="")
            results += _attention(replace(vector, case=case), now, f"{step}.")
        else:
            for parts, length in zip(held, given[f"{step}.lengths"].tolist(), strict=True):
                parts |= {name: x[:length] for name, x in parts.items()}
    return results


def _append(held: list[dict[str, Tensor]], name: str, new: Sequence[Tensor]) -> None:
    """Add rows of one tensor to what every sequence holds."""
    for parts, more in zip(held, new, strict=True):
        parts[name] = torch.cat([parts[name], more]) if name in parts else more


def _step_inputs(
    held: list[dict[str, Tensor]], given: Given, step: int, counts: tuple[int, ...]
) -> Given:
    """Return what `attention` would be called with in place of a decode."""
    lengths = [len(parts["k"]) for parts in held]
    queries = {n: x for n in ("q", "selection_q") if (x := given.get(f"{step}.{n}")) is not None}
    return {
        **queries,
        **{name: torch.cat([parts[name] for parts in held]) for name in held[0]},
        "cu_seqlens_q": cu_seqlens_of(counts),
        "cu_seqlens_k": cu_seqlens_of(lengths),
        "max_seqlen_q": max(counts),
        "max_seqlen_k": max(lengths),
    }


def _outputs(outs: list[Bounded], lses: list[Bounded], prefix: str = "") -> list[Expected]:
    out, lse = _end_to_end(outs), _end_to_end(lses)
    return [_bound(f"{prefix}out", out), _bound(f"{prefix}lse", lse, optional=True)]


def _end_to_end(parts: list[Bounded]) -> Bounded:
    return Bounded(torch.cat([p.value for p in parts]), torch.cat([p.bound for p in parts]))


def _packed(rows: list[Bounded], defined: list[Tensor]) -> tuple[Bounded, Tensor]:
    """Lay `[HK, T_i, X_i]` end to end, 0 where `defined` `[T_i, X_i]` says that nothing counts."""
    heads, width = rows[0].value.shape[0], max(r.value.shape[-1] for r in rows)
    total = sum(r.value.shape[1] for r in rows)
    value, bound = (torch.zeros(heads, total, width, dtype=torch.float64) for _ in range(2))
    counts = torch.zeros(total, width, dtype=torch.bool)
    start = 0
    for row, mask in zip(rows, defined, strict=True):
        end, columns = start + row.value.shape[1], slice(row.value.shape[-1])
        value[:, start:end, columns] = row.value.where(mask, 0.0)
        bound[:, start:end, columns] = row.bound.where(mask, 0.0)
        counts[start:end, columns] = mask
        start = end
    return Bounded(value, bound), counts.expand(heads, -1, -1)


def _bound(
    name: str, result: Bounded, defined: Tensor | None = None, *, optional: bool = False
) -> Expected:
    tensors = {"value": result.value.double(), "bound": result.bound.double()}
    if defined is not None:
        tensors["defined"] = defined.to(torch.uint8).contiguous()
    return Expected(name, "bound", tensors, optional)


def _exact(
    name: str, value: Tensor, defined: Tensor | None = None, *, optional: bool = False
) -> Expected:
    tensors = {"value": value}
    if defined is not None:
        tensors["defined"] = defined.to(torch.uint8).contiguous()
    return Expected(name, "exact", tensors, optional)


_EXPECTED: dict[str, Callable[[Vector, Given], list[Expected]]] = {
    "compress_keys": _compress,
    "score_windows": _scores,
    "pool_blocks": _pool,
    "score_blocks": _block_scores,
    "select_blocks": _select,
    "select": _fused_select,
    "attend": _attend,
    "attend_gradients": _gradients,
    "attention": _attention,
    "decode": _decode,
}
