"""Pytest plugin: the options, and nothing else until an implementation is given.

Pytest loads this module in every session of the environment, so it imports nothing but pytest and
the standard library, and its options begin with `--infllmv2-`. Their short names (`--impl`,
`--device` ...) exist only in sessions that name the suite, where they cannot clash with others.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).parent / "suite"
SUITE_MODULE = "infllmv2_conformance.suite"

OPTIONS: dict[str, dict[str, Any]] = {
    "impl": {"metavar": "IMPL", "help": "name, pkg.module:ATTR or path/file.py:ATTR"},
    "profile": {"metavar": "NAME", "default": "quick", "help": "size of the search (quick)"},
    "device": {"metavar": "TYPE", "help": "cpu or cuda (the first one that IMPL claims)"},
    "seed": {"metavar": "N", "type": int, "default": 0, "help": "what the search starts from (0)"},
    "known-failures": {"metavar": "FILE", "help": "rules that IMPL breaks, with reasons; strict"},
    "stage": {"metavar": "STAGE", "action": "append", "help": "only rules of this stage"},
    "rule": {"metavar": "ID", "action": "append", "help": "only this rule"},
    "function": {"metavar": "NAME", "action": "append", "help": "only this contract function"},
    "case": {"metavar": "CASE", "help": "only this case, as a failure prints it"},
    "long": {"metavar": "TOKENS", "type": int, "default": 0, "help": "run the stage long instead"},
    "events": {"metavar": "FILE", "help": "append what happens as JSON lines"},
    "resume": {"action": "store_true", "help": "leave out rules that the events say have begun"},
}


def option(config: pytest.Config, name: str) -> Any:
    """Return the value of one of our options."""
    return config.getoption(_destination(name))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options under names that no other plugin has."""
    group = parser.getgroup("infllmv2", "InfLLM-V2 conformance")
    for name, settings in OPTIONS.items():
        group.addoption(f"--infllmv2-{name}", dest=_destination(name), **settings)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    """Add the short names, if the suite is asked for; what a conftest has taken stays its own."""
    result = yield
    if any(SUITE_MODULE in arg or str(SUITE) in arg for arg in args):
        group = parser.getgroup("infllmv2")
        for name, settings in OPTIONS.items():
            try:
                group.addoption(f"--{name}", dest=_destination(name), **settings)
            except (ValueError, argparse.ArgumentError):
                continue
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and the part that runs the suite if an implementation is given."""
    config.addinivalue_line("markers", "rule(id): the rule of conformance that this test checks")
    if option(config, "impl"):
        from .suite_plugin import SuitePlugin

        config.pluginmanager.register(SuitePlugin(config), "infllmv2_suite")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse to run the suite against nothing."""
    if not option(config, "impl") and any(item.path.is_relative_to(SUITE) for item in items):
        raise pytest.UsageError(
            "the conformance suite needs an implementation: add --impl IMPL, "
            "or run 'infllmv2 check IMPL'"
        )


def _destination(name: str) -> str:
    return f"infllmv2_{name.replace('-', '_')}"
