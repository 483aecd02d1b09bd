"""Kernels with faults of their own must look like the mutant that a reader would name."""

from __future__ import annotations

import json

import pytest
import torch

from infllmv2_conformance import comparison
from infllmv2_conformance.cases import Case
from infllmv2_conformance.comparison import MOST_FAILURES, Comparison
from infllmv2_conformance.failure import ConformanceFailure, Finding
from infllmv2_conformance.loading import load
from infllmv2_conformance.mutants import build, likeness
from infllmv2_conformance.mutants.suite_tests import rule_tests
from infllmv2_conformance.profiles import PROFILES
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.symptoms import Symptom

KERNELS = "conformance/tests/faulty_kernels.py"


def failing(spec: str, rule: str) -> tuple[ConformanceFailure, Runner]:
    run = Runner(load(spec), PROFILES["quick"], torch.device("cpu"), 0, rule)
    with pytest.raises(ConformanceFailure) as caught:
        rule_tests()[rule](run)
    return caught.value, run


@pytest.mark.parametrize(
    ("kernel", "rule", "name"),
    [
        ("docs/examples/broken_kernel.py", "attend.values", "attend.partial-block-lost"),
        (f"{KERNELS}:WholeBlocksOnly", "attend.partial-block", "attend.partial-block-lost"),
        (f"{KERNELS}:ModuloHeads", "attend.group-mapping", "attend.interleaved-heads"),
        (f"{KERNELS}:Base2", "attend.lse", "attend.lse-base-2"),
        (f"{KERNELS}:StrictlyCausal", "attend.values", "attend.own-token-lost"),
        (f"{KERNELS}:UnpaddedPooling", "pool.values", "pool.no-padding"),
        (f"{KERNELS}:MeanOverGroup", "score.values-exact", "score.group-mean"),
        (f"{KERNELS}:OneLocalBlockShort", "select.exact", "select.local-one-short"),
        (f"{KERNELS}:LateWindows", "compress.values", "compress.window-too-few"),
        (f"{KERNELS}:ExactNormaliser", "fused_select.certificate", "score.exact-for-approximate"),
    ],
)
def test_fault_looks_like_its_mutant(kernel, rule, name, pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    failure, run = failing(kernel, rule)
    Comparison().add_to(failure, run)
    assert list(failure.looks_like) == [name]
    assert f"  looks like {name}: " in str(failure)
    likened = {like["id"]: like["sentence"] for like in failure.to_json()["looks_like"]}
    assert likened == failure.looks_like


def test_fault_that_no_mutant_has_looks_like_none(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    failure, run = failing(f"{KERNELS}:LastOfGroup", "attend.gradients")
    Comparison().add_to(failure, run)
    assert failure.looks_like == {}
    assert "looks like" not in str(failure)


def test_check_tells_it_in_the_terminal_and_in_reports(infllmv2, tmp_path, pytestconfig):
    kernel = pytestconfig.rootpath / KERNELS
    rules = ("--rule", "compress.complete-windows")
    done = infllmv2("check", f"{kernel}:LateWindows", *rules, "--report", "out")
    line = "looks like compress.window-too-few: A window that ends with the last key does not count"
    assert line in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    likened = report["results"][0]["failure"]["looks_like"]
    assert [like["id"] for like in likened] == ["compress.window-too-few"]
    assert line in (tmp_path / "out" / "junit.xml").read_text()


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Let it take the time that it needs where other tests have the cores."""
    monkeypatch.setattr(likeness, "SECONDS", 100.0)


@pytest.fixture
def failed(monkeypatch) -> tuple[ConformanceFailure, Runner]:
    run = Runner(load("eager"), PROFILES["quick"], torch.device("cpu"), 0, "pool.values")
    failure = ConformanceFailure(Finding("wrong"))
    run.dress(failure, Case(((1, 1),)))
    monkeypatch.setattr(likeness, "look_alikes", lambda *_: [likeness.MUTANTS["pool.mean"]])
    return failure, run


def test_first_failures_of_a_run_are_compared(failed):
    failure, run = failed
    compare = Comparison()
    for _ in range(MOST_FAILURES):
        failure.looks_like = {}
        compare.add_to(failure, run)
        assert failure.looks_like
    failure.looks_like = {}
    compare.add_to(failure, run)
    assert not failure.looks_like


def test_mutants_and_single_cases_are_not_compared(failed):
    failure, run = failed
    run.candidate = load("mutant:pool.mean")
    Comparison().add_to(failure, run)
    run.candidate, run.only = load("eager"), Case(((1, 1),))
    Comparison().add_to(failure, run)
    assert not failure.looks_like


def test_report_survives_a_comparison_that_fails(failed, monkeypatch):
    failure, run = failed

    def broken(*_):
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(likeness, "look_alikes", broken)
    Comparison().add_to(failure, run)
    told = "comparing it raised ZeroDivisionError: a fault of ours"
    assert failure.looks_like == {"unknown": told}


def test_report_survives_without_the_original(failed, monkeypatch):
    failure, run = failed

    def missing(*_):
        raise build.OriginalMissingError("not installed")

    monkeypatch.setattr(likeness, "look_alikes", missing)
    Comparison().add_to(failure, run)
    assert failure.looks_like == {}


def test_time_is_bounded(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(likeness.time, "thread_time", lambda: next(clock))
    asked: list[str] = []

    class Slow(likeness.Suspect):
        def symptom(self, case):
            asked.append(self.mutant.id)

    monkeypatch.setattr(likeness, "Suspect", Slow)
    run = Runner(load("eager"), PROFILES["quick"], torch.device("cpu"), 0, "pool.values")
    case = Case(((1, 1),))
    run.seen[case] = Symptom("wrong")
    assert likeness.look_alikes(run, case) == []
    assert 0 < len(asked) <= likeness.SECONDS


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({}, True),
        ({"what": "another"}, False),
        ({"where": {"head": 1}}, False),
        ({"actual": "2.01"}, True),  # 1 % of how far it is off
        ({"actual": "2.2"}, False),
        ({"actual": "nan"}, False),
        ({"actual": "[1, 2]"}, False),
        ({"actual": None}, False),
    ],
)
def test_symptoms_are_alike_up_to_rounding(change, alike):
    fields = {"what": "wrong", "where": {"head": 0}, "expected": "1.0", "actual": "2.0"}
    ours = Symptom(**fields, bound=1e-6)
    assert ours.is_like(Symptom(**(fields | change), bound=1e-6)) is alike


def test_missing_numbers_are_alike():
    none = Symptom("wrong", {}, "1.0", "nan")
    assert none.is_like(Symptom("wrong", {}, "1.0", "nan"))
    infinite = Symptom("wrong", {}, "1.0", "inf")
    assert not infinite.is_like(Symptom("wrong", {}, "1.0", "-inf"))


def test_comparison_imports_no_torch_of_its_own():
    """The module is imported by the plugin, in every check; the bank only after a failure."""
    assert "mutants" not in vars(comparison)
