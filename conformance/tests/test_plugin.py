from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.known import read_known_failures
from infllmv2_conformance.names import STAGES, check_names


@pytest.fixture
def run_pytest(tmp_path, environment):
    """Run pytest on the suite, with the user's own configuration in force."""

    def run(*arguments: str, suite: bool = True) -> subprocess.CompletedProcess[str]:
        target = ["--pyargs", "infllmv2_conformance.suite"] if suite else []
        return subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", "infllmv2_conformance.plugin"),
                *("-p", "no:cacheprovider", *target, *arguments),
            ],
            cwd=tmp_path,
            env=environment | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return run


def test_plugin_is_cheap_to_import(environment):
    code = (
        "import sys, infllmv2_conformance.plugin\n"
        "print(sorted({'torch', 'hypothesis', 'rich', 'typer', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_suite_needs_an_implementation(run_pytest):
    done = run_pytest("--collect-only", "-q")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: the conformance suite needs an implementation: add --impl IMPL" in done.stderr


def test_options_leave_a_users_own_options_alone(tmp_path, run_pytest):
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n"
        "    for name in ('--device', '--seed', '--profile', '--impl', '--rule'):\n"
        "        parser.addoption(name, default='theirs')\n"
    )
    (tmp_path / "test_theirs.py").write_text(
        "def test_theirs(pytestconfig):\n    assert pytestconfig.getoption('--device') == 'mine'\n"
    )
    assert run_pytest("--device", "mine", suite=False).returncode == 0


def test_failure_speaks_for_itself_and_events_tell_it(tmp_path, write_fake, run_pytest):
    impl = write_fake(result="windows * 1.01, cu_seqlens")
    done = run_pytest("--impl", impl, "--rule", "compress.values", "--events", "events.jsonl")
    assert done.returncode == 1
    assert "compress.values: a window is not the mean of its keys" in done.stdout
    assert "runner.py" not in done.stdout
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[:3] == ["session", "start", "case"]
    assert kinds[-2:] == ["result", "end"]
    result = events[-2]
    assert result["outcome"] == "failed"
    assert result["cases"] == kinds.count("case")
    assert result["failure"]["stage"] == "compress"


def test_error_of_the_suite_is_no_failure_of_the_implementation(write_fake, run_pytest, tmp_path):
    impl = write_fake(
        at_import="from infllmv2_conformance.bounds import model\nmodel.FORMATS.clear()"
    )
    done = run_pytest("--impl", impl, "--rule", "compress.values", "--events", "events.jsonl")
    assert done.returncode == 1
    result = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-2])
    assert result["outcome"] == "error"
    assert "KeyError" in result["text"]


def test_rule_without_a_test_is_refused(write_fake, run_pytest):
    add = "import infllmv2_conformance.rules as r\n"
    add += "r.RULES['compress.new'] = r.Rule('compress.new', 'New.', ('compress_keys',))"
    done = run_pytest("--impl", write_fake(at_import=add), "--stage", "compress")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "these rules have no test: compress.new" in done.stderr


def test_known_failures(tmp_path, write_fake, run_pytest):
    """A listed rule may fail, without being shrunk; one that passes is stale."""
    impl = write_fake(result="windows * 1.01, cu_seqlens")
    (tmp_path / "known").write_text(
        "# what is not fixed yet\n\ncompress.values  rounds wrongly, see the tracker\n"
        "contract.inputs-unchanged[compress_keys] never checked\n"
    )
    done = run_pytest(
        *("--impl", impl, "--known-failures", "known", "-rx", "--events", "events.jsonl"),
        *("--rule", "compress.values", "--rule", "contract.inputs-unchanged"),
    )
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    known, stale = [e for e in map(json.loads, lines) if e["event"] == "result"]
    assert known["outcome"] == "known failure"
    assert known["cases"] < 10, "it was shrunk"
    assert stale["outcome"] == "failed"
    assert "contract.inputs-unchanged[compress_keys] is listed" in stale["text"]
    assert "remove known:4" in stale["text"]
    assert done.returncode == 1
    assert "rounds wrongly, see the tracker" in done.stdout


def test_known_failure_of_what_is_not_offered_is_refused(tmp_path, write_fake, run_pytest):
    (tmp_path / "known").write_text("contract.form[attend] reason\n")
    done = run_pytest("--impl", write_fake(), "--known-failures", "known", "--stage", "pool")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "known:1: contract.form[attend] is not claimed" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compress.valuez reason", "known:1: there is no rule 'compress.valuez'"),
        ("# fine\ncompress.values", "known:2: compress.values needs a reason"),
        ("compress.values[attend] reason", "must be written compress.values"),
        ("contract.form reason", "must be written contract.form[function]"),
        ("contract.form[atend] reason", "known:1: contract.form does not apply to 'atend'"),
        ("compress.values a\ncompress.values b", "known:2: compress.values is listed twice"),
        ("[attend] reason", "must be 'rule-id[function] reason'"),
    ],
)
def test_known_failures_file_is_checked(tmp_path: Path, text, message):
    (tmp_path / "known").write_text(text)
    with pytest.raises(UsageError, match="known") as caught:
        read_known_failures(tmp_path / "known")
    assert message in str(caught.value)


def test_known_failures_file_must_be_readable(tmp_path: Path):
    with pytest.raises(UsageError, match="No such file"):
        read_known_failures(tmp_path / "known")


def test_wrong_names_are_explained():
    with pytest.raises(UsageError, match="unknown stage 'atend'; did you mean attend"):
        check_names("stage", ["atend"], STAGES)
    with pytest.raises(UsageError, match="unknown stage 'xyzzy'; known: compress, score"):
        check_names("stage", ["xyzzy"], STAGES)
