"""Write the bank of mutants into `mutants.md` when the pages are built: a table for each stage.

Every mutant gets an anchor, its id with `-` in place of `.`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

from infllmv2_conformance.mutants.bank import MUTANTS
from infllmv2_conformance.mutants.model import Mutant
from infllmv2_conformance.mutants.reasons import REASONS
from infllmv2_conformance.rules import RULES

PAGE = "mutants"
TABLES = "```{mutants}\n```\n"
REASONS_PLACE = "```{reasons}\n```\n"


def setup(app: Sphinx) -> dict[str, Any]:
    """Fill in the tables when the page is read."""
    app.connect("source-read", _fill_in)
    app.connect("env-before-read-docs", _read_again)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _read_again(_: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Read the page in every build: its source is a Python package that Sphinx does not watch."""
    if PAGE in env.found_docs and PAGE not in docnames:
        docnames.append(PAGE)


def _fill_in(_: Sphinx, docname: str, content: list[str]) -> None:
    if docname != PAGE:
        return
    for place, lines in ((TABLES, _tables()), (REASONS_PLACE, _reasons())):
        if content[0].count(place) != 1:
            raise ExtensionError(f"{PAGE}.md must have one place for {place!r}")
        content[0] = content[0].replace(place, "\n".join(lines) + "\n")


def _tables() -> list[str]:
    lines: list[str] = []
    order = list(RULES)
    mutants = sorted(MUTANTS.values(), key=lambda m: order.index(m.rule))  # as stages run
    for stage, group in groupby(mutants, key=lambda mutant: mutant.stage):
        rows = [_row(mutant) for mutant in group]
        lines += ["", f"### {stage}", "", f"{len(rows)} mutants.", ""]
        lines += ["| mutant | what is changed | seen in practice | killed by |"]
        lines += ["| --- | --- | --- | --- |", *rows]
    return lines


def _row(mutant: Mutant) -> str:
    rule = RULES[mutant.rule]
    name = f"`{mutant.rule}`" + (f" of `{mutant.function}`" if mutant.function else "")
    killer = f"[{name}](rules.md#{rule.link.partition('#')[2]})"
    anchor = f'<span id="{mutant.id.replace(".", "-")}"></span>`{mutant.id}`'
    return f"| {anchor} | {cell(mutant.sentence)} | {cell(mutant.seen)} | {killer} |"


def _reasons() -> list[str]:
    return [f"- `{rule}`: {cell(reason)}" for rule, reason in REASONS.items()]


def cell(text: str) -> str:
    """Let a text stand in a table: formulas as they are, no markup by accident."""
    for character in "\\|*_`<$":
        text = text.replace(character, f"\\{character}")
    return text
