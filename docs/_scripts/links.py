"""See that every relative link of the README and of its neighbours leads somewhere.

`python docs/_scripts/links.py`. The pages under `docs` are checked by the build itself.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)


def main() -> int:
    """Check the files, and return the exit status."""
    wrong = [f"{name}: {what}" for name in FILES for what in broken(ROOT / name)]
    print("\n".join(wrong) or f"every relative link of {', '.join(FILES)} leads somewhere")
    return 1 if wrong else 0


def broken(page: Path) -> list[str]:
    """Return what is wrong with the relative links of a Markdown file."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    targets = [inline or reference for inline, reference in LINK.findall(text)]
    relative = [t for t in targets if not re.match(r"[a-z][a-z0-9+.-]*:", t)]
    return [what for target in relative if (what := _problem(page, target))]


def _problem(page: Path, target: str) -> str:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return f"{target} does not exist"
    if anchor and anchor not in anchors(file):
        return f"{target}: there is no such heading"
    return ""


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    titles = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


if __name__ == "__main__":
    sys.exit(main())
