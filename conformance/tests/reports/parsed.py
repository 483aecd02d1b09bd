"""Look at a page without a browser, for what no page of ours may have."""

from __future__ import annotations

import re
from html.parser import HTMLParser

DOCUMENTATION = ("https://arxiv.org/abs/2509.24663",)
VOID = {"wbr", "meta", "link", "br", "img", "input", "hr"}
LOADS = {"src", "srcset", "poster", "action", "formaction", "background", "data", "xlink:href"}


class Parsed(HTMLParser):
    """A page, taken apart.

    Args:
        text: of the page.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.problems: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"{tag} is never closed" for tag in self._open]
        self._check()

    @property
    def text(self) -> str:
        """Return what a reader sees, with single spaces."""
        return " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.words.append("" if tag == "wbr" else " ")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"{tag} is closed, but not open")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.problems += re.findall(r"@import|url\([^)]*\)", data)
        elif not self._open or self._open[-1] != "script":
            self.words.append(data)

    def _check(self) -> None:
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        self.problems += [
            f"id {name} is there twice" for name in {i for i in ids if ids.count(i) > 1}
        ]
        for tag, attrs in self.tags:
            self._check_tag(tag, attrs, set(ids))

    def _check_tag(self, tag: str, attrs: dict[str, str], ids: set[str]) -> None:
        target = attrs.get("href", "")
        if target.startswith("#"):
            self.problems += [] if target[1:] in ids else [f"{target} is nowhere"]
        elif target and not (target in DOCUMENTATION or target == "data:,"):
            self.problems.append(f"{tag} points to {target}")
        for name in attrs:
            if name in LOADS or name.startswith("on") or name == "style":
                self.problems.append(f"{tag} has {name}")
        pictures = tag in ("img", "svg")
        if pictures and not (attrs.get("aria-label") or attrs.get("alt") or "aria-hidden" in attrs):
            self.problems.append(f"{tag} says nothing to those who cannot see it")
