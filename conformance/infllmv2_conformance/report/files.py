"""Write reports to a folder, whole or not at all, and never over what is not ours."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from infllmv2_conformance.errors import UsageError

from . import badge, html, json, junit
from .data import Data
from .model import Run

FORMATS = {
    "report.json": (json.to_json, json.is_ours),
    "junit.xml": (junit.to_junit, junit.is_ours),
    "report.html": (html.to_html, html.is_ours),
    "badge.json": (badge.to_badge, badge.is_ours),
}


class ReportError(UsageError):
    """The folder cannot take the reports."""


def check_folder(folder: Path) -> None:
    """Make the folder, and make sure that reports can be written into it.

    Raises:
        ReportError: it cannot be made or written to, or holds a file that is not a report.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name, (_, is_ours) in FORMATS.items():
            path = folder / name
            if path.exists() and not is_ours(_text(path)):
                raise ReportError(f"{path} is not a report of infllmv2: not overwriting it")
    except FileExistsError:
        raise ReportError(f"{folder} is not a folder") from None
    except ReportError:
        raise
    except OSError as error:
        raise ReportError(f"cannot write reports to {folder}: {error.strerror}") from None


def write_reports(run: Run, folder: Path) -> None:
    """Write every format.

    Raises:
        ReportError: one cannot be written; the one that was there before is still whole.
    """
    for name, (render, _) in FORMATS.items():
        write_whole(folder / name, render(run))


def write_page(data: Data, path: Path) -> None:
    """Write the page of a report that was read.

    Raises:
        ReportError: it cannot be written, or would replace a file that is no such page.
    """
    if path.exists() and not (path.is_file() and html.is_ours(_text(path))):
        raise ReportError(f"{path} is not a page of infllmv2: not overwriting it")
    write_whole(path, html.render(data))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that it is never half of one.

    Raises:
        ReportError: it cannot be written; what was there before is still whole.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        raise ReportError(f"cannot write {path}: {error.strerror}") from None
