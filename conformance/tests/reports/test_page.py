"""The page, parsed: whole, readable without scripts, from no other place, and all text escaped."""

from __future__ import annotations

import re

import pytest

from infllmv2_conformance.report import Result, Run, to_data
from infllmv2_conformance.report.html import is_ours, precise, ratio, render, to_html
from infllmv2_conformance.report.maps import heat
from infllmv2_conformance.rules import RULES

from . import samples
from .parsed import Parsed

SAMPLES = (samples.green, samples.failed, samples.interrupted, samples.nasty)


@pytest.mark.parametrize("make", SAMPLES)
def test_page_is_whole_and_stands_alone(make):
    text = to_html(make())
    page = Parsed(text)
    assert page.problems == []
    assert is_ours(text)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{}], "one, of our own, in the page"
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert all(rule in page.text for rule in RULES)


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        ('<img src="https://x.org/a.png">', "img has src"),
        ('<p id="rules"></p>', "id rules is there twice"),
        ("<svg></svg>", "svg says nothing to those who cannot see it"),
        ('<a href="https://x.org">x</a>', "a points to https://x.org"),
        ('<a href="#nowhere">x</a>', "#nowhere is nowhere"),
        ("<div>", "main is closed, but not open"),
        ("<style>@import 'x'; p { background: url(x.png) }</style>", "url(x.png)"),
        ('<p onclick="f()"></p>', "p has onclick"),
    ],
)
def test_parser_finds_what_is_wrong(planted, problem):
    text = to_html(samples.green())
    assert problem in Parsed(text.replace("</main>", f"{planted}</main>")).problems


def test_texts_of_others_are_only_text():
    text = to_html(samples.nasty())
    page = Parsed(text)
    assert "<script>alert" not in text
    assert "<img" not in text
    for part in (samples.NASTY, "␀␛[31m<U+202E><U+D800>", "␇<U+009B>"):
        assert part in page.text
    text.encode()


def test_long_texts_are_cut_and_say_so():
    text = to_html(samples.nasty())
    assert len(text) < 300_000
    page = Parsed(text)
    whole = "x" * 600 + " … (99,400 more characters are in report.json)"
    assert whole in page.text
    assert f"x{whole}" not in page.text
    assert re.search(r"line l?i?n?e? ?… \([\d,]+ more characters are in report\.json\)", page.text)


def test_failure_says_all_that_is_known():
    run = samples.failed()
    page = Parsed(to_html(run)).text
    claimed = len(run.by_rule()) - run.counts()["not claimed"]
    for part in (
        f"7 of {claimed} rules are broken",
        "attend.values the output is wrong The output is softmax attention over the selected",
        "docs/rules.md#attend-values",
        "Looks like the last rows of a head are never written attend.tail",
        "sequence 0 position 419 query 299 head 7 channel 5",
        "actual NaN bound 0.01 error / bound ∞ wrong places 7,101",
        "infllmv2 repro kernels/sparse.py:KERNEL --rule attend.values --case sequences=300/420",
        "contract.inputs-unchanged attend",
        "ZeroDivisionError: division by 0",
        "known: issue 12",
    ):
        assert part in page


def test_failures_are_in_order_and_the_first_are_open():
    page = Parsed(to_html(samples.failed()))
    shown = [attrs for tag, attrs in page.tags if tag == "details" and "id" in attrs]
    assert [attrs["id"] for attrs in shown][:3] == [
        "failure-score-visibility",
        "failure-select-exact",
        "failure-fused_select-certificate",
    ]
    assert ["open" in attrs for attrs in shown] == [True] * 3 + [False] * (len(shown) - 3)


def test_incomplete_run_says_what_did_not_run():
    run = samples.interrupted()
    page = Parsed(to_html(run)).text
    missing = [rule for rule, _ in run.plan[samples.FINISHED :]]
    assert "Only a part was asked for: stage score, attend." in page
    assert (
        "This report is incomplete. The run was stopped: Ctrl-C. It was at attend.gradients."
        in page
    )
    assert f"Did not run, or not for all functions: {len(set(missing))} rules {missing[0]}" in page


def test_killed_run_says_that_it_may_have_been_killed():
    run = samples.interrupted()
    run.stopped = ""
    assert "if nothing runs any more, the run was killed" in Parsed(to_html(run)).text


def test_report_of_format_1_has_no_pictures():
    """Reports of format 1 have neither histograms nor maps, nor a list of functions."""
    data = to_data(samples.failed()) | {"functions": None, "written": None}
    for result in data["results"]:
        result["margins"] = None
        if result["failure"]:
            result["failure"]["pictures"] = []
    page = Parsed(render(data))
    assert page.problems == []
    assert "Margins It" not in page.text
    assert not [attrs for tag, attrs in page.tags if attrs.get("role") == "img"]


@pytest.mark.parametrize(
    ("run", "headline"),
    [
        (Run("some", "quick", 0, stopped="Ctrl-C"), "Nothing ran"),
        (
            Run("some", "quick", 0, plan=[("pool.edges", "")], results={
                ("pool.edges", ""): Result("pool.edges", "", "not claimed", text="pool_blocks")
            }),
            "No rule passed, so this run proves nothing",
        ),
        (
            Run("some", "quick", 0, plan=[("pool.edges", "")], results={
                ("pool.edges", ""): Result("pool.edges", "", "failed", text="known:3 is stale")
            }),
            "1 of 1 rules is broken",
        ),
    ],
)  # fmt: skip
def test_odd_runs_have_a_page(run, headline):
    page = Parsed(to_html(run))
    assert page.problems == []
    assert headline in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (0.0, "0.00"), (0.004, "<0.01"), (0.5, "0.50"), (3.14159, "3.14"),
        (123.4, "123"), (20000.0, "2·10⁴"), ("inf", "∞"), ("nan", "NaN"),
    ],
)  # fmt: skip
def test_ratios_are_short(value, text):
    assert ratio(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.000123, "1.23·10⁻⁴"), (999, "999"), (-12345.0, "-1.23·10⁴"), ("-inf", "-∞")],
)
def test_numbers_are_precise(value, text):
    assert precise(value) == text


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, ""), (0, "within-0"), (1e-9, "within-1"), (1.0, "within-3"), (1.001, "over-1"),
        (101.0, "over-4"), ("inf", "over-5"), ("nan", "over-5"),
    ],
)  # fmt: skip
def test_colours_change_at_the_bound(value, name):
    assert heat(value) == name
