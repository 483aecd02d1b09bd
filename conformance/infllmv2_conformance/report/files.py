"""Write reports to a folder, whole or not at all, and never over what is not ours."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from infllmv2_conformance.errors import UsageError

from . import json, junit
from .model import Run

FORMATS = {
    "report.json": (json.to_json, json.is_ours),
    "junit.xml": (junit.to_junit, junit.is_ours),
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
            if path.exists() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
                raise ReportError(f"{path} is not a report of infllmv2: not overwriting it")
    except FileExistsError:
        raise ReportError(f"{folder} is not a folder") from None
    except ReportError:
        raise
    except OSError as error:
        raise ReportError(f"cannot write reports to {folder}: {error.strerror}") from None


def write_reports(run: Run, folder: Path) -> None:
    """Write every format; each file is replaced at once, so that it is never half a report."""
    for name, (render, _) in FORMATS.items():
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(render(run))
        Path(temporary).chmod(0o644)
        Path(temporary).replace(folder / name)
