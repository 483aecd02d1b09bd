"""Decode behind a long history: fill a cache in pieces, and judge what each step returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.cases import Case
from infllmv2_conformance.inputs import Inputs
from infllmv2_conformance.programs import parse_steps, write_steps
from infllmv2_conformance.trial import Trial
from infllmv2_reference.layout import Span, cu_seqlens_of

from .judges import Part, judge_attention
from .oracle import LongOracle
from .trials import long_oracle

QUERIES = 64
"""Queries that are drawn for a long sequence: its steps ask with no earlier token."""


def with_steps(case: Case) -> Case:
    """Return the case with steps that fill a cache in three pieces and then decode.

    The last piece of each sequence arrives one token at a time, then several at once, and the
    sequences advance on their own.
    """
    lengths = [keys for _, keys in case.sequences]
    tail = [min(24, n // 2) for n in lengths]
    first = tuple(n // 3 for n in lengths)
    second = tuple(n - t - f for n, t, f in zip(lengths, tail, first, strict=True))
    one, only_last = (1,) * len(lengths), (*((0,) * (len(lengths) - 1)), 1)
    several = tuple(min(5 + 4 * i, t) for i, t in enumerate(tail))
    steps = [("a", first), ("a", second), ("d", one)]
    steps += [("a", one), ("d", one)] * 2
    steps += [("a", several), ("d", several), ("a", only_last), ("d", only_last)]
    return case.with_(steps=write_steps(steps))


def check_decode(trial: Trial) -> None:
    """Run the steps of a long case on the implementation's cache."""
    oracle = long_oracle(trial)
    cache = _new_cache(trial, oracle)
    lengths = [0] * len(oracle.spans)
    for op, counts in parse_steps(trial.case.steps):
        if op == "a":
            _append(trial, oracle, cache, lengths, counts)
            lengths = [n + c for n, c in zip(lengths, counts, strict=True)]
        else:
            _decode(trial, oracle, cache, lengths, counts)


def _new_cache(trial: Trial, oracle: LongOracle) -> Any:
    return trial.candidate.call(
        "new_cache",
        batch=len(oracle.spans),
        max_seqlen_k=max(trial.inputs.max_seqlen_k, 1),
        num_kv_heads=trial.case.kv_heads,
        head_dim=trial.case.head_dim,
        dtype=trial.inputs.k.dtype,
        device=trial.inputs.k.device,
        config=trial.case.config,
    )


def _append(
    trial: Trial, oracle: LongOracle, cache: Any, lengths: list[int], counts: tuple[int, ...]
) -> None:
    """Append the next tokens of every sequence."""
    new = [
        slice(span.keys.start + n, span.keys.start + n + c)
        for span, n, c in zip(oracle.spans, lengths, counts, strict=True)
    ]
    k, v = (torch.cat([x[rows] for rows in new]) for x in (oracle.inputs.k, oracle.inputs.v))
    cu_seqlens = cu_seqlens_of(counts, k.device)
    trial.candidate.call(
        "append", cache=cache, k=k, v=v, cu_seqlens=cu_seqlens, max_seqlen=max(counts)
    )


def _decode(
    trial: Trial, oracle: LongOracle, cache: Any, lengths: list[int], counts: tuple[int, ...]
) -> None:
    """Ask with the last tokens of every sequence, and judge each row."""
    asked = [_asked(s, n, c) for s, n, c in zip(oracle.spans, lengths, counts, strict=True)]
    q = torch.cat([oracle.inputs.q[span.queries] for span in asked])
    cu_seqlens_q = cu_seqlens_of(counts, q.device)
    result = trial.candidate.call(
        "decode", cache=cache, q=q, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max(counts)
    )
    pieces = _view(trial, oracle, q, cu_seqlens_q, lengths).split("attention", result)
    for span, piece in zip(asked, pieces, strict=True):
        sparse = oracle.config.is_sparse(span.num_keys)
        part = Part(piece, span, list(range(span.num_queries)), oracle, trial.note)
        judge_attention(part, sparse)


def _asked(span: Span, length: int, count: int) -> Span:
    """Return the part of a sequence that a step asks for: its first `length` keys, `count` rows."""
    end = span.queries.stop - (span.num_keys - length)
    keys = slice(span.keys.start, span.keys.start + length)
    return Span(span.sequence, slice(end - count, end), keys)


def _view(
    trial: Trial, oracle: LongOracle, q: Tensor, cu_seqlens_q: Tensor, lengths: list[int]
) -> Trial:
    """Return a trial that knows the form of a step's result; its keys are not read."""
    counts = cu_seqlens_q.diff().tolist()
    inputs = Inputs(
        q=q,
        k=oracle.inputs.k,
        v=oracle.inputs.v,
        selection_q=None,
        selection_k=None,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_of(lengths, q.device),
        max_seqlen_q=max(counts),
        max_seqlen_k=max(lengths),
    )
    return trial.on(list(zip(counts, lengths, strict=True)), inputs)
