"""What became of one rule: the word, and the text that goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from .device import DeviceLostError
from .failure import ConformanceFailure
from .known import KnownFailure

NOT_CLAIMED = "not claimed: "


@dataclass
class Verdict:
    """Say what became of one rule.

    Args:
        outcome: "passed", "failed", "known failure", "not claimed", or "error": the suite is wrong.
        text: why, as a person reads it.
        failure: the same as data.
    """

    outcome: str = "passed"
    text: str = ""
    failure: dict[str, Any] | None = None


def judge_phase(
    error: BaseException | None, trace: str, when: str, known: KnownFailure | None
) -> Verdict:
    """Decide what one phase of a test means.

    Args:
        error: what it raised, if anything.
        trace: the traceback, for errors of the suite.
        when: "setup", "call" or "teardown".
        known: the line of the known failures about this rule.
    """
    if isinstance(error, DeviceLostError):
        error = error.failure
    if isinstance(error, ConformanceFailure):
        outcome = "known failure" if known else "failed"
        reason = f"known: {known.reason}\n" if known else ""
        return Verdict(outcome, reason + str(error), error.to_json())
    if isinstance(error, pytest.skip.Exception):
        reason = str(error.msg)
        if not reason.startswith(NOT_CLAIMED):
            return Verdict("error", f"the suite skipped this rule: {reason}")
        listed = _stale(known, "is not claimed") if known else None
        return listed or Verdict("not claimed", reason.removeprefix(NOT_CLAIMED))
    if error is not None:
        return Verdict("error", f"the suite itself failed, please report it\n{trace}")
    if known and when == "call":
        return _stale(known, "passes")
    return Verdict()


def _stale(known: KnownFailure, fact: str) -> Verdict:
    text = f"{known.name} is listed as a known failure, but {fact}: remove {known.place}"
    return Verdict("failed", text)
