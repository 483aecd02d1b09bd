"""The JSON report; `docs/report-format.md` describes it."""

from __future__ import annotations

import json
from typing import Any

from infllmv2_conformance.events import plain
from infllmv2_conformance.rules import RULES

from .model import Result, Run

FORMAT = "infllmv2-report"
FORMAT_VERSION = 1
SESSION = ("spec_version", "package_version", "device", "capabilities", "environment")


def to_json(run: Run) -> str:
    """Return the report of a run as JSON text, without NaN or Infinity."""
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "implementation": run.implementation,
        "profile": run.profile,
        "seed": run.seed,
        **{name: run.session.get(name) for name in SESSION},
        "started": run.session.get("started"),
        "seconds": run.seconds,
        "verdict": {
            "green": run.green,
            "complete": run.complete,
            "stopped": run.stopped or None,
            "cases": run.cases,
            "rules": run.counts(),
            "text": run.verdict(),
        },
        "results": [_result(result) for result in run.all_results()],
    }
    return json.dumps(plain(data), indent=1, allow_nan=False) + "\n"


def is_ours(text: str) -> bool:
    """Say whether a file was written by `to_json`."""
    try:
        data: Any = json.loads(text)
        return data["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        return False


def _result(result: Result) -> dict[str, Any]:
    rule = RULES[result.rule]
    return {
        "rule": result.rule,
        "function": result.function or None,
        "stage": result.stage,
        "sentence": rule.sentence,
        "link": rule.link,
        "outcome": result.outcome,
        "cases": result.cases,
        "worst_ratio": result.worst_ratio,
        "seconds": round(result.seconds, 4),
        "text": result.text or None,
        "failure": result.failure,
    }
