"""The page in a real browser: no overflow, no complaint, no request; with and without scripts."""

from __future__ import annotations

from itertools import product

import pytest

from infllmv2_conformance.report.html import to_html

from . import samples

UNFOLD = "for (const d of document.querySelectorAll('details')) d.open = true"
WIDE = "document.documentElement.scrollWidth"
CUT_OFF = """JSON.stringify([...document.querySelectorAll("body *")]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll"))
  .map(e => e.outerHTML.slice(0, 80)))"""
BUTTONS = "document.querySelectorAll('.command button').length"
TEXT = "document.body.innerText"
MAKE = {"green": samples.green, "failed": samples.failed, "interrupted": samples.interrupted,
        "nasty": samples.nasty}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, make in MAKE.items():
        (folder / f"{name}.html").write_text(to_html(make()), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [*product(MAKE, (1280, 390), (False,)), ("failed", 1280, True), ("failed", 390, True)],
)
def test_page_fits_and_is_quiet(browser, pages, name, width, dark):
    looks = (UNFOLD, WIDE, CUT_OFF)
    page = browser.open(pages / f"{name}.html", width, dark=dark, expressions=looks)
    assert page.problems == []
    assert page.requests == []
    assert page.values[CUT_OFF] == "[]"
    assert page.values[WIDE] == width
    assert page.screenshot.startswith(b"\x89PNG")


def test_page_can_be_read_without_scripts(browser, pages):
    looks = (BUTTONS,)
    page = browser.open(pages / "failed.html", 1280, expressions=looks)
    assert page.values[BUTTONS] > 3
    page = browser.open(pages / "failed.html", 1280, script=False, expressions=looks)
    assert page.values[BUTTONS] == 0
    assert page.problems == []


@pytest.mark.parametrize(
    ("planted", "what"),
    [
        ('<div style="width: 2000px">x</div>', "problems"),  # the policy forbids the style
        ("<p>" + "<code>" + "x" * 400 + "</code></p><pre>" + "y" * 400 + "</pre>", "wide"),
        ('<img src="https://example.org/x.png" alt="">', "problems"),
        ("<script>alert(1)</script>", "problems"),
    ],
)
def test_browser_finds_what_is_wrong(browser, pages, planted, what):
    text = (pages / "green.html").read_text(encoding="utf-8")
    path = pages / "planted.html"
    path.write_text(text.replace("</main>", f"{planted}</main>"), encoding="utf-8")
    page = browser.open(path, 390, expressions=(WIDE,))
    if what == "wide":
        assert page.values[WIDE] > 390
    else:
        assert page.problems


def test_browser_sees_requests(browser, tmp_path):
    path = tmp_path / "asks.html"
    path.write_text('<!doctype html><link rel="stylesheet" href="http://127.0.0.1:9/x.css">')
    page = browser.open(path, 390)
    assert page.requests == ["http://127.0.0.1:9/x.css"]
