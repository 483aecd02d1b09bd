"""The report for continuous integration: JUnit XML, one suite per stage."""

from __future__ import annotations

import re
from itertools import groupby
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from .model import Result, Run

FAILED = {"failed": "failure", "error": "error", "not run": "error"}
SKIPPED = ("not claimed", "known failure")
NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
ROOT_NAME = "infllmv2-conformance"


def to_junit(run: Run) -> str:
    """Return the report of a run as JUnit XML."""
    root = Element("testsuites", {"name": ROOT_NAME, "time": f"{run.seconds:.3f}"})
    for stage, results in groupby(run.all_results(), key=lambda result: result.stage):
        _add_stage(root, run, stage, list(results))
    _count(root, run.all_results())
    indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def is_ours(text: str) -> bool:
    """Say whether a file was written by `to_junit`."""
    return f'<testsuites name="{ROOT_NAME}"' in text


def _add_stage(root: Element, run: Run, stage: str, results: list[Result]) -> None:
    suite = SubElement(root, "testsuite", {"name": f"{run.implementation}.{stage}"})
    suite.set("time", f"{sum(result.seconds for result in results):.3f}")
    _count(suite, results)
    for result in results:
        _add_result(suite, result, run.stopped)


def _add_result(suite: Element, result: Result, stopped: str) -> None:
    test = SubElement(suite, "testcase", {"classname": result.stage, "name": result.name})
    test.set("time", f"{result.seconds:.3f}")
    not_run = f"the run ended before: {stopped or 'it was killed, or still goes on'}"
    text = _clean(result.text or not_run)
    if result.outcome in FAILED:
        message = text.split("\n")[0]
        fault = SubElement(test, FAILED[result.outcome], {"message": message})
        fault.set("type", result.outcome)
        fault.text = text
    elif result.outcome in SKIPPED:
        SubElement(test, "skipped", {"message": f"{result.outcome}: {text}"})


def _count(element: Element, results: list[Result]) -> None:
    kinds = [FAILED.get(result.outcome, result.outcome) for result in results]
    element.set("tests", str(len(results)))
    element.set("failures", str(kinds.count("failure")))
    element.set("errors", str(kinds.count("error")))
    element.set("skipped", str(sum(kinds.count(kind) for kind in SKIPPED)))


def _clean(text: str) -> str:
    """Replace what XML cannot hold."""
    return NOT_XML.sub("?", text)
