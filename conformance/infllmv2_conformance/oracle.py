"""The oracle of a case: the reference in float64 on the low-precision inputs, and error bounds.

Everything is per sequence, computed when first asked for, and kept.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from infllmv2_reference import SparseConfig, select_blocks
from infllmv2_reference.layout import Span, cu_seqlens_of

from . import bounds, integrity
from .bounds import Bounded
from .capabilities import Arithmetic
from .cases import Case
from .inputs import Inputs
from .memory import remembered

_select = remembered(select_blocks)


class Oracle:
    """Hold what each stage must give for the inputs of a case.

    Args:
        case: the case.
        inputs: its tensors, or tensors changed by a rule.
        arithmetic: what the implementation computes in.
    """

    def __init__(self, case: Case, inputs: Inputs, arithmetic: Arithmetic) -> None:
        self.case, self.inputs, self.arithmetic = case, inputs, arithmetic
        self.config: SparseConfig = case.config
        self.spans: list[Span] = inputs.spans
        self._attended: dict[int, tuple[Tensor, tuple[Bounded, Bounded]]] = {}

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute, but not to the implementation while it runs."""
        if name != "__class__":  # which isinstance reads
            integrity.refuse_during_call()
        return super().__getattribute__(name)

    def keys(self, span: Span) -> Tensor:
        """Return the keys that are compressed, `[S, HK, D]`, in their own dtype, on the CPU."""
        k = self.inputs.k if self.inputs.selection_k is None else self.inputs.selection_k
        return k[span.keys].cpu()

    def queries(self, span: Span) -> Tensor:
        """Return the queries that score, `[T, HQ, D]`, in their own dtype, on the CPU."""
        q = self.inputs.q if self.inputs.selection_q is None else self.inputs.selection_q
        return q[span.queries].cpu()

    @cached_property
    def windows(self) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Return (K_C1, its slack), (K_C2, its slack) of every sequence, float64 `[C, HK, D]`."""
        c = self.config
        kernels = (c.kernel_size, c.kernel_stride), (c.lse_kernel_size, c.lse_kernel_stride)
        return [
            (
                bounds.stored_windows(self.keys(span), *kernels[0], self.arithmetic),
                bounds.stored_windows(self.keys(span), *kernels[1], self.arithmetic),
            )
            for span in self.spans
        ]

    def with_windows(self, k_c1: Tensor, k_c2: Tensor) -> Oracle:
        """Return an oracle that scores other windows, packed as `packed_windows` gives them."""
        changed = Oracle(self.case, self.inputs, self.arithmetic)
        cut: list[list[tuple[Tensor, Tensor]]] = []
        for which, packed in enumerate((k_c1, k_c2)):
            counts = [len(pair[which][0]) for pair in self.windows]
            parts = packed.cpu().double().split(counts)
            cut.append([(part, torch.zeros_like(part)) for part in parts])
        changed.__dict__["windows"] = list(zip(*cut, strict=True))
        return changed

    def packed_windows(self, which: int) -> tuple[Tensor, Tensor]:
        """Return K_C1 (`which` 0) or K_C2 (1) packed, in the dtype of k, and its cu_seqlens."""
        k = self.inputs.k
        rows = [pair[which][0].to(k.dtype) for pair in self.windows]
        empty = torch.zeros(0, *k.shape[1:], dtype=k.dtype)
        packed = torch.cat([empty, *rows]).to(k.device)
        return packed, cu_seqlens_of([len(r) for r in rows], k.device)

    def scores_of(self, span: Span, end_to_end: bool = False) -> Bounded:
        """Return the scores of one sequence's windows, `[HK, T, C]`.

        Args:
            span: the sequence.
            end_to_end: whether the implementation compresses the keys itself, so that its windows
                may differ from the oracle's in the last place.
        """
        (k_c1, slack1), (k_c2, slack2) = self.windows[span.sequence]
        slacks = (slack1, slack2) if end_to_end else (None, None)
        q = self.queries(span)
        return bounds.scores(q, k_c1, k_c2, span.num_keys, self.config, self.arithmetic, *slacks)

    @cached_property
    def scores(self) -> list[Bounded]:
        """Return the scores of every sequence's windows."""
        return [self.scores_of(span) for span in self.spans]

    @cached_property
    def block_scores(self) -> list[Bounded]:
        """Return the scores of every sequence's blocks, `[HK, T, N]`."""
        return [
            bounds.block_scores(score, span.num_keys, self.config)
            for score, span in zip(self.scores, self.spans, strict=True)
        ]

    @cached_property
    def end_to_end_block_scores(self) -> list[Bounded]:
        """Return the blocks' scores with bounds for implementations that also compress."""
        return [
            bounds.block_scores(self.scores_of(span, True), span.num_keys, self.config)
            for span in self.spans
        ]

    @cached_property
    def selected(self) -> list[Tensor]:
        """Return the selection of every sequence, int32 `[HK, T, K]`."""
        return [
            _select(score.value, span.num_keys, self.config)
            for score, span in zip(self.block_scores, self.spans, strict=True)
        ]

    def attend(self, span: Span, selected: Tensor) -> tuple[Bounded, Bounded]:
        """Return output and LSE of one sequence for a given selection; the last ones are kept."""
        known = self._attended.get(span.sequence)
        if known is None or not torch.equal(known[0], selected):
            known = selected.clone(), self._attend(span, selected)
            self._attended[span.sequence] = known
        return known[1]

    def _attend(self, span: Span, selected: Tensor) -> tuple[Bounded, Bounded]:
        q = self.inputs.q[span.queries].cpu()
        k, v = self.inputs.k[span.keys].cpu(), self.inputs.v[span.keys].cpu()
        return bounds.attend(
            q, k, v, selected, self.config.block_size, self.arithmetic, self.case.dtype
        )

    def everything(self, span: Span) -> Tensor:
        """Return the selection of every visible block, which makes `attend` dense attention."""
        blocks = -(-span.num_keys // self.config.block_size)
        positions = torch.arange(span.num_keys - span.num_queries, span.num_keys)
        ids = torch.arange(blocks, dtype=torch.int32).expand(span.num_queries, blocks)
        visible = ids <= (positions // self.config.block_size)[:, None]
        return ids.where(visible, -1).expand(self.case.kv_heads, -1, -1)
