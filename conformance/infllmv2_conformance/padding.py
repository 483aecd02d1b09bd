"""Fill with poison what stands in an argument and belongs to no sequence, or to none that asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import num_windows
from infllmv2_reference.layout import Span

from .trial import Trial

MOST_ROWS = 40
MOST_COLUMNS = 5


def with_padding(trial: Trial, given: dict[str, Any], poison: float) -> dict[str, Any]:
    """Return the arguments with poison wherever the contract lets anything stand.

    That is: rows of windows behind `cu_seqlens[-1]`, columns of scores behind those of the longest
    sequence, everything of sequences without queries, K_C2 with the exact normaliser, and of
    `selection_q` and `selection_k` what no score is made of.
    """
    config, choice = trial.case.config, trial.case.choice
    padded = dict(given)
    for name, ends in (("k_c1", "cu_seqlens_c1"), ("k_c2", "cu_seqlens_c2")):
        if name in given:
            x = given[name].clone()
            for span in _idle(trial):
                x[given[ends][span.sequence] : given[ends][span.sequence + 1]] = poison
            if name == "k_c2" and config.lse == "exact":
                x.fill_(poison)
            padded[name] = _longer(x, 0, 1 + choice % MOST_ROWS, poison)
    for name in ("scores", "block_scores"):
        if name in given:
            padded[name] = _longer(given[name], 2, 1 + choice % MOST_COLUMNS, poison)
    if trial.function in ("attend", "attention"):
        for name in ("k", "v", "selection_k"):
            if name in given:
                padded[name] = given[name].clone()
                for span in _idle(trial):
                    padded[name][span.keys] = poison
    if "selection_q" in given:
        padded["selection_q"] = given["selection_q"].clone()
        for span in trial.oracle.spans:
            used = _scored_keys(span, config)
            padded["selection_k"][span.keys][used:] = poison
            if not used:
                padded["selection_q"][span.queries] = poison
    return padded


def _idle(trial: Trial) -> list[Span]:
    return [span for span in trial.oracle.spans if span.num_queries == 0]


def _scored_keys(span: Span, config: SparseConfig) -> int:
    """Return how many keys of a sequence lie in or before a window that makes a score."""
    if not config.is_sparse(span.num_keys):
        return 0
    kernels = [(config.kernel_size, config.kernel_stride)]
    if config.lse == "approximate":
        kernels.append((config.lse_kernel_size, config.lse_kernel_stride))
    counts = [num_windows(span.num_keys, *kernel) for kernel in kernels]
    ends = [(n - 1) * stride + size for n, (size, stride) in zip(counts, kernels, strict=True) if n]
    return max(ends, default=0)


def _longer(x: Tensor, axis: int, more: int, poison: float) -> Tensor:
    shape = list(x.shape)
    shape[axis] = more
    return torch.cat([x, x.new_full(shape, poison)], dim=axis)
