"""The tasks of decoding: one new token of every sequence, and its attention over the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from infllmv2_conformance.candidate import Candidate
from infllmv2_reference.layout import cu_seqlens_of

from .field import Field
from .sampled import RowOracle, Site
from .stages import Maker, Rows, judge_whole, sample_output
from .tasks import Task, make_task
from .tensors import Tensors

SPARE_TOKENS = 1024
"""Room for the tokens that timing `append` adds."""


def _filled_cache(candidate: Candidate, field: Field) -> Any:
    w, t = field.workload, field.tensors
    cache = candidate.call_unguarded(
        "new_cache",
        batch=w.batch,
        max_seqlen_k=w.length + SPARE_TOKENS,
        num_kv_heads=w.shape.kv_heads,
        head_dim=w.shape.head_dim,
        dtype=t.k.dtype,
        device=field.device,
        config=field.config,
    )
    given = {"k": t.k, "v": t.v, "cu_seqlens": t.cu_seqlens_k, "max_seqlen": w.length}
    candidate.call_unguarded("append", cache=cache, **given)
    return cache


def _decoder(candidate: Candidate, field: Field, cache: Any) -> Callable[[], Any]:
    t = field.tensors
    given = {"cache": cache, "q": t.q, "cu_seqlens_q": t.cu_seqlens_q, "max_seqlen_q": 1}
    return partial(candidate.call_unguarded, "decode", **given)


def _decode(candidate: Candidate, field: Field) -> Task:
    call = _decoder(candidate, field, _filled_cache(candidate, field))

    def judge(kept: Rows) -> float:
        return judge_whole(kept, field, field.oracle(candidate))

    return make_task(
        candidate, field, "decode", call, lambda r: sample_output(candidate, field, r, 3), judge
    )


def _append(candidate: Candidate, field: Field) -> Task:
    """Return the task of appending a token to each sequence; it is judged by decoding after it."""
    w, t = field.workload, field.tensors
    cache = _filled_cache(candidate, field)
    decode, appended = _decoder(candidate, field, cache), [0]
    k, v = (x[:: w.length].clone() for x in (t.k, t.v))  # a token for every sequence
    ends = cu_seqlens_of([1] * w.batch, field.device)
    given = {"cache": cache, "k": k, "v": v, "cu_seqlens": ends, "max_seqlen": 1}

    def call() -> Any:
        appended[0] += 1
        return candidate.call_unguarded("append", **given)

    def sample(result: Any) -> tuple[Rows, int]:
        del result
        return sample_output(candidate, field, decode(), 3), appended[0]

    def judge(kept: tuple[Rows, int]) -> float:
        rows, count = kept
        longer = w.length + count
        keys, values = (
            torch.cat([old[: w.length], new[:1].expand(count, -1, -1)])
            for old, new in ((t.k, k), (t.v, v))
        )
        tensors = Tensors(t.q[:1], keys, values, t.cu_seqlens_q, t.cu_seqlens_k, 1, longer)
        workload = replace(w, length=longer, batch=1)
        arithmetic = candidate.capabilities.arithmetic
        oracle = RowOracle(workload, tensors, arithmetic)
        return judge_whole(rows[:1], field, oracle, [Site(0, 0, longer - 1)])

    return make_task(candidate, field, "append", call, sample, judge, replayable=False)


DECODES: dict[str, Maker] = {"decode": _decode, "append": _append}
"""How to prepare each step with a cache."""
