"""The report as data: its schema, older formats, what is said of damaged files, the badge."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from infllmv2_conformance.cli import run_command
from infllmv2_conformance.report import Result, Run, to_data, to_run, write_reports
from infllmv2_conformance.report.badge import to_badge
from infllmv2_conformance.report.json import to_json
from infllmv2_conformance.report.read import ReadError, read_report, schema

from . import samples

ROOT = Path(__file__).resolve().parents[3]
STORED = [
    path
    for folder in ("conformance", "sample")
    for path in sorted((ROOT / "docs" / "results" / folder).glob("*.json"))
]
SAMPLES = (samples.green, samples.failed, samples.interrupted, samples.nasty)


@pytest.mark.parametrize("make", SAMPLES)
def test_every_report_is_as_the_schema_says(make, validate, tmp_path):
    run = make()
    write_reports(run, tmp_path)
    path = tmp_path / "report.json"
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    validate(data)
    assert data["results"] == read_report(path)["results"]


def test_run_that_never_began_has_a_report(validate):
    validate(to_data(Run("some", "quick", 0, stopped="Ctrl-C")))


@pytest.mark.parametrize(
    "change",
    [
        {"results": [{}]},
        {"new": 1},
        {"seconds": "1"},
        {"verdict": {}},
        {"format_version": 1},
    ],
)
def test_schema_can_fail(change, validate):
    with pytest.raises(jsonschema.ValidationError):
        validate(to_data(samples.green()) | change)


def test_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(schema())


def test_page_of_the_documentation_names_every_field():
    page = (ROOT / "docs" / "report-format.md").read_text()
    names: set[str] = set()

    def collect(node):
        if isinstance(node, dict):
            names.update(node.get("properties", ()))
            for value in node.values():
                collect(value)
        elif isinstance(node, list):
            for value in node:
                collect(value)

    collect(schema())
    assert not [name for name in sorted(names) if f"`{name}`" not in page]


def test_json_is_short_and_the_same():
    run = samples.failed()
    text = to_json(run)
    assert json.loads(text)["results"] == to_data(run)["results"]
    assert text.count("\n") < 4000


@pytest.mark.parametrize("make", SAMPLES)
def test_stored_run_is_the_run(make):
    run = make()
    again = to_run(to_data(run))
    assert again.verdict() == run.verdict()
    assert (again.green, again.complete, again.stopped) == (run.green, run.complete, run.stopped)
    assert [r.name for r in again.all_results()] == [r.name for r in run.all_results()]


@pytest.mark.parametrize("path", STORED)
def test_committed_reports_can_be_read(path, validate, capsys, tmp_path):
    data = read_report(path)
    validate(data)
    assert run_command(["report", str(path)]) == 0
    assert data["verdict"]["text"] in " ".join(capsys.readouterr().out.split())
    assert run_command(["report", str(path), "--html", str(tmp_path / "page.html")]) == 0
    assert data["implementation"] in (tmp_path / "page.html").read_text()


def test_report_of_a_killed_run_says_so(tmp_path, capsys):
    run = samples.interrupted()
    run.stopped = ""
    write_reports(run, tmp_path)
    assert run_command(["report", str(tmp_path)]) == 0
    assert "Stopped: it was killed, or still goes on." in capsys.readouterr().out


def test_rules_of_another_version_are_shown(tmp_path, capsys):
    data = to_data(samples.failed())
    broken = next(r for r in data["results"] if r["outcome"] == "failed")
    broken["rule"], broken["sentence"] = "attend.gone-since", "It did something."
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert run_command(["report", str(tmp_path)]) == 0
    assert "attend.gone-since" in capsys.readouterr().out
    assert run_command(["report", str(tmp_path), "--html", str(tmp_path / "new.html")]) == 0
    assert "It did something." in (tmp_path / "new.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a report of infllmv2"),
        ('{"format": "other"}', "is not a report of infllmv2"),
        ('{"format": "infllmv2-report"}', "format_version None"),
        ('{"format": "infllmv2-report", "format_version": 3}', "version of infllmv2 reads 1 and 2"),
        ('{"format": "infllmv2-report", "format_version": "2"}', "format_version '2'"),
        ('{"format": "infllmv2-report", "format_version": 1}', "is damaged: KeyError: 'results'"),
        ('{"format": "infllmv2-report", "format_version": 2}', "is damaged: $: "),
    ],
)  # fmt: skip
def test_wrong_files_are_explained(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ReadError) as caught:
        read_report(tmp_path / "report.json")
    assert message in str(caught.value)


def test_damage_is_named(tmp_path):
    data = to_data(samples.green())
    data["results"][3]["outcome"] = "fine"
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(ReadError, match=r"damaged: \$\.results\[3\]\.outcome: 'fine' is not one"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("report nowhere", "cannot read nowhere: No such file"),
        ("report . --html notes.txt", "notes.txt is not a page of infllmv2: not overwriting it"),
        ("report . --html no/where.html", "cannot write no/where.html: No such file"),
    ],
)
def test_report_command_explains_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_reports(samples.green(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert run_command(arguments.split()) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def outcome(*outcomes: str, **fields: object) -> Run:
    run = Run("some", "quick", 0, **fields)
    for rule, word in zip(("pool.values", "pool.edges", "attend.lse"), outcomes, strict=False):
        run.plan.append((rule, ""))
        if word != "not run":
            run.results[rule, ""] = Result(rule, "", word)
    return run


@pytest.mark.parametrize(
    ("run", "message", "color"),
    [
        (outcome("passed", "passed", "not claimed"), "2 rules, quick", "brightgreen"),
        (outcome("passed", "known failure"), "1 rules, 1 known to fail, quick", "yellow"),
        (outcome("passed", "failed", "not claimed"), "1 of 2 rules failed, quick", "red"),
        (outcome("passed", "failed", "not run"), "1 of 3 rules failed, quick", "red"),
        (outcome("passed", "error"), "error of the suite, quick", "lightgrey"),
        (outcome("passed", "not run"), "incomplete, quick", "lightgrey"),
        (outcome("not claimed"), "nothing proved, quick", "lightgrey"),
        (outcome(), "incomplete, quick", "lightgrey"),
        (
            outcome("passed", only={"stages": ["pool"], "rules": []}),
            "1 rules, pool, quick",
            "brightgreen",
        ),
    ],
)
def test_badge(run, message, color):
    """The schema is that of https://shields.io/badges/endpoint-badge."""
    badge = json.loads(to_badge(run))
    assert badge == {"schemaVersion": 1, "label": "InfLLM-V2", "message": message, "color": color}
    assert not re.search(r"\s\s", message)
