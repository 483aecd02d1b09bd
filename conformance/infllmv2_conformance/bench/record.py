"""The file that holds a benchmark; `docs/benchmarks.md` describes it."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infllmv2_conformance.environment import package_version
from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.events import plain

from .counts import Ceilings
from .figures import Figure, key_of

FORMAT = "infllmv2-bench"
FORMAT_VERSION = 1
OUT_OF_TIME = "out of time"
Data = dict[str, Any]


class RecordError(UsageError):
    """A file is no benchmark, or not the one that is to be continued."""


def load(path: Path) -> Data:
    """Read a benchmark.

    Raises:
        RecordError: the file cannot be read, or holds something else.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read the benchmark {path}: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RecordError(f"{path} is not a benchmark of infllmv2")
    if data.get("format_version") != FORMAT_VERSION:
        version = data.get("format_version")
        raise RecordError(f"{path} has version {version}, but this program reads {FORMAT_VERSION}")
    return data


def _joined(old: Data, new: Data) -> Data:
    """Return the lists of both settings joined: what was asked for in all runs together."""
    names = ("implementations", "shapes", "lengths", "budgets", "inputs", "tasks", "batches")
    return {name: list(dict.fromkeys([*old[name], *new[name]])) for name in names}


class Record:
    """Hold a benchmark and write it after every change, whole or not at all.

    Args:
        path: the file; a benchmark of the same kind in it is continued.
        machine: what `describe_machine` said.
        settings: what was asked for; a file with other `fixed` settings is not continued.
    """

    def __init__(self, path: Path, machine: Data, settings: Data) -> None:
        self.path = path
        self.data: Data = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": package_version(),
            "machine": machine,
            "settings": settings,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "complete": False,
            "ceilings": None,
            "overlap": [],
            "figures": [],
        }
        if path.exists():
            self._continue(load(path))
        self.figures: dict[str, Figure] = {key_of(f): f for f in self.data["figures"]}
        self.save()

    def _continue(self, old: Data) -> None:
        """Take over what was measured before.

        Raises:
            RecordError: it was measured elsewhere, on other sources or with other settings.
        """
        for name in ("commit", "changed", "device", "packages", "cuda"):
            self._require_same(f"machine.{name}", old["machine"], self.data["machine"], name)
        was, now = ((data["machine"].get("gpu") or {}) for data in (old, self.data))
        self._require_same("machine.gpu.name", was, now, "name")
        for name in ("dtype", "seed", "l2", "baselines"):
            self._require_same(f"settings.{name}", old["settings"], self.data["settings"], name)
        self.data["settings"] |= _joined(old["settings"], self.data["settings"])
        for name in ("started", "seconds", "ceilings", "overlap", "figures"):
            self.data[name] = old[name]

    def _require_same(self, what: str, old: Data, new: Data, name: str) -> None:
        if plain(old.get(name)) != plain(new.get(name)):
            raise RecordError(
                f"{self.path} cannot be continued: {what} was {old.get(name)!r}, and is now "
                f"{new.get(name)!r}; give another --output"
            )

    def has(self, key: str) -> bool:
        """Say whether a figure needs no further attempt."""
        figure = self.figures.get(key)
        return figure is not None and not (figure["reason"] or "").startswith(OUT_OF_TIME)

    def add(self, figures: list[Figure]) -> None:
        """Put figures in, each in place of an earlier attempt, and save."""
        self.figures |= {key_of(figure): figure for figure in figures}
        self.save()

    def add_overlap(self, entry: Data) -> None:
        """Note how much neighbouring selections share."""
        if entry not in self.data["overlap"]:
            self.data["overlap"].append(entry)

    @property
    def ceilings(self) -> Ceilings | None:
        """Return the measured ceilings, None before they were."""
        return Ceilings(**self.data["ceilings"]) if self.data["ceilings"] else None

    @ceilings.setter
    def ceilings(self, value: Ceilings) -> None:
        self.data["ceilings"] = asdict(value)
        self.save()

    def save(self) -> None:
        """Replace the file at once, so that it is never half a benchmark.

        Raises:
            RecordError: it cannot be written.
        """
        self.data["figures"] = list(self.figures.values()) if hasattr(self, "figures") else []
        text = json.dumps(plain(self.data), indent=1, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(self.path)
        except OSError as error:
            raise RecordError(f"cannot write {self.path}: {error.strerror}") from None
