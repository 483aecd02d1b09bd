"""Make the inputs of a vector: the tensors and numbers that its function is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.arguments import pack_rows
from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.capabilities import Capabilities
from infllmv2_conformance.cases import Case
from infllmv2_conformance.inputs import Inputs, build_inputs
from infllmv2_conformance.masks import competing_blocks, visible_blocks
from infllmv2_conformance.programs import parse_steps
from infllmv2_conformance.selections import pack_selected, random_selection
from infllmv2_conformance.trial import Trial
from infllmv2_reference.layout import cu_seqlens_of
from infllmv2_reference.score import visible_windows

from .catalogue import Vector

CPU = torch.device("cpu")
Given = dict[str, Any]
"""Arguments by name: tensors and integers; those of step i of a cache are named "i.k" and so on."""


def draw(vector: Vector) -> Given:
    """Return the arguments of a vector's function, without `config`."""
    if vector.function == "decode":
        return _draw_steps(vector.case)
    trial = _trial(vector.case)
    if vector.function == "pool_blocks":
        given = {"scores": _window_scores(trial), **trial.inputs.lengths}
    elif vector.function == "select_blocks":
        given = {"block_scores": _block_scores(trial, vector.kind), **trial.inputs.lengths}
    elif vector.function in ("attend", "attend_gradients"):
        given = trial.arguments("attend", selected=_selection(trial, vector.kind))
    else:
        given = trial.arguments(vector.function)
    if vector.function == "select" and vector.kind == "ties":
        given |= _equal_windows(trial)
    if vector.function == "attend_gradients":
        q = trial.inputs.q
        given["grad_out"] = torch.randn(q.shape, generator=trial.generator).to(q.dtype)
    given.pop("config", None)
    return {name: value for name, value in given.items() if value is not None}


def _trial(case: Case) -> Trial:
    nobody = Candidate("oracle", object(), Capabilities())
    return Trial(case, nobody, CPU, lambda _: None)


def _window_scores(trial: Trial) -> Tensor:
    """Draw scores of windows, float32 `[HK, total_q, C]`; invisible ones are outrageous."""
    c, rows = trial.case.config, list[Tensor]()
    for span in trial.oracle.spans:
        kernel = c.kernel_size, c.kernel_stride
        visible = visible_windows(span.num_queries, span.num_keys, *kernel)
        shape = (trial.case.kv_heads, *visible.shape)
        rows.append(torch.rand(shape, generator=trial.generator).where(visible, 1e30))
    return pack_rows(rows, trial.oracle)


def _block_scores(trial: Trial, kind: str) -> Tensor:
    """Draw scores of blocks, float32 `[HK, total_q, N]`; NaN or -inf where they are not read."""
    rows, unread = list[Tensor](), -torch.inf if kind == "worst" else torch.nan
    for span in trial.oracle.spans:
        shape = (trial.case.kv_heads, *visible_blocks(span, trial.case.config).shape)
        scores = torch.rand(shape, generator=trial.generator)
        scores = (scores * 3).floor() if kind == "ties" else scores.where(scores > 0.2, -torch.inf)
        rows.append(scores.where(competing_blocks(span, trial.case.config), unread))
    return pack_rows(rows, trial.oracle)


def _selection(trial: Trial, kind: str) -> Tensor:
    """Draw blocks, int32 `[HK, total_q, K]`; with "few" every third row selects none."""
    rows = [random_selection(trial, span, keep_own=kind != "few") for span in trial.oracle.spans]
    for row in rows if kind == "few" else ():
        row[:, ::3] = -1
    return pack_selected(rows, trial.oracle)


def _equal_windows(trial: Trial) -> Given:
    """Make all windows score exactly the same, as the rule `fused_select.ties` does."""
    q = torch.zeros_like(trial.inputs.q)
    q.unflatten(1, (trial.case.kv_heads, -1))[:, :, 1:, 1] = 64
    k_c1, k_c2 = (torch.zeros_like(trial.oracle.packed_windows(i)[0]) for i in (0, 1))
    k_c1[..., 0], k_c2[..., 1] = 1, 64
    return {"q": q, "k_c1": k_c1, "k_c2": k_c2}


def _draw_steps(case: Case) -> Given:
    """Return what every step of a cache is called with."""
    inputs = build_inputs(case, CPU)
    sequences = len(case.sequences)
    fresh = [span.keys.start for span in inputs.spans]
    held: list[list[int]] = [[] for _ in range(sequences)]
    given: Given = {"batch": sequences, "max_seqlen_k": inputs.max_seqlen_k}
    for step, (op, counts) in enumerate(parse_steps(case.steps)):
        if op == "a":
            new = [list(range(f, f + n)) for f, n in zip(fresh, counts, strict=True)]
            fresh = [f + n for f, n in zip(fresh, counts, strict=True)]
            held = [old + more for old, more in zip(held, new, strict=True)]
            rows = [row for more in new for row in more]
            for name in ("k", "v", "selection_k"):
                given |= _rows(f"{step}.{name}", getattr(inputs, name), rows)
            given |= {f"{step}.cu_seqlens": cu_seqlens_of(counts)}
        elif op == "d":
            asked = [rows[len(rows) - n :] for rows, n in zip(held, counts, strict=True)]
            rows = [row for rows in asked for row in rows]
            for name in ("q", "selection_q"):
                given |= _rows(f"{step}.{name}", getattr(inputs, name), rows)
            given[f"{step}.cu_seqlens_q"] = cu_seqlens_of(counts)
        else:
            held = [rows[: len(rows) - n] for rows, n in zip(held, counts, strict=True)]
            given[f"{step}.lengths"] = torch.tensor([len(r) for r in held], dtype=torch.int32)
    return given


def _rows(name: str, x: Tensor | None, rows: list[int]) -> Given:
    """Return some rows of a tensor under a name, nothing if there is no tensor."""
    return {} if x is None else {name: x[rows]}


def inputs_of(given: Given) -> Inputs:
    """Return the tensors of `attention` as the oracle takes them."""
    return Inputs(
        q=given["q"],
        k=given["k"],
        v=given["v"],
        selection_q=given.get("selection_q"),
        selection_k=given.get("selection_k"),
        cu_seqlens_q=given["cu_seqlens_q"],
        cu_seqlens_k=given["cu_seqlens_k"],
        max_seqlen_q=given["max_seqlen_q"],
        max_seqlen_k=given["max_seqlen_k"],
    )
