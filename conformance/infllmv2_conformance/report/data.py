"""A run as plain data: what every report is made of; `docs/report-format.md` describes it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from infllmv2_conformance.events import plain
from infllmv2_conformance.rules import RULES

from .model import Result, Run

FORMAT = "infllmv2-report"
FORMAT_VERSION = 2
SESSION = ("spec_version", "package_version", "device", "functions", "capabilities", "environment")

Data = dict[str, Any]


def to_data(run: Run) -> Data:
    """Return a run as JSON data, without NaN or Infinity."""
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "implementation": run.implementation,
        "profile": run.profile,
        "seed": run.seed,
        "only": run.only,
        **{name: run.session.get(name) for name in SESSION},
        "started": run.session.get("started"),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": run.seconds,
        "verdict": {
            "green": run.green,
            "complete": run.complete,
            "stopped": run.stopped or None,
            "running": run.running,
            "cases": run.cases,
            "rules": run.counts(),
            "text": run.verdict(),
        },
        "results": [_result(result) for result in run.all_results()],
    }
    return cast("Data", plain(data))


def to_run(data: Data) -> Run:
    """Return the run that a report was made of, to show it again."""
    verdict = data["verdict"]
    run = Run(data["implementation"], data["profile"], data["seed"], only=data["only"])
    run.session = {name: data[name] for name in (*SESSION, "started") if data[name] is not None}
    run.seconds, run.running = data["seconds"], verdict["running"]
    run.stopped = verdict["stopped"] or ""
    if not (verdict["complete"] or run.stopped):
        run.stopped = "it was killed, or still goes on"
    for fields in data["results"]:
        key = fields["rule"], fields["function"] or ""
        run.plan.append(key)
        if fields["outcome"] != "not run":
            ratio = fields["worst_ratio"]
            run.results[key] = Result(
                *key,
                fields["outcome"],
                fields["cases"],
                None if ratio is None else float(ratio),
                fields["seconds"],
                fields["text"] or "",
                fields["failure"],
                fields["margins"],
            )
    return run


def _result(result: Result) -> Data:
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
        "margins": result.margins,
        "seconds": round(result.seconds, 4),
        "text": result.text or None,
        "failure": result.failure and {"looks_like": [], "pictures": [], **result.failure},
    }
