"""Write the edits that no rule notices into `survivors.md`, from the data file of the suite."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

PAGE = "survivors"
PLACE = "```{survivors}\n```\n"
FILE = Path(__file__).parents[2] / "conformance/infllmv2_conformance/mutants/survivors.toml"
TITLES = {
    "equal": "The code means the same",
    "speed": "Only slower, or larger",
    "free": "The contract leaves it open",
    "defence": "A second safeguard behind a first",
    "unreachable": "No legal argument comes there",
}


def setup(app: Sphinx) -> dict[str, Any]:
    """Fill in the list when the page is read."""
    app.connect("source-read", _fill_in)
    app.connect("env-before-read-docs", _read_again)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _read_again(_: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    if PAGE in env.found_docs and PAGE not in docnames:
        docnames.append(PAGE)


def _fill_in(_: Sphinx, docname: str, content: list[str]) -> None:
    if docname != PAGE:
        return
    if content[0].count(PLACE) != 1:
        raise ExtensionError(f"{PAGE}.md must have one place for the list: {PLACE!r}")
    rows = tomllib.loads(FILE.read_text(encoding="utf-8")).get("survivor", [])
    content[0] = content[0].replace(PLACE, "\n".join(_lines(rows)))


def _lines(rows: list[dict[str, str]]) -> Iterator[str]:
    order = list(TITLES)
    rows = sorted(rows, key=lambda r: (order.index(r["kind"]), r["reason"], r["module"]))
    for kind, of_kind in groupby(rows, key=lambda row: row["kind"]):
        yield from ("", f"## {TITLES[kind]}", "")
        for reason, same in groupby(of_kind, key=lambda row: row["reason"]):
            yield from ("", reason, "", "```diff")
            place = ""
            for row in same:
                if place != f"{row['module']}.{row['function']}":
                    place = f"{row['module']}.{row['function']}"
                    yield f"# {place}"
                yield from (f"- {row['before']}", f"+ {row['after']}")
            yield from ("```", "")
