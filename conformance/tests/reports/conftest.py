"""What the tests of reports share: the schema, closed, and a browser if there is one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from infllmv2_conformance.report.read import schema

from .browser import NAMES, Browser, find_chromium


@pytest.fixture(scope="session")
def validate() -> Callable[[Any], None]:
    """Return what raises unless a report is as documented, with no field that is not."""
    closed = copy.deepcopy(schema())
    close(closed)
    return Draft202012Validator(closed).validate


def close(node: Any) -> None:
    """Admit no field of an object but those that the schema names."""
    if isinstance(node, dict):
        if "properties" in node:
            node["additionalProperties"] = False
        for value in node.values():
            close(value)
    elif isinstance(node, list):
        for value in node:
            close(value)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Run a headless browser."""
    program = find_chromium()
    if program is None:
        pytest.skip(f"no browser here: looked for {', '.join(NAMES)}")
    with Browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running
