"""Fill in what commands print, between `<!-- transcript: COMMAND -->` and `<!-- end -->`.

`python docs/_scripts/transcripts.py` runs the commands and rewrites the files. With `--check` it
only sees that no transcript is empty, or of another command.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("README.md", "docs/failures.md", "docs/mutants.md")
PLACE = re.compile(
    r"(?P<begin><!-- transcript: (?P<command>[^\n]+?) -->\n)(?P<body>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)
WIDTH = 100
KEPT_ROWS = 6
KEPT_FAILURES = 1
ROW = re.compile(r"\s*[a-z_]+\.[a-z-]+|\s*(passed|failed|error|not claimed|known failure) ")


def main() -> int:
    """Rewrite or check the files, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only see that nothing is left empty")
    parser.add_argument("files", nargs="*", default=list(FILES), help="relative to the repository")
    options = parser.parse_args()
    empty = 0
    for name in options.files:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if text.count("<!-- transcript:") != len(PLACE.findall(text)):
            raise SystemExit(f"{name}: a transcript has no '<!-- end -->'")
        if options.check:
            empty += _report_empty(name, text)
        else:
            path.write_text(PLACE.sub(_fill_in, text), encoding="utf-8")
    return 1 if empty else 0


def _report_empty(name: str, text: str) -> int:
    wrong: list[str] = []
    for place in PLACE.finditer(text):
        filled = rf"```\w*\n\$ {re.escape(place['command'])}\n.+\n```\n"
        if not re.fullmatch(filled, place["body"], re.DOTALL):
            wrong.append(place["command"])
    for command in wrong:
        print(f"{name}: the transcript of '{command}' is missing or of another command")
    return len(wrong)


def _fill_in(place: re.Match[str]) -> str:
    command = place["command"]
    print(command, file=sys.stderr)
    body = f"```text\n$ {command}\n{_shorten(_run(command))}\n```\n"
    return place["begin"] + body + place["end"]


def _run(command: str) -> str:
    """Return what a command prints without colours, with this environment's `infllmv2`."""
    words = shlex.split(command)
    if words[0] == "infllmv2":
        words[:1] = [sys.executable, "-m", "infllmv2_conformance"]
    plain = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    noisy = {"FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS"}
    environment = {k: v for k, v in os.environ.items() if k not in noisy} | plain
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(words, cwd=ROOT, env=environment, text=True, **output)
    if done.returncode not in (0, 1):
        raise SystemExit(f"'{command}' ended with status {done.returncode}:\n{done.stdout}")
    return done.stdout.replace(f"{ROOT}{os.sep}", "")


def _shorten(output: str) -> str:
    """Cut long tables in the middle, and all failures but the first."""
    lines = [line.rstrip() for line in output.strip("\n").split("\n")]
    lines = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "\n".join(_cut_tables(_cut_failures(lines)))


def _cut_failures(lines: list[str]) -> list[str]:
    starts = [i for i, line in enumerate(lines) if re.match(r"(failed|error) ─", line)]
    if len(starts) <= KEPT_FAILURES:
        return lines
    left_out = len(starts) - KEPT_FAILURES
    more = f"... and {left_out} more failure{'s' if left_out > 1 else ''}"
    return [*lines[: starts[KEPT_FAILURES]], more, "", lines[-1]]


def _cut_tables(lines: list[str]) -> list[str]:
    kept: list[str] = []
    rows: list[list[str]] = []
    for line in [*lines, ""]:
        if ROW.match(line):
            rows.append([line])
        elif rows and line.startswith("  "):  # belongs to the row above
            rows[-1].append(line)
        else:
            kept += _cut_rows(rows)
            rows = []
            kept.append(line)
    return kept[:-1]


def _cut_rows(rows: list[list[str]]) -> list[str]:
    """Leave out what is not claimed, and the middle of the rest; `...` stands for both."""
    claimed = [row for row in rows if "not claimed" not in row[0]]
    if len(claimed) > KEPT_ROWS:
        half = KEPT_ROWS // 2
        claimed = [*claimed[:half], ["..."], *claimed[-half:]]
    elif len(claimed) < len(rows):
        claimed.append(["..."])
    return [line for row in claimed for line in row]


if __name__ == "__main__":
    sys.exit(main())
