"""The checks of the pages must fail on what they are for."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

import links
import stored
from _drawings import DRAWINGS
from drawings import draw

DOCS = Path(__file__).resolve().parents[1]
CONF = 'extensions = ["myst_parser", "rule_lists", "drawings", "stored"]\nnitpicky = True\n'


def build(folder: Path, page: str) -> tuple[str, str]:
    """Build a site of one page; return its HTML and the warnings."""
    (folder / "conf.py").write_text(CONF)
    (folder / "index.md").write_text(f"# Title\n\n{page}\n")
    out, warnings = folder / "out", io.StringIO()
    with docutils_namespace():  # directives and roles end with it
        app = Sphinx(folder, folder, out, out, "html", status=None, warning=warnings)
        app.build()
    return (out / "index.html").read_text(), warnings.getvalue()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](there.md)", None),
        ("[a](there.md#a-heading-here)", None),
        ("[a](https://nowhere.invalid/x)", None),
        ("`[a](missing.md)`", None),
        ("[a](missing.md)", "missing.md does not exist"),
        ("[a](there.md#other)", "there.md#other: there is no such heading"),
        ("[ref]: missing.md", "missing.md does not exist"),
    ],
)
def test_links(tmp_path: Path, text: str, problem: str | None) -> None:
    (tmp_path / "there.md").write_text("# A heading, here\n")
    page = tmp_path / "page.md"
    page.write_text(f"Words {text} words\n" if text[-1] != "d" else f"{text}\n")
    assert links.broken(page) == ([problem] if problem else [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0.43 s.a.b", None),
        ("43 % s.a.b", None),
        ("42.9 % s.a.b", None),
        ("0.44 s.a.b", "the stored number is"),
        ("0.430 s.a.b", "the stored number is"),
        ("0.43 s.a.c", "no stored number"),
        ("0.43 s.a", "no stored number"),
        ("0.43 t.a.b", "no stored number"),
        ("about half", "must be 'NUMBER study.path'"),
    ],
)
def test_stored_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str | None
) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"results": {"a": {"b": 0.4291}}}))
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    html, warnings = build(tmp_path, f"So {{stored}}`{text}`.")
    if problem is None:
        assert not warnings
        assert f"So {text.rpartition(' ')[0]}." in html
    else:
        assert problem in warnings


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```{drawing} flow\n:alt: boxes\nText.\n```", None),
        ("```{drawing} flow\nText.\n```", "needs ':alt:'"),
        ("```{drawing} nothing\n:alt: boxes\n```", "no drawing 'nothing'"),
        ("```{rule-list} nothing.at-all\n```", "no rule or stage 'nothing.at-all'"),
    ],
)
def test_directives(tmp_path: Path, text: str, problem: str | None) -> None:
    html, warnings = build(tmp_path, text)
    if problem is None:
        assert not warnings
        assert 'aria-label="boxes"' in html
    else:
        assert problem in warnings


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings(name: str) -> None:
    """Colours are variables of the theme, and nothing is drawn as a picture or fetched."""
    svg = draw(name, "words & more")
    assert svg.startswith('<svg role="img" aria-label="words &amp; more" viewBox=')
    assert "var(--drawing-ink)" in svg
    assert "<image" not in svg
    assert "url(http" not in svg
    rest = svg.replace("http://www.w3.org", "")
    assert "http" not in rest


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda p: p.name)
def test_nothing_is_left_to_be_filled_in(path: Path) -> None:
    text = path.read_text()
    assert not re.findall(r"@@\w*|\{\{\w*", text)
