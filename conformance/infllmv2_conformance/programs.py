"""Programs for a cache: steps that append, decode and reset, run against a model of it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .cases import Case
from .failure import fail
from .inputs import Inputs, pick
from .trial import Trial

Step = tuple[str, tuple[int, ...]]


def parse_steps(text: str) -> list[Step]:
    """Read the steps of a case, for example "a2.0-d1.1-r5.0"."""
    words = text.split("-") if text else []
    return [(word[0], tuple(int(n) for n in word[1:].split("."))) for word in words]


def write_steps(steps: list[Step]) -> str:
    """Write steps as a case holds them."""
    return "-".join(op + ".".join(map(str, counts)) for op, counts in steps)


def programs(batch: int, max_tokens: int, operations: str = "aadr") -> st.SearchStrategy[str]:
    """Draw a program for a cache of `batch` sequences."""
    count = st.one_of(st.integers(0, 3), st.integers(0, max_tokens))
    step = st.tuples(st.sampled_from(operations), st.tuples(*[count] * batch))
    return st.lists(step, min_size=2, max_size=12).map(write_steps)


class Machine:
    """Run steps on an implementation's cache, and keep beside it what it must contain.

    Maximal lengths exceed the true ones in most cases, as a buffer of fixed size has them. New
    tokens are always taken from fresh rows of the case's tensors, also after a reset, so that
    a stale window differs from the right one.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial, self.inputs = trial, trial.inputs
        self.fresh = [span.keys.start for span in trial.oracle.spans]
        self.ends = [span.keys.stop for span in trial.oracle.spans]
        self.rows: list[list[int]] = [[] for _ in self.fresh]
        case = trial.case
        self.slack = case.choice % 5
        self.strided = trial.capabilities.non_contiguous and case.choice % 2 == 1
        self.size: dict[str, Any] = {
            "batch": len(self.rows),
            "max_seqlen_k": max(trial.inputs.max_seqlen_k, 1) + self.slack,
            "num_kv_heads": case.kv_heads,
            "head_dim": case.head_dim,
            "dtype": trial.inputs.k.dtype,
            "device": trial.inputs.k.device,
            "config": case.config,
        }
        self.cache: Any = trial.candidate.call("new_cache", **self.size)

    def run(self, steps: list[Step]) -> None:
        """Apply steps in order; every decode is judged."""
        act = {"a": self.append, "d": self.decode, "r": self.reset}
        for op, counts in steps:
            act[op]([counts[i % len(counts)] for i in range(len(self.rows))])

    def append(self, counts: list[int]) -> None:
        """Append fresh tokens, as many as there are."""
        new = self._fresh(counts)
        self.trial.candidate.call("append", **self.append_arguments(counts))
        for i, taken in enumerate(new):
            self.fresh[i] += len(taken)
            self.rows[i] += taken

    def append_arguments(self, counts: list[int]) -> dict[str, Any]:
        """Return the arguments of an append of fresh tokens, as many as there are."""
        batch = self._pick([range(0)] * len(counts), self._fresh(counts))
        extra = {} if batch.selection_k is None else {"selection_k": batch.selection_k}
        return {
            "cache": self.cache,
            "k": self._view(batch.k),
            "v": self._view(batch.v),
            "cu_seqlens": batch.cu_seqlens_k,
            "max_seqlen": batch.max_seqlen_k + self.slack,
            **extra,
        }

    def decode(self, counts: list[int]) -> None:
        """Attend from the last tokens of every sequence and judge the result."""
        result = self.trial.candidate.call("decode", **self.decode_arguments(counts))
        queries = self._last(counts)
        trial = self._trial(queries, self._pick(queries, self.rows))
        trial.judge("attention", trial.split("attention", result), {})

    def decode_arguments(self, counts: list[int]) -> dict[str, Any]:
        """Return the arguments of a decode of the last tokens of every sequence."""
        batch = self._pick(self._last(counts), self.rows)
        extra = {} if batch.selection_q is None else {"selection_q": batch.selection_q}
        return {
            "cache": self.cache,
            "q": self._view(batch.q),
            "cu_seqlens_q": batch.cu_seqlens_q,
            "max_seqlen_q": batch.max_seqlen_q + self.slack,
            **extra,
        }

    def reset(self, counts: list[int]) -> None:
        """Take tokens back from the end of every sequence."""
        self.rows = [
            rows[: max(len(rows) - n, 0)] for rows, n in zip(self.rows, counts, strict=True)
        ]
        lengths = [len(rows) for rows in self.rows]
        self.trial.candidate.call("reset", cache=self.cache, lengths=lengths)

    def check_windows(self) -> None:
        """Judge the windows that the cache holds."""
        held = self.trial.candidate.call("cached_windows", cache=self.cache)
        if not isinstance(held, tuple) or len(held) != 4:
            fail("cached_windows must return (k_c1, cu_seqlens_c1, k_c2, cu_seqlens_c2)")
        batch = self._pick([range(0)] * len(self.rows), self.rows)
        case: Case = self.trial.case
        kernels = (
            (case.kernel_size, case.kernel_stride),
            (case.config.lse_kernel_size, case.config.lse_kernel_stride),
        )
        for which, (size, stride) in enumerate(kernels):
            trial = self._trial([range(0)] * len(self.rows), batch)
            kernel = {"kernel_size": size, "kernel_stride": stride, "pooling": "overlap"}
            trial = trial.on(trial.case.sequences, batch, **kernel)
            pieces = trial.split("compress_keys", held[2 * which : 2 * which + 2])
            given = {"kernel_size": size, "kernel_stride": stride}
            trial.judge("compress_keys", pieces, given)

    def _fresh(self, counts: list[int]) -> list[range]:
        starts = zip(self.fresh, counts, self.ends, strict=True)
        return [range(first, min(first + count, end)) for first, count, end in starts]

    def _last(self, counts: list[int]) -> list[list[int]]:
        return [rows[max(len(rows) - n, 0) :] for rows, n in zip(self.rows, counts, strict=True)]

    def _view(self, x: Tensor) -> Tensor:
        """Return a slice of a wider tensor, as of a fused projection, in every other case."""
        if not self.strided:
            return x
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., : x.shape[-1]]

    def _pick(self, queries: list[Any], keys: list[Any]) -> Inputs:
        device = self.inputs.q.device
        rows = [
            tuple(torch.tensor(list(r), dtype=torch.int64, device=device) for r in pair)
            for pair in zip(queries, keys, strict=True)
        ]
        return pick(self.inputs, rows)  # pyright: ignore[reportArgumentType]

    def _trial(self, queries: list[Any], batch: Inputs) -> Trial:
        lengths = [(len(q), len(rows)) for q, rows in zip(queries, self.rows, strict=True)]
        return self.trial.on(lengths, batch)
