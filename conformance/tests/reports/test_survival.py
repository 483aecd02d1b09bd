"""What is left on disk when a run dies, whatever kills it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from infllmv2_conformance import watch as watching
from infllmv2_conformance.report import ReportError, Run, write_reports
from infllmv2_conformance.watch import Watch

from . import samples

NAMES = ["badge.json", "junit.xml", "report.html", "report.json"]
SLEEP = "open('calls', 'a').write(f'{os.getpid()}\\n')"
SLEEP += "; open('calls').read().count('\\n') > 30 and time.sleep(1000)"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def until(folder: Path, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until a report on disk says something."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if (folder / "report.json").exists() and holds(read(folder)):
            return read(folder)
        time.sleep(0.2)
    raise AssertionError(f"the report never said so: {read(folder)['verdict']}")


@pytest.fixture
def hanging(tmp_path, write_fake, environment):
    """Start a check that passes some cases and then hangs; end what is left of it."""
    command = [sys.executable, "-m", "infllmv2_conformance", "check", write_fake(before=SLEEP)]
    command += ["--stage", "compress", "--report", "out"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **quiet)
    yield process
    process.kill()
    process.communicate()
    calls = tmp_path / "calls"
    for pid in set(calls.read_text().split()) if calls.exists() else ():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def at_work(data: dict[str, Any]) -> bool:
    """Say whether something has passed, and something else is at work."""
    return data["verdict"]["rules"]["passed"] > 0 and bool(data["verdict"]["running"])


def test_killed_supervisor_leaves_a_young_report(tmp_path, hanging, validate):
    until(tmp_path / "out", at_work)
    time.sleep(6)
    hanging.kill()
    hanging.wait()
    data = read(tmp_path / "out")
    validate(data)
    age = datetime.now(UTC) - datetime.fromisoformat(data["written"])
    assert age.total_seconds() < 7, "even though no rule ends"
    assert data["verdict"]["complete"] is False
    assert data["verdict"]["stopped"] is None
    (running,) = data["verdict"]["running"]
    outcomes = {r["rule"]: r["outcome"] for r in data["results"]}
    assert outcomes[running] == "not run"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "This report is incomplete." in page
    assert f"It was at {running}." in page
    badge = json.loads((tmp_path / "out" / "badge.json").read_text())
    assert badge["message"] == "incomplete, compress, quick"


def test_killed_child_costs_its_rule_and_the_report_tells(tmp_path, write_fake, infllmv2, validate):
    impl = write_fake(before="if first_time(): os.kill(os.getpid(), 9)")
    assert infllmv2("check", impl, "--stage", "compress", "--report", "out").returncode == 1
    data = read(tmp_path / "out")
    validate(data)
    assert data["verdict"]["complete"] is True
    assert data["verdict"]["running"] == []
    assert data["verdict"]["rules"]["failed"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "was killed by SIGKILL, which is what happens when memory runs out" in page


def test_implementation_that_cannot_be_loaded_again_ends_the_run(tmp_path, write_fake, infllmv2):
    """What was found before is kept, and said to be incomplete."""
    code = "if BEGUN.exists(): raise ImportError('the driver is gone')"
    impl = write_fake(before="if first_time(): os._exit(9)", at_import=code)
    done = infllmv2("check", impl, "--stage", "compress", "--report", "out")
    assert done.returncode == 1
    verdict = read(tmp_path / "out")["verdict"]
    assert "the driver is gone" in verdict["stopped"]
    assert (verdict["rules"]["failed"], verdict["rules"]["not run"]) == (1, 4)
    assert "the driver is gone" in done.stdout


def test_exception_of_the_suite_is_in_the_report(tmp_path, write_fake, infllmv2, validate):
    broken = "import hypothesis\nhypothesis.given = lambda *a, **k: 1 / 0"
    impl = write_fake(at_import=broken)
    done = infllmv2("check", impl, "--rule", "compress.values", "--report", "out")
    assert done.returncode == 1
    data = read(tmp_path / "out")
    validate(data)
    assert data["results"][0]["outcome"] == "error"
    assert "ZeroDivisionError" in (tmp_path / "out" / "report.html").read_text()


LIMITED = """
import os, resource, sys
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Starts Python so that no file can grow beyond a size, as on a full disk."""


@pytest.fixture
def check_on_full_disk(tmp_path, environment):
    """Run a check whose files may grow to a size only."""

    def run(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["-m", "infllmv2_conformance", "check", *arguments]
        return subprocess.run(
            [sys.executable, "-c", LIMITED, str(size), *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_full_disk_costs_the_report_and_not_the_verdict(tmp_path, check_on_full_disk):
    asked = ("eager", "--rule", "pool.values", "--report", "out")
    done = check_on_full_disk(12_000, *asked)
    assert done.returncode == 2
    assert "eager: 1 rules passed" in done.stdout
    assert done.stderr == "infllmv2: cannot write out/report.html: File too large\n"
    assert read(tmp_path / "out")["verdict"]["green"] is True
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "junit.xml",
        "report.json",
    ]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_full_disk_is_not_blamed_on_a_rule(tmp_path, check_on_full_disk, workers):
    """Here it is the disk that takes the events of the suite."""
    done = check_on_full_disk(5_000, "eager", "--stage", "pool", "-n", workers)
    assert done.returncode == 1
    assert "Stopped: the suite cannot write to " in done.stdout
    assert " (is the disk full?). The result is partial." in done.stdout
    assert " 0 failed, " in done.stdout


def test_full_disk_leaves_the_report_of_before(tmp_path, monkeypatch):
    write_reports(samples.green(), tmp_path)
    before = (tmp_path / "report.json").read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(ReportError, match=r"report\.json: No space left on device"):
        write_reports(samples.failed(), tmp_path)
    assert (tmp_path / "report.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


def test_run_goes_on_where_a_report_cannot_be_written(tmp_path):
    folder = tmp_path / "gone"
    with Watch(folder=folder) as watch:
        watch.planned(samples.interrupted())
    assert not folder.exists()


def test_report_is_written_when_the_supervisor_itself_fails(tmp_path):
    run = samples.interrupted()
    with pytest.raises(ZeroDivisionError), Watch(folder=tmp_path) as watch:  # noqa: PT012
        watch.planned(Run("some", "quick", 0))
        watch.planned(run)
        run.stopped = "an error"
        raise ZeroDivisionError
    assert read(tmp_path)["verdict"]["stopped"] == "an error"


def test_reports_are_not_written_all_the_time(tmp_path, monkeypatch):
    written: list[float] = []
    now = [100.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])

    def write(_run: Run, _folder: Path) -> None:
        written.append(now[0])
        now[0] += 0.06  # which is 2 % of 3 seconds

    monkeypatch.setattr(watching, "write_reports", write)
    watch = Watch(folder=tmp_path)
    run = samples.interrupted()
    watch.planned(run)
    for _ in range(100):
        now[0] += 0.1
        watch.waiting(run)
    assert len(written) == 4
    assert all(2.9 < b - a < 3.2 for a, b in pairwise(written))
