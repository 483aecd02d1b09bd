"""The mutants as data, one file or two for each stage."""

from __future__ import annotations

from infllmv2_conformance.mutants.model import Mutant

from . import (
    attend,
    attend_sums,
    attention,
    compress,
    contract,
    decode,
    fused,
    gradients,
    kernels,
    long,
    pool,
    score,
    select,
)


def _by_id(mutants: list[Mutant]) -> dict[str, Mutant]:
    """Return the mutants by their id, each of which must be unique."""
    known: dict[str, Mutant] = {}
    for mutant in mutants:
        if mutant.id in known:
            raise ValueError(f"two mutants have the id {mutant.id!r}")
        known[mutant.id] = mutant
    return known


MUTANTS: dict[str, Mutant] = _by_id(
    [
        *compress.MUTANTS,
        *score.MUTANTS,
        *pool.MUTANTS,
        *fused.MUTANTS,
        *select.MUTANTS,
        *attend.MUTANTS,
        *attend_sums.MUTANTS,
        *gradients.MUTANTS,
        *attention.MUTANTS,
        *decode.MUTANTS,
        *contract.MUTANTS,
        *kernels.MUTANTS,
    ]
)

LONG_MUTANTS: dict[str, Mutant] = _by_id([*long.MUTANTS])
"""Faults that no profile can show: the rules of the stage `long` kill them."""
