"""A trial on a long case: the call on everything, the verdict on sampled rows."""

from __future__ import annotations

from infllmv2_conformance.trial import Trial

from .given import long_arguments
from .inputs import build_long_inputs
from .judges import judge_rows
from .oracle import LongOracle


def long_oracle(trial: Trial) -> LongOracle:
    """Give a trial the tensors of a long case and the oracle of sampled rows."""
    inputs = build_long_inputs(trial.case, trial.device)
    oracle = LongOracle(trial.case, inputs, trial.capabilities.arithmetic)
    trial.__dict__ |= {"inputs": inputs, "oracle": oracle}
    return oracle


def check_rows(trial: Trial, function: str) -> None:
    """Call a function on a long case and judge sampled rows of what it returns.

    The tensors are too large to be lent as copies; what copies show, the ordinary rules see.
    """
    oracle = long_oracle(trial)
    given = long_arguments(function, oracle)
    pieces = trial.split(function, trial.candidate.call_on(function, **given))
    judge_rows(function, pieces, oracle, given, trial.note)
