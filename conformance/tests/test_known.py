"""Known failures as a user has them: a file of lines, each of which must match and must fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BROKEN = "windows * 1.01, cu_seqlens"
"""Every rule that compares numbers fails; those about the form of a call pass."""
FAILING = ("compress.values", "compress.tail-not-read", "compress.packed-alone")
RULES = tuple(word for rule in (*FAILING, "contract.form") for word in ("--rule", rule))
"""Rules that BROKEN fails, and one that it passes."""


@pytest.fixture
def check(tmp_path, infllmv2):
    """Check an implementation against lines of known failures; return it with its results."""

    def run(impl: str, lines: list[str], *options: str) -> tuple[Any, dict[str, dict[str, Any]]]:
        (tmp_path / "known").write_text("\n".join(lines) + "\n")
        options = ("--known-failures", "known", "--report", "out", *options)
        done = infllmv2("check", impl, *options)
        path = tmp_path / "out" / "report.json"
        found = json.loads(path.read_text())["results"] if path.exists() else []
        return done, {r["rule"]: r for r in found}

    return run


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_a_run_with_known_failures_alone_is_green(check, write_fake, workers):
    lines = ["# waiting for a release", *(f"{rule}  rounds twice, issue 12" for rule in FAILING)]
    done, found = check(write_fake(result=BROKEN), lines, *RULES, *workers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rules passed, 0 failed, 3 known failures" in done.stdout
    for rule in FAILING:
        assert found[rule]["outcome"] == "known failure"
        assert found[rule]["text"].startswith("known: rounds twice, issue 12\n")
        assert found[rule]["cases"] <= 12, "a known failure is not shrunk"
    assert found["contract.form"]["outcome"] == "passed"


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_a_line_whose_rule_passes_fails(check, write_fake, workers):
    lines = [f"{rule} reason" for rule in FAILING] + ["contract.form[compress_keys] reason"]
    done, found = check(write_fake(result=BROKEN), lines, *RULES, *workers)
    assert done.returncode == 1
    assert found["contract.form"]["outcome"] == "failed"
    text = "contract.form[compress_keys] is listed as a known failure, but passes: remove known:4"
    assert found["contract.form"]["text"] == text
    assert text in done.stdout


def test_what_is_not_listed_still_fails(check, write_fake):
    done, found = check(write_fake(result=BROKEN), [f"{FAILING[0]} reason"], *RULES)
    assert done.returncode == 1
    outcomes = [found[rule]["outcome"] for rule in FAILING]
    assert outcomes == ["known failure", "failed", "failed"]


@pytest.mark.parametrize(
    ("line", "needs", "options"),
    [
        ("attend.values reason", "attend", ()),
        ("contract.form[attend] reason", "attend", ("-n", "2")),
        ("long.decode reason", "new_cache and append and decode", ("--stage", "compress")),
    ],
)
def test_a_line_that_is_not_claimed_is_refused(check, write_fake, tmp_path, line, needs, options):
    """Before anything runs, and whatever part of the suite is asked for."""
    done, found = check(write_fake(), ["", line], *options)
    assert done.returncode == 2
    name = line.split()[0]
    assert done.stderr == f"infllmv2: known:2: {name} is not claimed: needs {needs}\n"
    assert not found
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_claim_that_is_withdrawn_makes_its_line_stale(check, tmp_path: Path):
    (tmp_path / "one.py").write_text(
        "from infllmv2_impls.eager import IMPLEMENTATION as EAGER\n"
        "capabilities = {**EAGER.capabilities, 'packed': False}\n"
        "compress_keys = EAGER.compress_keys\n"
    )
    done, _ = check("one.py", ["compress.packed-alone reason"], "--stage", "compress")
    assert done.returncode == 2
    assert "compress.packed-alone is not claimed: needs packed" in done.stderr


def test_a_rule_that_the_claims_leave_nothing_of_is_stale(check, tmp_path: Path):
    """Which modes of a rule are claimed is known only when it runs: then the line fails."""
    (tmp_path / "one.py").write_text(
        "from infllmv2_impls.eager import IMPLEMENTATION as EAGER\n"
        "capabilities = {**EAGER.capabilities, 'lse_modes': ['approximate']}\n"
        "score_windows = EAGER.score_windows\n"
    )
    done, found = check("one.py", ["score.values-exact reason"], "--rule", "score.values-exact")
    assert done.returncode == 1
    assert "is listed as a known failure, but is not claimed" in found["score.values-exact"]["text"]


def test_a_known_failure_may_crash(check, write_fake):
    """The process dies at the first case; the rule is known to fail, and the rest goes on."""
    impl = write_fake(before="first_time() and os.abort()")
    options = ("--rule", "compress.values", "--rule", "contract.form")
    done, found = check(impl, ["compress.values  kills the process, issue 7"], *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["compress.values"]["outcome"] == "known failure"
    assert "SIGABRT" in found["compress.values"]["text"]
    assert found["contract.form"]["outcome"] == "passed"
