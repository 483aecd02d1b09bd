"""The kill matrix as JSON; `docs/mutants.md` describes it."""

from __future__ import annotations

import json
from typing import Any

from infllmv2_conformance.environment import describe_environment, package_version
from infllmv2_conformance.events import plain
from infllmv2_conformance.rules import ORDINARY

from .bank import MUTANTS
from .examine import OTHERS
from .matrix import Matrix, Row
from .reasons import REASONS
from .suite_tests import Outcome

FORMAT = "infllmv2-mutants"
FORMAT_VERSION = 1


def to_json(matrix: Matrix) -> str:
    """Return the matrix as JSON text."""
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": package_version(),
        "environment": describe_environment(),
        "profile": matrix.profile,
        "profile_of_others": OTHERS,
        "seed": matrix.seed,
        "seconds": round(matrix.seconds, 1),
        "whole": matrix.whole,
        "share": matrix.share,
        "problems": matrix.problems(),
        "rules": {rule: _rule(matrix, rule) for rule in ORDINARY},
        "mutants": [_row(row) for row in matrix.rows],
    }
    return json.dumps(plain(data), indent=1, allow_nan=False) + "\n"


def is_ours(text: str) -> bool:
    """Say whether a file was written by `to_json`."""
    try:
        data: Any = json.loads(text)
        return data["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        return False


def _rule(matrix: Matrix, rule: str) -> dict[str, Any]:
    return {
        "kills": matrix.kills(rule),
        "kills_first": matrix.first_kills(rule),
        "reason": REASONS.get(rule),
    }


def _row(row: Row) -> dict[str, Any]:
    mutant = MUTANTS[row.mutant]
    return {
        "id": mutant.id,
        "stage": mutant.stage,
        "rule": mutant.rule,
        "function": mutant.function or None,
        "sentence": mutant.sentence,
        "seen": mutant.seen,
        "killed": row.expected.killed,
        "cases": row.expected.cases,
        "first": row.first.rule if row.first else None,
        "seconds": round(row.seconds, 2),
        "outcomes": [_outcome(outcome) for outcome in (row.expected, *row.others)],
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return vars(outcome) | {
        "function": outcome.function or None,
        "seconds": round(outcome.seconds, 3),
        "what": outcome.what or None,
    }
