"""The page: one file that needs no network, no script to be read, and no other file."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from infllmv2_conformance.visible import visible

from . import histograms, maps, svg
from .data import Data, to_data
from .model import WORST_FIRST, Run, worst_outcome

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "infllmv2-conformance"
CUT_TEXT, CUT_WORDS = 6000, 600
"""Characters of a long text, and of a short one, that the page shows."""
BROKEN = ("failed", "error")


def to_html(run: Run) -> str:
    """Return the page of a run."""
    return render(to_data(run))


def is_ours(text: str) -> bool:
    """Say whether a file was written by `render`."""
    return f'<meta name="generator" content="{GENERATOR}">' in text


def render(data: Data) -> str:
    """Return the page of a report, given as `to_data` or `read_report` return it."""
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    return (
        _environment()
        .get_template("report.html")
        .render(
            data=data,
            histograms=histograms,
            maps=maps,
            count="{:,}".format,
            long=CUT_TEXT,
            generator=GENERATOR,
            style=Markup(style),
            script=Markup(script),
            hashes={"style": _digest(style), "script": _digest(script)},
            headline=_headline(data),
            stages=_stages(data),
            functions=list(dict.fromkeys(r["function"] for r in data["results"] if r["function"])),
            broken=[r for r in data["results"] if r["outcome"] in BROKEN],
            known=[r for r in data["results"] if r["outcome"] == "known failure"],
            unclaimed=_unclaimed(data),
            not_run=list(
                dict.fromkeys(r["rule"] for r in data["results"] if r["outcome"] == "not run")
            ),
            margins=histograms.add_margins([r["margins"] for r in data["results"]]),
        )
    )


def _headline(data: Data) -> dict[str, str]:
    """Return what became of the run: a class and a sentence."""
    verdict, counts = data["verdict"], data["verdict"]["rules"]
    applied = sum(counts.values()) - counts["not claimed"]
    broken = counts["failed"] + counts["error"]
    if not data["results"]:
        return {"kind": "partial", "text": "Nothing ran"}
    if broken:
        verb = "is" if broken == 1 else "are"
        return {"kind": "failed", "text": f"{broken} of {applied} rules {verb} broken"}
    if not verdict["complete"]:
        return {"kind": "partial", "text": f"Incomplete: {counts['not run']} rules did not run"}
    if not verdict["green"]:
        return {"kind": "partial", "text": "No rule passed, so this run proves nothing"}
    known = counts["known failure"]
    text = f"{counts['passed']} rules hold" + (f", {known} known to fail" if known else "")
    return {"kind": "known" if known else "passed", "text": text}


def _stages(data: Data) -> list[dict[str, Any]]:
    """Return the rules of each stage, a rule being as good as its worst function."""
    stages: list[dict[str, Any]] = []
    for stage, results in groupby(data["results"], key=lambda r: r["stage"]):
        rows = [_row(list(many)) for _, many in groupby(results, key=lambda r: r["rule"])]
        outcomes = [row["outcome"] for row in rows]
        stages.append(
            {
                "name": stage,
                "rows": rows,
                "tally": {o: outcomes.count(o) for o in WORST_FIRST if o in outcomes},
                "applies": set(outcomes) != {"not claimed"},
            }
        )
    return stages


def _row(results: list[Data]) -> dict[str, Any]:
    first = results[0]
    ratios = [float(r["worst_ratio"]) for r in results if r["worst_ratio"] is not None]
    outcome = worst_outcome([r["outcome"] for r in results])
    return {
        "rule": first["rule"],
        "sentence": first["sentence"],
        "outcome": outcome,
        "cases": sum(r["cases"] for r in results),
        "worst": max(ratios, key=lambda x: (x != x, x), default=None),
        "seconds": sum(r["seconds"] for r in results),
        "margins": histograms.add_margins([r["margins"] for r in results]),
        "by_function": {r["function"]: r for r in results if r["function"]},
        "target": next(
            (anchor(r) for r in results if r["outcome"] in (*BROKEN, "known failure")), ""
        ),
    }


def _unclaimed(data: Data) -> list[tuple[str, list[str]]]:
    """Return what is not claimed, and which rules do not apply for it."""
    missing: dict[str, dict[str, None]] = {}
    for result in data["results"]:
        if result["outcome"] == "not claimed":
            missing.setdefault(result["text"] or "", {})[result["rule"]] = None
    return [(what, list(rules)) for what, rules in missing.items()]


def anchor(result: Data) -> str:
    """Return the id of the place where the page describes a failure."""
    name = f"{result['rule']}-{result['function'] or ''}".strip("-")
    return "failure-" + re.sub(r"[^\w-]", "-", name)


def clean(value: Any) -> Any:
    """Return text in which everything can be seen; `Markup` of our own stays as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return visible(value)


def breakable(text: str) -> Markup:
    """Return text that may go on in a new line behind each of its separators."""
    return Markup(re.sub(r"([,/_:]+)(?=\w)", r"\1<wbr>", str(escape(visible(text)))))


def cut(text: Any, size: int = CUT_WORDS) -> str:
    """Return the beginning of a text that is too long for the page, and say what is missing."""
    text = str(text)
    if len(text) <= size:
        return text
    return f"{text[:size]} … ({len(text) - size:,} more characters are in report.json)"


def ratio(value: Any) -> str:
    """Return an error over bound as a person reads it."""
    if value is None:
        return ""
    number = float(value)
    if 0 < number < 0.01:
        return "<0.01"
    if number < 1000:
        return f"{number:.2f}" if number < 100 else f"{number:.0f}"
    return precise(number, 0)


def precise(value: Any, digits: int = 2) -> str:
    """Return a number with a power of ten where it is large or small, and ∞ and NaN as such."""
    number = float(value)
    if number != number:
        return "NaN"
    if number in (float("inf"), float("-inf")):
        return "∞" if number > 0 else "-∞"
    if number == 0 or 0.001 <= abs(number) < 1000:
        return f"{number:.{digits + 1}g}"
    mantissa, exponent = f"{number:.{digits}e}".split("e")
    return f"{mantissa}·{svg.power_of_ten(int(exponent))}"


def as_number(value: str | None) -> str | None:
    """Return a text as it is, but for NaN and infinities."""
    return precise(value) if value in ("nan", "inf", "-inf") else value


def seconds(value: float) -> str:
    """Return a duration."""
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def moment(value: str | None) -> str:
    """Return a time in UTC as a person reads it."""
    return (value or "").replace("T", " ").replace("+00:00", " UTC")


def worth_seeing(pictures: list[Data]) -> list[Data]:
    """Return the pictures that have more than one cell."""
    return [p for p in pictures if p["rows"]["count"] * p["columns"]["count"] > 1]


def words(value: Any) -> str:
    """Return a capability as a person reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {words(item)}" for name, item in value.items())
    if isinstance(value, list):
        parts = ["/".join(map(str, v)) if isinstance(v, list) else words(v) for v in value]
        return ", ".join(parts) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "any" if value is None else str(value)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        auto_reload=False,  # whatever becomes of the files while a run goes on
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: Any = environment.filters
    filters |= {
        "anchor": anchor,
        "as_number": as_number,
        "breakable": breakable,
        "cut": cut,
        "moment": moment,
        "precise": precise,
        "ratio": ratio,
        "seconds": seconds,
        "words": words,
        "worth_seeing": worth_seeing,
    }
    return environment


@cache
def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return what a content security policy calls a text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
