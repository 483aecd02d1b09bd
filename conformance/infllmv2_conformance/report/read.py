"""Read a report that was written before, by this version or an older one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from infllmv2_conformance.errors import UsageError

from .data import FORMAT, FORMAT_VERSION, Data

SCHEMA = Path(__file__).parent / "report.schema.json"


class ReadError(UsageError):
    """The file is no report that this version can read."""


def read_report(path: Path) -> Data:
    """Return the data of a report, as `to_data` makes them, from any format so far.

    Raises:
        ReadError: the file cannot be read, is no report, or is one of a later format.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ReadError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ReadError(f'{path} is not a report of infllmv2: it has no "format": "{FORMAT}"')
    version = data.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        known = " and ".join(map(str, range(1, FORMAT_VERSION + 1)))
        raise ReadError(
            f"{path} has format_version {version!r}, and this version of infllmv2 reads {known}: "
            "read it with the version that wrote it, or a later one"
        )
    try:
        data = _upgrade(data) if version == 1 else data
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReadError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    error = best_match(_validator().iter_errors(data))
    if error is not None:
        raise ReadError(f"{path} is damaged: {error.json_path}: {error.message[:200]}")
    return data


@cache
def schema() -> Data:
    """Return the JSON Schema of reports."""
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(schema())


def _upgrade(data: Data) -> Data:
    """Return a report of format 1 in format 2: what it did not hold is empty or null."""
    new = {"only": {"stages": [], "rules": []}, "functions": None, "written": None}
    results: list[Data] = []
    for result in data["results"]:
        failure = result["failure"] and {"looks_like": [], "pictures": [], **result["failure"]}
        results.append({"margins": None, **result, "failure": failure})
    return {
        **new,
        **data,
        "format_version": FORMAT_VERSION,
        "verdict": {"running": [], **data["verdict"]},
        "results": results,
    }
