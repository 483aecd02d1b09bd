"""Write the list of rules into `rules.md` when the pages are built, from the suite's own table.

Every rule gets the anchor that `infllmv2 check` prints: its id with `-` in place of `.`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

from infllmv2_conformance.mutants.bank import LONG_MUTANTS, MUTANTS
from infllmv2_conformance.mutants.model import Mutant
from infllmv2_conformance.mutants.reasons import REASONS
from infllmv2_conformance.rules import RULES, Rule
from mutant_pages import cell

PAGE = "rules"
PLACE = "```{rules}\n```\n"
EXPLAINED = {
    "compress": "spec/compress.md",
    "score": "spec/score.md",
    "pool": "spec/pool.md",
    "score_blocks": "spec/pool.md",
    "select": "spec/select.md",
    "fused_select": "spec/select.md",
    "attend": "spec/attend.md",
    "attention": "spec/switch.md",
    "decode": "spec/cache.md",
    "contract": "implementing.md",
    "long": "long-contexts.md",
}


def setup(app: Sphinx) -> dict[str, Any]:
    """Fill in the list when the page is read, and its anchors when it is parsed."""
    app.connect("source-read", _fill_in)
    app.connect("doctree-read", _add_anchors)
    app.connect("env-before-read-docs", _read_again)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def anchor(rule: Rule) -> str:
    """Return where `Rule.link` points within the page."""
    return rule.link.partition("#")[2]


def _read_again(_: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Read the page in every build: its source is a Python module that Sphinx does not watch."""
    if PAGE in env.found_docs and PAGE not in docnames:
        docnames.append(PAGE)


def _fill_in(_: Sphinx, docname: str, content: list[str]) -> None:
    if docname != PAGE:
        return
    if content[0].count(PLACE) != 1:
        raise ExtensionError(f"{PAGE}.md must have one place for the list: {PLACE!r}")
    content[0] = content[0].replace(PLACE, "\n".join(_lines()))


def _lines() -> list[str]:
    lines: list[str] = []
    for stage, rules in groupby(RULES.values(), key=lambda rule: rule.stage):
        if stage not in EXPLAINED:
            raise ExtensionError(f"no page explains the rules of stage {stage!r}")
        lines += [f"## {stage}", "", f"Explained in [{EXPLAINED[stage]}]({EXPLAINED[stage]}).", ""]
        for rule in rules:
            lines += [f"### {rule.id}", "", rule.sentence, "", f"{_needs(rule)}.", ""]
            lines += [*_causes(rule), ""]
    return lines


def _causes(rule: Rule) -> list[str]:
    """Return the faults that the rule is known to find, or why there is none."""
    killed = [m for m in (MUTANTS | LONG_MUTANTS).values() if m.rule == rule.id]
    if not killed:
        reason = REASONS.get(rule.id)
        if not reason:
            raise ExtensionError(f"{rule.id} has neither a mutant nor a reason to have none")
        return [f"No mutant is its own: {cell(reason)}"]
    faults = [m for m in killed if m.base == "eager"] or killed
    return ["Faults that it finds:", "", *(f"- {_fault(mutant)}" for mutant in faults)]


def _fault(mutant: Mutant) -> str:
    return f"{cell(mutant.sentence)} {cell(mutant.seen)} `{mutant.id}`"


def _needs(rule: Rule) -> str:
    calls = ", ".join(f"`{name}`" for name in rule.functions)
    text = f"For each offered function of {calls}" if rule.each else f"Calls {calls}"
    claims = " and ".join(f"`{name}`" for name in rule.claims)
    return f"{text}; applies if {claims} is claimed" if claims else text


def _add_anchors(app: Sphinx, doctree: nodes.document) -> None:
    """Let `fused_select-ties` be found: docutils itself writes `-` for every `_`."""
    if app.env.docname != PAGE:
        return
    slugs = app.env.metadata[PAGE]["myst_slugs"]
    anchors = {rule.id: anchor(rule) for rule in RULES.values()}
    for section in doctree.findall(nodes.section):
        wanted = anchors.pop(section[0].astext(), None)
        if wanted and wanted not in section["ids"]:
            section["ids"].append(wanted)
            slugs[wanted] = (section.line, wanted, section[0].astext())
    if anchors:
        raise ExtensionError(f"rules without an anchor: {sorted(anchors)}")
