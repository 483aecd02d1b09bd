"""The rules at full length: eager passes, and what is wrong only there fails there alone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.cases import Case
from infllmv2_conformance.failure import ConformanceFailure
from infllmv2_conformance.loading import load
from infllmv2_conformance.long.cases import Means, Plan
from infllmv2_conformance.mutants.bank import LONG_MUTANTS
from infllmv2_conformance.mutants.build import build
from infllmv2_conformance.mutants.suite_tests import apply, rule_tests
from infllmv2_conformance.profiles import PROFILES, Profile
from infllmv2_conformance.rules import LONG, RULES
from infllmv2_conformance.runner import Runner

CPU = torch.device("cpu")


def narrow(candidate: Candidate) -> Candidate:
    """Restrict an implementation to small heads, which take little time."""
    claims = replace(candidate.capabilities, group_sizes=(2,), head_dims=(32,))
    return Candidate(candidate.name, candidate.target, claims)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests share the cores with others: two threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_rows(monkeypatch) -> None:
    """Judge a third of the rows that a check judges."""
    monkeypatch.setattr("infllmv2_conformance.long.rows.CORNERS", 10)
    monkeypatch.setattr("infllmv2_conformance.long.rows.DRAWN", 10)


@pytest.fixture
def small_work(monkeypatch, few_rows) -> None:
    """Let calls be smaller than in a check."""
    monkeypatch.setattr("infllmv2_conformance.long.cases.CPU_WORK", 1 << 27)


def runner(candidate: Candidate, rule: str, length: int) -> Runner:
    return Runner(candidate, PROFILES["quick"], CPU, 0, rule, length=length)


@pytest.mark.usefixtures("small_work")
@pytest.mark.parametrize("rule", [r for r in RULES if RULES[r].stage == LONG])
def test_eager_passes(rule):
    run = runner(narrow(load("eager")), rule, 3000)
    rule_tests()[rule](run)
    assert run.tally.cases >= 2


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", LONG_MUTANTS)
def test_long_rules_kill_what_ordinary_ones_do_not(name, monkeypatch):
    """The rule that must kill it does, and ordinary rules of the same functions pass it."""
    monkeypatch.setattr("infllmv2_conformance.long.cases.CPU_WORK", WORK.get(name, 1 << 28))
    mutant = LONG_MUTANTS[name]
    candidate = narrow(build(mutant))
    with pytest.raises(ConformanceFailure) as caught:
        rule_tests()[mutant.rule](runner(candidate, mutant.rule, LENGTHS.get(name, 20_000)))
    assert caught.value.case in caught.value.reproduce()
    few = Profile("few", examples=4, shape_classes=1, max_keys=400)
    for rule in ORDINARY_OF[mutant.rule]:
        outcome = apply(RULES[rule], candidate, few)
        assert outcome.claimed
        assert not outcome.killed, f"{rule} kills {name}: {outcome.what}"


WORK = {
    "long.query-offset": 1 << 32,
    "long.block-scores-offset": 1 << 32,
    "long.scores-offset": 1 << 30,
}
"""Work of a call that a fault needs, up to that of a check, where little is too little."""
LENGTHS = {"long.int16-ids": 560_000}
"""Tokens that a fault needs, where 20000 are too few: 32768 blocks of 16 tokens."""
ORDINARY_OF = {
    "long.compress": ("compress.values",),
    "long.score": ("score.values-exact",),
    "long.pool": ("pool.values",),
    "long.block-scores": ("score_blocks.values",),
    "long.select": ("select.exact",),
    "long.fused-select": ("fused_select.certificate",),
    "long.attend": ("attend.values",),
    "long.gradients": ("attend.gradients",),
    "long.attention": ("attention.equals-dense",),
    "long.decode": ("decode.several-tokens",),
}


def test_no_profile_reaches_the_faults():
    assert all(profile.max_keys < 8192 for profile in PROFILES.values())


class Changed:
    """Eager, with one result changed at one place."""

    def __init__(self, function: str, change) -> None:
        self._eager, self._function, self._change = load("eager").target, function, change
        self.capabilities = self._eager.capabilities

    def __getattr__(self, name: str):
        inner = getattr(self._eager, name)
        if name != self._function:
            return inner
        return lambda **given: self._change(inner(**given))


def _first_row_of_q(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    result[0][-1, 0, 0] += 1
    return result


@pytest.mark.usefixtures("small_work")
@pytest.mark.parametrize("function", ["attend", "attention"])
def test_a_wrong_number_is_reported_where_it_is(function):
    changed = Candidate("changed", Changed(function, _first_row_of_q), load("eager").capabilities)
    run = runner(narrow(changed), f"long.{function}", 1500)
    with pytest.raises(ConformanceFailure) as caught:
        rule_tests()[f"long.{function}"](run)
    where = caught.value.finding.where
    assert where["position"] == 1499
    assert (where["head"], where["channel"]) == (0, 0)
    rows, keys = Case.parse(caught.value.case).sequences[where["sequence"]]
    assert where["query"] == rows - 1
    assert keys == 1500


@pytest.mark.usefixtures("few_rows")
def test_repeating_a_case_needs_no_length():
    case = Plan(narrow(load("eager")).capabilities, Means.of(CPU), 2000).released(rows=3)
    run = replace(runner(narrow(load("eager")), "long.attend", 0), only=case)
    rule_tests()["long.attend"](run)
    assert run.tally.cases == 1


# The command


def test_the_printed_command_repeats_a_long_failure(write_fake, infllmv2, tmp_path):
    impl = write_fake(result="windows * 1.01, cu_seqlens")
    done = infllmv2("check", impl, "--long", "2000", "--report", "out")
    assert done.returncode == 1
    assert "profile long 2000" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["profile"] == "long 2000"
    assert [r["rule"] for r in report["results"]] == [r for r in RULES if r.startswith("long.")]
    (command,) = set(re.findall(r"^  repeat +infllmv2 (.*)$", done.stdout, re.MULTILINE))
    assert "--rule long.compress --case sequences=33/700+1/2000" in command
    again = infllmv2(*shlex.split(command))
    assert again.returncode == 1
    assert command in again.stdout
    write_fake()
    assert infllmv2(*shlex.split(command)).returncode == 0


def test_no_other_run_has_long_rules(write_fake, infllmv2, tmp_path):
    done = infllmv2("check", write_fake(), "--stage", "compress", "--report", "out")
    assert done.returncode == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {r["stage"] for r in report["results"]} == {"compress"}


def test_memory_does_not_grow_with_the_rows(environment):
    """All 230 rows at once would take 6 GB for scores of 4095 windows and 32 heads."""
    script = Path(__file__).parent / "measure_long.py"
    command = [sys.executable, str(script), "eager", "65536", "--rule", "long.block-scores"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    costs = json.loads(done.stdout)
    assert costs["cases"] == 2
    assert 0.2 < costs["process_peak_gb"] < 1.2
    assert costs["checker_s"] > 0
    assert costs["implementation_s"] > 0
