"""Show that a sequence does not depend on the other sequences of its batch."""

from __future__ import annotations

import torch

from .trial import Trial

_BY_KEYS = ("k", "v", "selection_k")
_BY_QUERIES = ("q", "selection_q")


def check_alone(
    trial: Trial,
    function: str,
    poisoned: tuple[str, ...],
    poisons: tuple[float, ...] = (torch.nan, 100.0),
) -> None:
    """Overwrite all sequences but one with one of `poisons` and judge that one.

    NaN shows what is weighted by 0, and a large number what a maximum picks: on GPUs the maximum
    of NaN and a number is the number.

    Args:
        trial: a case of several sequences; `choice` says which one is judged.
        function: the contract function.
        poisoned: names of the arguments to overwrite: packed by keys, by queries, by windows
            (`k_c1`, `k_c2`), or of shape `[HK, total_q, ...]`.
        poisons: the numbers to overwrite with, one for a case.
    """
    if len(trial.oracle.spans) < 2:
        return
    target = trial.oracle.spans[trial.case.choice % len(trial.oracle.spans)]
    given = trial.arguments(function)
    poison = poisons[trial.case.seed % len(poisons)]
    for name in poisoned:
        clean = given[name]
        dirty = torch.full_like(clean, poison)
        if name in ("k_c1", "k_c2"):
            ends = given["cu_seqlens_c1" if name == "k_c1" else "cu_seqlens_c2"].tolist()
            rows = slice(ends[target.sequence], ends[target.sequence + 1])
            dirty[rows] = clean[rows]
        elif name in _BY_KEYS:
            dirty[target.keys] = clean[target.keys]
        elif name in _BY_QUERIES:
            dirty[target.queries] = clean[target.queries]
        else:
            dirty[:, target.queries] = clean[:, target.queries]
        given[name] = dirty
    trial.check(function, given, sequences={target.sequence})
