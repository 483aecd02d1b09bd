from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infllmv2_conformance.child import Order, how_it_ended, last_words
from infllmv2_conformance.events import EventLog, EventTail, plain
from infllmv2_conformance.report import Result, Run
from infllmv2_conformance.supervisor import Supervisor


def outcomes(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "report.json").read_text())
    return {result["rule"]: result["outcome"] for result in report["results"]}


@pytest.mark.parametrize(
    ("death", "how", "workers"),
    [
        ("ctypes.string_at(0)", "was killed by SIGSEGV", "0"),
        ("os._exit(9)", "ended with exit status 9", "2"),
    ],
)
def test_crash_costs_one_rule(tmp_path, write_fake, infllmv2, death, how, workers):
    if workers != "0":
        pytest.importorskip("xdist")
    code = f"if first_time(): print('last words', file=sys.stderr); {death}"
    arguments = ["--stage", "compress", "-n", workers, "--report", "out"]
    done = infllmv2("check", write_fake(before=code), *arguments)
    assert done.returncode == 1
    found = outcomes(tmp_path / "out")
    assert len(found) == 5
    assert sorted(found.values()) == ["failed"] + ["passed"] * 4
    assert f"the process running the implementation {how}" in done.stdout
    assert "last words\n" in done.stdout
    assert "--case sequences=" in done.stdout


def test_hang_costs_one_rule(tmp_path, write_fake, infllmv2):
    impl = write_fake(before="if first_time(): time.sleep(1000)")
    arguments = ["--rule-timeout", "2.5", "--report", "out"]
    rules = ["--rule", "compress.values", "--rule", "compress.tail-not-read"]
    done = infllmv2("check", impl, *arguments, *rules)
    assert done.returncode == 1
    assert outcomes(tmp_path / "out") == {
        "compress.values": "failed",
        "compress.tail-not-read": "passed",
    }
    assert "did not end within the time limit of 2.5 s" in done.stdout
    assert "in compress_keys" in done.stdout, "the place where it hangs"


def test_thorough_search_remembers_what_failed(tmp_path, write_fake, infllmv2, environment):
    """It is stored beside what Hypothesis stores, and comes before anything new is drawn."""
    impl = write_fake(result="windows * (1 + (len(given['k']) > 2000)), cu_seqlens")
    environment["HYPOTHESIS_STORAGE_DIRECTORY"] = str(tmp_path)
    options = ("--profile", "thorough", "--rule", "compress.values", "--report", "out")
    counts = []
    for _ in range(2):
        assert infllmv2("check", impl, *options).returncode == 1
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        counts.append(report["results"][0]["cases"])
    assert [path.name for path in (tmp_path / "examples").iterdir()] == ["infllmv2-compress.values"]
    assert counts[0] > 20, "the fault is in no case that is fixed"
    assert counts[1] < 10


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGHUP, 129, "SIGHUP"),
    ],
)
def test_interrupted_run_keeps_what_it_has(tmp_path, write_fake, environment, number, status, name):
    code = "open('calls', 'a').write(f'{os.getpid()}\\n')"
    code += "; open('calls').read().count('\\n') > 30 and time.sleep(1000)"
    command = [sys.executable, "-m", "infllmv2_conformance", "check", write_fake(before=code)]
    process = subprocess.Popen(
        [*command, "--stage", "compress", "--report", "out"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    calls = tmp_path / "calls"
    deadline = time.monotonic() + 60
    while not calls.exists() or calls.read_text().count("\n") <= 30:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == status
    assert f"Stopped: {name}. The result is partial." in output
    found = list(outcomes(tmp_path / "out").values())
    assert found.count("passed") >= 1
    assert found.count("not run") >= 1
    verdict = json.loads((tmp_path / "out" / "report.json").read_text())["verdict"]
    assert verdict["complete"] is False
    assert verdict["stopped"] == name
    assert f"The run was stopped: {name}." in (tmp_path / "out" / "report.html").read_text()
    junit = (tmp_path / "out" / "junit.xml").read_text()
    assert f'message="the run ended before: {name}"' in junit
    assert len(list((tmp_path / "out").iterdir())) == 4, "nothing half-written is left"
    with pytest.raises(ProcessLookupError):
        os.kill(int(calls.read_text().split()[-1]), 0)


class Interrupted:
    """Sends Ctrl-C to this process while it is told something, and goes on with that."""

    def __init__(self) -> None:
        self.ended = 0

    def planned(self, run: Run) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # a signal is taken at the next instruction
        self.ended += 1

    def started(self, result: Result) -> None: ...

    def finished(self, run: Run, result: Result) -> None: ...

    def waiting(self, run: Run) -> None: ...


def test_signal_stops_the_run_between_two_steps_and_never_within_one(monkeypatch, environment):
    """An exception within one, say while a lock is held, could let the run hang."""
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    listener = Interrupted()
    order = Order("eager", rule=("compress.values", "compress.complete-windows"))
    run = Supervisor(order, listener).execute()
    assert listener.ended == 1
    assert (run.stopped, run.exit_code) == ("Ctrl-C", 130)
    assert run.remaining


def test_crash_while_importing_is_explained(write_fake, infllmv2):
    impl = write_fake(at_import="print('no driver', file=sys.stderr); os._exit(77)")
    done = infllmv2("check", impl, "--stage", "pool")
    assert done.returncode == 2
    assert "cannot load 'fake.py:Fake'" in done.stderr
    assert "ended with exit status 77" in done.stderr
    assert "no driver" in done.stderr


def test_exit_of_the_implementation_is_its_failure(write_fake, infllmv2):
    done = infllmv2("check", write_fake(before="sys.exit(5)"), "--rule", "compress.values")
    assert done.returncode == 1
    assert "compress_keys raised SystemExit: 5" in done.stdout


def test_events_are_read_line_by_line(tmp_path: Path):
    log, tail = EventLog(tmp_path / "events"), EventTail(tmp_path / "events")
    log.write("start", rule="a")
    with (tmp_path / "events").open("a") as file:
        file.write('{"event": "half')
    assert [event["rule"] for event in tail.read()] == ["a"]
    with (tmp_path / "events").open("a") as file:
        file.write(' a line"}\n')
    assert [event["event"] for event in tail.read()] == ["half a line"]
    assert not list(tail.read())
    with (tmp_path / "events").open("a") as file:
        file.write('{"event": "torn')
    log.write("start", rule="b")
    log.write("start", rule="c")
    assert [event["rule"] for event in tail.read()] == ["c"], "the others are one line now"


def test_events_hold_no_numbers_that_json_lacks():
    assert plain({"a": (float("nan"), [float("-inf")]), 1: Path("x")}) == {
        "a": ["nan", ["-inf"]],
        "1": "x",
    }


def test_last_words_are_the_users(tmp_path: Path):
    output = tmp_path / "stderr"
    output.write_text(
        "terminate called\nFatal Python error: Aborted\n\n"
        'Thread 0x01 (most recent call first):\n  File "/lib/execnet.py", line 1 in read\n\n'
        "Current thread 0x02 (most recent call first):\n"
        + "".join(f'  File "/home/user/kernel.py", line {i} in f\n' for i in range(4))
        + f'  File "{Path(last_words.__code__.co_filename).parent}/runner.py", line 1 in g\n'
    )
    lines = last_words(output).splitlines()
    assert lines[:2] == ["terminate called", "Fatal Python error: Aborted"]
    assert all("kernel.py" in line for line in lines[2:])
    assert len(lines) == 6
    output.write_text("\n".join(map(str, range(100))))
    assert last_words(output).splitlines() == [str(i) for i in range(88, 100)]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (3, "ended with exit status 3"),
        (-11, "was killed by SIGSEGV"),
        (-9, "was killed by SIGKILL, which is what happens when memory runs out"),
        (None, "died"),
    ],
)
def test_how_it_ended(status, words):
    assert how_it_ended(status) == words
