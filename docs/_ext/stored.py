"""Hold the numbers of a page against the stored results that they come from.

    {stored}`0.43 needles.recall.one_stage.8192` and {stored}`43 % needles.recall.one_stage.8192`

print `0.43` and `43 %`. The build fails unless the stored number rounds to what the page says.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

RESULTS = Path(__file__).parents[1] / "results" / "studies"
TEXT = re.compile(r"(?P<shown>(?P<number>[+-]?[\d ]*\.?\d+)(?P<percent> ?%)?) (?P<path>\S+)")


class Stored(SphinxRole):
    """Print a number after comparing it with the stored one."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the text, or an error."""
        parts = TEXT.fullmatch(self.text)
        if parts is None:
            return self._error("must be 'NUMBER study.path' or 'NUMBER % study.path'")
        shown = Decimal(parts["number"].replace(" ", ""))
        try:
            value = look_up(parts["path"])
        except (KeyError, FileNotFoundError) as error:
            return self._error(f"no stored number: {error!r}")
        value *= 100 if parts["percent"] else 1
        if abs(shown - value) > Decimal("0.5001").scaleb(int(shown.as_tuple().exponent)):
            return self._error(f"the stored number is {value}")
        return [nodes.Text(parts["shown"])], []

    def _error(self, what: str) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        message = self.inliner.reporter.error(f"{self.rawtext}: {what}", line=self.lineno)
        return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]


def look_up(path: str) -> Decimal:
    """Return the number that `study.key.key` names.

    Raises:
        KeyError: there is no such number.
        FileNotFoundError: there is no such study.
    """
    study, *keys = path.split(".")
    value = json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8"))["results"]
    for name in keys:
        value = value[name]
    if not isinstance(value, int | float):
        raise KeyError(path)
    return Decimal(value)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the role."""
    app.add_role("stored", Stored())
    app.connect("env-before-read-docs", _read_again)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _read_again(_: Sphinx, env: Any, docnames: list[str]) -> None:
    """Read the studies in every build: their results may have changed."""
    docnames += sorted(n for n in env.found_docs - set(docnames) if n.startswith("studies/"))
