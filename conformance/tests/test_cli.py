from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from infllmv2_conformance.cli import run_command
from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.report import Result, Run, check_folder, write_reports
from infllmv2_conformance.rules import RULES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("check", "Missing argument"),
        ("check eager --bogus", "No such option"),
        ("chekc eager", "No such command"),
        ("check eager --seed x", "Invalid value for '--seed'"),
        ("check eager --stage atend", "unknown stage 'atend'; did you mean attend?"),
        ("check eager --rule attend.value", "did you mean attend.values?"),
        ("check eager --profile fast", "unknown profile 'fast'"),
        ("check eager --device tpu", "unknown device 'tpu'; known: cpu, cuda"),
        ("check eager --known-failures nowhere", "known failures nowhere: No such file"),
        ("check eager --report README", "README is not a folder"),
        ("check eager --stage long", "needs a length: add --long TOKENS"),
        ("check eager --rule long.attend", "needs a length: add --long TOKENS"),
        ("check eager --long 131072 --stage attend", "alone, without attend"),
        ("check eager --long 131072 --rule long.attend --rule pool.edges", "without pool.edges"),
        ("check eager --long 1000", "--long must be at least 1024, but is 1000"),
        ("check eager --long -1", "Invalid value for '--long'"),
        ("repro eager --rule contract.form --case sequences=1/1", "add --function NAME"),
        ("repro eager --rule pool.edges --case x --function attend", "takes no --function"),
        ("rules --stage nothing", "unknown stage 'nothing'"),
        ("capabilities nothing", "unknown implementation 'nothing'"),
    ],
)
def test_usage_errors_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("README").touch()
    assert run_command(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere.py:KERNEL"], "there is no file 'nowhere.py'"),
        (["check", "sdpa", "--device", "cuda"], "torch finds no CUDA device"),
        (["check", "sdpa", "--long", "131072"], "claims longest_context 32768"),
        (
            ["repro", "eager", "--rule", "long.compress", "--case", "sequences=1/9,regime=huge"],
            "a long case has the regime normal, correlated, needles",
        ),
        (
            ["repro", "sdpa", "--rule", "pool.edges", "--case", "sequences=1/x"],
            "case has sequences='1/x', which does not parse",
        ),
    ],
)
def test_usage_errors_found_by_the_child(infllmv2, arguments, message):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = infllmv2(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_green_check_writes_reports(tmp_path, infllmv2):
    done = infllmv2("check", "eager", "--stage", "pool", "--report", "some/folder")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^ ?pool\.edges +passed +\d+ +\d+\.\d", done.stdout, re.MULTILINE)
    assert re.search(
        r"^eager: 4 rules passed, 0 failed, 0 not claimed \(\d+ cases, .* s, quick, cpu, seed 0\)$",
        done.stdout,
        re.MULTILINE,
    )
    folder = tmp_path / "some" / "folder"
    names = ["badge.json", "junit.xml", "report.html", "report.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    report = json.loads((folder / "report.json").read_text())
    assert report["format"] == "infllmv2-report"
    assert report["verdict"]["green"] is report["verdict"]["complete"] is True
    assert report["capabilities"]["devices"] == ["cpu", "cuda"]
    assert report["environment"]["packages"]["torch"]
    assert [r["rule"] for r in report["results"]] == [r for r in RULES if r.startswith("pool.")]
    suites = ElementTree.parse(folder / "junit.xml").getroot()
    assert suites.get("tests") == "4"
    assert [test.get("name") for test in suites.iter("testcase")] == [
        r["rule"] for r in report["results"]
    ]


def test_printed_command_repeats_the_failure(write_fake, infllmv2, tmp_path):
    impl = write_fake(result="windows * 1.01, cu_seqlens")
    done = infllmv2("check", impl, "--stage", "compress", "--fail-fast")
    assert done.returncode == 1
    assert "1 failed" in done.stdout
    assert "Stopped: the first failure (--fail-fast)" in done.stdout
    commands = re.findall(r"^  repeat +infllmv2 (.*)$", done.stdout, re.MULTILINE)
    again = infllmv2(*shlex.split(commands[0]))
    assert again.returncode == 1
    assert "a window is not the mean of its keys" in again.stdout
    assert commands[0] in again.stdout
    write_fake()
    assert infllmv2(*shlex.split(commands[0])).returncode == 0


def test_run_that_proves_nothing_is_not_green(write_fake, infllmv2):
    done = infllmv2("check", write_fake(), "--stage", "pool")
    assert done.returncode == 1
    assert "No rule passed, so this run proves nothing." in done.stdout
    assert "Not claimed: pool_blocks (4 rules)." in done.stdout


def test_rules_lists_every_rule(capsys):
    assert run_command(["rules"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{out}" for name in RULES)


def test_capabilities_and_version(capsys):
    assert run_command(["capabilities", "eager"]) == 0
    assert re.search(
        r"^dtypes +float16, bfloat16, float32, float64$", capsys.readouterr().out, re.M
    )
    assert run_command(["--version"]) == 0
    assert re.search(r"^infllmv2 .*, spec \d+\.\d+\.\d+$", capsys.readouterr().out)


def finished(**outcomes: str) -> Run:
    run = Run("some", "quick", 0, session={"device": "cpu"})
    rules = [rule for rule in RULES if rule.startswith("pool.")]
    for rule, outcome in zip(rules, outcomes.values(), strict=False):
        run.plan.append((rule, ""))
        if outcome != "not run":
            run.results[rule, ""] = Result(rule, "", outcome, 3, float("inf"), text="\x00<&>\n")
    return run


def test_verdict():
    assert finished(a="passed", b="not claimed", c="known failure").exit_code == 0
    assert finished(a="not claimed").exit_code == 1
    assert finished().exit_code == 1
    assert finished(a="passed", b="failed").exit_code == 1
    assert finished(a="passed", b="error").exit_code == 1
    assert finished(a="passed", b="not run").exit_code == 1
    assert not finished(a="passed", b="not run").complete
    text = finished(a="passed", b="error", c="known failure", d="not run").verdict()
    assert text.startswith(
        "some: 1 rules passed, 0 failed, 1 errors of the suite, 1 known failures, 0 not claimed, "
        "1 not run (9 cases"
    )


def test_reports_hold_any_text(tmp_path: Path):
    write_reports(finished(a="failed", b="error", c="known failure", d="not run"), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["results"][0]["worst_ratio"] == "inf"
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [suites.get(kind) for kind in ("failures", "errors", "skipped")] == ["1", "2", "1"]
    assert suites.find(".//failure").text == "?<&>\n"
    check_folder(tmp_path)  # our own reports may be replaced


def test_reports_replace_nothing_of_others(tmp_path: Path):
    (tmp_path / "report.json").write_text('{"results": []}')
    with pytest.raises(UsageError, match=r"report\.json is not a report of infllmv2"):
        check_folder(tmp_path)
    (tmp_path / "report.json").unlink()
    (tmp_path / "junit.xml").write_text("<testsuites/>")
    with pytest.raises(UsageError, match=r"junit\.xml is not a report of infllmv2"):
        check_folder(tmp_path)
