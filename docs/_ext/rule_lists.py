"""List rules on the pages that explain them, from the suite's own table.

    ```{rule-list} compress
    ```

An argument is a stage, which stands for all of its rules, or a rule's id.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from infllmv2_conformance.rules import RULES, Rule


class RuleList(SphinxDirective):
    """Insert a list of rules: each one's id, which links to it, and its sentence."""

    required_arguments = 1
    optional_arguments = 20

    def run(self) -> list[nodes.Node]:
        """Return the list's nodes."""
        rules = [rule for name in self.arguments for rule in self._named(name)]
        to_root = "../" * self.env.docname.count("/")
        lines = [
            f"- [{rule.id}]({to_root}{rule.link.removeprefix('docs/')}): {rule.sentence}"
            for rule in dict.fromkeys(rules)
        ]
        return self.parse_text_to_nodes("\n".join(lines))

    def _named(self, name: str) -> list[Rule]:
        rules = [rule for rule in RULES.values() if name in (rule.id, rule.stage)]
        if not rules:
            raise self.error(f"no rule or stage {name!r}")
        return rules


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("rule-list", RuleList)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
