"""Every stage's page has all that a reader needs, and nothing is drawn or ruled unseen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from _drawings import DRAWINGS
from infllmv2_conformance.rules import RULES

DOCS = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text() for path in sorted((DOCS / "spec").glob("*.md"))}
STAGES = [name for name in PAGES if name != "index"]
PARTS = {
    "an equation": r"^\$\$$",
    "a figure": r"^```\{drawing\} \w+$",
    "the source": r"^```\{literalinclude\} \.\./\.\./reference/",
    "an example": r"^>>> ",
    "what is free": r"^## What implementations may choose$",
    "its rules": r"^```\{rule-list\} ",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stage", STAGES)
def test_page_is_complete(stage: str, part: str) -> None:
    assert re.search(PARTS[part], PAGES[stage], re.MULTILINE)


def test_every_rule_of_a_stage_is_on_a_page() -> None:
    pages = [*PAGES.values(), (DOCS / "long-contexts.md").read_text()]
    lists = re.findall(r"^```\{rule-list\} (.+)$", "\n".join(pages), re.MULTILINE)
    named = {name for line in lists for name in line.split()}
    rules = [r for r in RULES.values() if r.stage != "contract"]
    assert not [r.id for r in rules if not {r.id, r.stage} & named]


def test_every_drawing_is_on_a_page() -> None:
    text = "\n".join(path.read_text() for path in DOCS.rglob("*.md"))
    assert sorted(DRAWINGS) == sorted(set(re.findall(r"^```\{drawing\} (\w+)$", text, re.M)))
