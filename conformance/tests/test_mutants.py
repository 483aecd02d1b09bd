"""The bank and what runs it: does it notice when the suite, or the bank itself, is wrong?"""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest

from infllmv2_conformance.cli import run_command
from infllmv2_conformance.mutants import build as building
from infllmv2_conformance.mutants import matrix as matrices
from infllmv2_conformance.mutants.bank import MUTANTS
from infllmv2_conformance.mutants.build import MutantError, build, edited
from infllmv2_conformance.mutants.examine import examine
from infllmv2_conformance.mutants.matrix import Matrix, Row
from infllmv2_conformance.mutants.model import Around, Edit, Mutant
from infllmv2_conformance.mutants.reach import reach
from infllmv2_conformance.mutants.reasons import REASONS
from infllmv2_conformance.mutants.suite_tests import Outcome
from infllmv2_conformance.mutants.terminal import show_grid
from infllmv2_conformance.rules import ORDINARY, RULES
from infllmv2_conformance.terminal import make_console

SAMPLE = (
    "compress.window-too-few",
    "compress.padded-tile",
    "score.group-mean",
    "score.visible-late",
    "pool.no-padding",
    "score_blocks.bf16",
    "fused_select.ties-to-larger",
    "select.local-one-short",
    "select.finite-bonus",
    "attend.diagonal-mask",
    "attend.dk-first-head-only",
    "attention.last-slot-lost",
    "decode.one-window-per-append",
    "contract.scores-masked-in-place",
)
"""One or two of every stage, those that take little time."""


def mutant(rule: str = "pool.values", **fields) -> Mutant:
    stage = rule.split(".")[0]
    return Mutant(f"{stage}.new", rule, "Something is changed.", "Nowhere.", **fields)


def unchanged(inner, given):
    return inner(**given)


def problems(*rows: Row, profile: str = "ci", whole: bool = False) -> list[str]:
    return Matrix(rows, profile, 0, whole).problems()


def killed(name: str, others: tuple[Outcome, ...] = ()) -> Row:
    return Row(name, Outcome(MUTANTS[name].rule, killed=True, cases=1), others)


# The bank


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_is_killed_by_the_rule_that_must_and_no_earlier_stage(name):
    row = examine(MUTANTS[name], "quick")
    assert row.expected.killed
    assert not row.early
    assert problems(row, profile="quick") == []


def test_sample_is_of_every_stage():
    stages = {RULES[name].stage for name in ORDINARY}
    assert {MUTANTS[name].stage for name in SAMPLE} == stages


def test_every_mutant_can_be_built_and_reaches_its_rule():
    """An edit that no longer fits the source of eager shows here, on every run."""
    for each in MUTANTS.values():
        if each.base == "eager":
            build(each)
        else:  # imports Triton with the interpreter, which is for a process of its own
            assert all(ast.parse(text) for text in edited(each).values())
        rule = RULES[each.rule]
        assert reach(each).touches(rule), each.id
        assert bool(each.function) == rule.each, each.id
        if each.function:
            assert each.function in reach(each).forward, each.id


def test_every_mutant_is_described():
    for name, each in MUTANTS.items():
        assert name == each.id
        assert name.split(".")[0] == each.stage
        assert each.sentence.endswith(".")
        assert each.seen.endswith(".")
        assert each.edits or each.wrap
    anchors = {name.replace(".", "-") for name in MUTANTS}
    assert len(anchors) == len(MUTANTS)


def test_every_reason_is_about_a_rule():
    assert set(REASONS) <= set(RULES)


# Building


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("blocks", "no such text", ""), "occurs 0 times: 'no such text'"),
        (Edit("blocks", "torch.", "numpy."), "must occur exactly once"),
        (Edit("nowhere", "a", "b"), "has no module 'nowhere'"),
    ],
)
def test_edit_that_does_not_fit_is_an_error(edit, message):
    with pytest.raises(MutantError, match=r"mutant pool\.new") as caught:
        build(mutant(edits=(edit,)))
    assert message in str(caught.value)


def test_edit_that_is_no_python_is_an_error():
    broken = Edit("blocks", "def pool(", "def pool((")
    with pytest.raises(MutantError, match="cannot be imported: SyntaxError"):
        build(mutant(edits=(broken,)))


def test_edits_apply_in_order():
    first = Edit("blocks", "def pool(", "def pool_two(")
    texts = edited(mutant(edits=(first, Edit("blocks", "def pool_two(", "def pool_three("))))
    assert "def pool_three(" in texts["blocks"]


def test_without_the_original_there_are_no_mutants(monkeypatch):
    building.sources.cache_clear()
    monkeypatch.setitem(building.BASES, "eager", "infllmv2_impls.nothing")
    try:
        with pytest.raises(building.OriginalMissingError, match="which is not installed"):
            building.sources()
    finally:
        building.sources.cache_clear()


def test_mutant_does_not_change_the_original():
    before = building.pristine().windows.compress
    build(MUTANTS["compress.max"])
    assert building.pristine().windows.compress is before
    assert MUTANTS["compress.max"].edits


# Mutants of Triton kernels

KERNELS = "infllmv2_conformance.mutants.kernels:IMPLEMENTATION"


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_kernels_of_which_mutants_are_made_are_right(infllmv2, environment):
    environment["TRITON_INTERPRET"] = "1"
    rules = ("compress.tail-not-read", "pool.values", "attend.group-mapping")
    done = infllmv2("check", KERNELS, *(word for rule in rules for word in ("--rule", rule)))
    assert "3 rules passed, 0 failed, 0 not claimed" in done.stdout


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_mutants_of_kernels_are_killed(infllmv2):
    names = ("compress.triton-offset-overflow", "attend.triton-grid-rounded-down")
    done = infllmv2("mutants", *names, "--profile", "quick", "-n", "1")
    assert "2 of 2 mutants killed (100.0%)" in done.stdout


def test_mutants_that_need_triton_are_skipped_without_it(monkeypatch, capsys):
    monkeypatch.setattr(building, "find_spec", lambda _: None)
    assert run("pool.triton-other-0") == 1
    out = capsys.readouterr().out
    assert "Skipped, because triton is not installed: pool.triton-other-0." in out
    assert "wrong no mutant was run, so nothing is proved" in out


# What a mutant reaches


def test_reach_of_an_edit():
    assert reach(MUTANTS["attend.dq-no-scale"]).forward == frozenset()
    assert reach(MUTANTS["attend.dq-no-scale"]).touches(RULES["attend.gradients"])
    assert not reach(MUTANTS["attend.dq-no-scale"]).touches(RULES["attend.values"])
    pooled = reach(MUTANTS["pool.no-padding"])
    assert {"pool_blocks", "select", "attention", "decode"} <= pooled.forward
    assert not pooled.touches(RULES["score.values-exact"])


# The verdict


def test_right_implementation_is_a_survivor():
    row = examine(mutant(wrap=Around(("pool_blocks",), unchanged)), "quick")
    assert problems(row) == ["pool.new survives"]


def test_kill_by_another_rule_alone_is_a_survivor():
    late = replace(MUTANTS["pool.no-padding"], id="pool.new", rule="pool.packed-alone")
    late = replace(late, wrap=Around(("pool_blocks",), unchanged), edits=())
    survivor = examine(late, "quick").expected
    row = Row("pool.new", survivor, (Outcome("pool.values", killed=True),))
    assert problems(row) == [
        "pool.new survives pool.packed-alone, which must kill it; pool.values kills it"
    ]


def test_kill_at_an_earlier_stage_is_reported():
    early = replace(MUTANTS["compress.max"], id="attention.new", rule="attention.selection")
    row = examine(early, "quick")
    assert row.first
    assert row.first.rule == "compress.values"
    assert "attention.new is killed too early, by compress.values" in problems(row)


def test_quick_may_miss_a_few():
    names = [name for name, m in MUTANTS.items() if m.stage == "attend"][:39]
    rows = [killed(name) for name in names]
    survivors = [Row("attend.new", Outcome("attend.values")), Row("x", Outcome("attend.values"))]
    assert problems(*rows, survivors[0], profile="quick") == []
    assert problems(*rows, survivors[0]) == ["attend.new survives"]
    many = problems(*rows[:18], *survivors, profile="quick")
    assert many[-1] == "90.0% of the mutants are killed; it must be 95%"


def test_rule_that_kills_nothing_first_needs_a_reason(monkeypatch):
    monkeypatch.setattr(matrices, "ORDINARY", ("pool.values", "pool.edges"))
    monkeypatch.setattr(matrices, "REASONS", {})
    row = killed("pool.no-padding")
    silent = "the rule pool.edges kills nothing, and reasons.py does not say why"
    assert problems(row, whole=True) == [silent]
    assert problems(row, whole=False) == []
    second = Row("pool.mean", Outcome("pool.edges", killed=True), row.kills[:1])
    assert "kills nothing first" in problems(row, second, whole=True)[0]
    monkeypatch.setattr(matrices, "REASONS", {"pool.edges": "It is here to test a test."})
    assert problems(row, whole=True) == []


def test_reason_that_no_longer_holds_is_reported(monkeypatch):
    monkeypatch.setattr(matrices, "ORDINARY", ("pool.values",))
    monkeypatch.setattr(matrices, "REASONS", {"pool.values": "It kills nothing first."})
    assert (
        "but it kills pool.no-padding first" in problems(killed("pool.no-padding"), whole=True)[0]
    )


# The command


def run(*arguments: str) -> int:
    return run_command(["mutants", "--profile", "quick", "-n", "1", *arguments])


def test_command_shows_kills_and_writes_json(tmp_path, capsys):
    target = tmp_path / "matrix.json"
    assert run("pool.no-padding", "pool.mean", "--json", str(target)) == 0
    out = capsys.readouterr().out
    assert "2 of 2 mutants killed (100.0%), of" in out
    data = json.loads(target.read_text())
    assert data["format"] == "infllmv2-mutants"
    assert [row["id"] for row in data["mutants"]] == ["pool.no-padding", "pool.mean"]
    assert data["mutants"][0]["first"] == "pool.values"
    assert data["rules"]["pool.values"]["kills"] == ["pool.no-padding", "pool.mean"]
    assert run("pool.mean", "--json", str(target)) == 0  # over a matrix of its own


def test_command_fails_for_a_survivor(monkeypatch, capsys):
    harmless = replace(mutant(wrap=Around(("pool_blocks",), unchanged)), id="pool.harmless")
    monkeypatch.setitem(MUTANTS, "pool.harmless", harmless)
    assert run("pool.harmless") == 1
    out = capsys.readouterr().out
    assert "wrong pool.harmless survives" in out
    assert "0 of 1 mutants killed (0.0%)" in out


def test_command_shares_the_work(capsys):
    assert run("-n", "2", "pool.mean", "compress.max") == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "same" in line]
    assert rows == ["compress.max", "pool.mean"]


def test_full_matrix_is_a_grid(capsys):
    rows = [
        killed("compress.max", others=(Outcome("compress.prefix-stable"),)),
        killed("pool.mean", others=(Outcome("pool.edges", killed=True),)),
    ]
    show_grid(make_console(), rows)
    lines = capsys.readouterr().out.splitlines()
    order = list(RULES)
    first, second = (line.split(maxsplit=1)[1] for line in lines[-2:])
    assert first.strip() == "# ."
    assert second.strip() == "##"
    assert lines[-1].index("##") - lines[-2].index("#") == order.index("pool.values")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pool.no-paddin", "unknown mutant 'pool.no-paddin'; did you mean pool.no-padding?"),
        ("xyzzy", "'infllmv2 mutants --list' lists every mutant"),
        ("--stage pools", "unknown stage 'pools'"),
        ("pool.mean --stage attend", "no mutant is of all that was asked for"),
        ("--json .", "cannot write .: it is a folder"),
        ("--json nowhere/x.json", "there is no folder 'nowhere'"),
        ("--json notes.txt", "notes.txt is not a matrix of infllmv2: not overwriting it"),
    ],
)
def test_command_finds_wrong_arguments_first(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine\n")
    assert run(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.count("\n") == 1


def test_list_says_what_each_one_is(capsys):
    assert run("--list", "--stage", "pool") == 0
    out = capsys.readouterr().out
    assert "pool.no-padding\n" in out
    assert "Killed by pool.values." in out
