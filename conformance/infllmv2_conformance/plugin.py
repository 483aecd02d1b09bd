"""Pytest plugin: the options, and nothing else until an implementation is given.

Pytest loads this module in every session of the environment, so it imports nothing but pytest and
the standard library, and its options begin with `--infllmv2-`. Their short names (`--impl`,
`--device` ...) exist only in sessions that name the suite, where they cannot clash with others.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).parent / "suite"
SUITE_MODULE = "infllmv2_conformance.suite"
BENCH = Path(__file__).parent / "bench"
BENCH_MODULE = "infllmv2_conformance.bench"

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

BENCH_OPTIONS: dict[str, dict[str, Any]] = {
    "lengths": {"metavar": "8k,32k", "help": "benchmark: tokens"},
    "shapes": {"metavar": "NAMES", "help": "benchmark: models"},
    "budgets": {"metavar": "96,64", "help": "benchmark: blocks of a query"},
    "inputs": {"metavar": "KINDS", "help": "benchmark: random,correlated"},
    "tasks": {"metavar": "NAMES", "help": "benchmark: forward,backward,decode"},
    "batches": {"metavar": "1,16", "help": "benchmark: sequences of decode"},
    "baselines": {"metavar": "NAMES", "help": "benchmark: what is timed beside IMPL"},
    "l2": {"metavar": "STATE", "help": "benchmark: cold, hot or both"},
    "effort": {"metavar": "S", "type": float, "help": "benchmark: of a workload"},
    "output": {"metavar": "FILE", "help": "benchmark: keep the figures in this JSON file"},
}


def option(config: pytest.Config, name: str) -> Any:
    """Return the value of one of our options."""
    return config.getoption(_destination(name))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options under names that no other plugin has."""
    group = parser.getgroup("infllmv2", "InfLLM-V2 conformance")
    for name, settings in (OPTIONS | BENCH_OPTIONS).items():
        group.addoption(f"--infllmv2-{name}", dest=_destination(name), **settings)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    """Add the short names, if the suite is asked for; what a conftest has taken stays its own."""
    result = yield
    named = _names_bench(args)
    if named or any(SUITE_MODULE in arg or str(SUITE) in arg for arg in args):
        group = parser.getgroup("infllmv2")
        for name, settings in (OPTIONS | (BENCH_OPTIONS if named else {})).items():
            try:
                group.addoption(f"--{name}", dest=_destination(name), **settings)
            except (ValueError, argparse.ArgumentError):
                continue
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and the part that runs the suite if an implementation is given."""
    config.addinivalue_line("markers", "rule(id): the rule of conformance that this test checks")
    if option(config, "impl") and _names_bench(config.invocation_params.args):
        from .bench.pytest_plugin import BenchPlugin

        config.pluginmanager.register(BenchPlugin(config), "infllmv2_bench")
    elif option(config, "impl"):
        from .suite_plugin import SuitePlugin

        config.pluginmanager.register(SuitePlugin(config), "infllmv2_suite")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse to run the suite or the benchmark against nothing."""
    if option(config, "impl"):
        return
    for folder, what, command in ((SUITE, "suite", "check"), (BENCH, "benchmark", "bench")):
        if any(item.path.is_relative_to(folder) for item in items):
            raise pytest.UsageError(
                f"the conformance {what} needs an implementation: add --impl IMPL, "
                f"or run 'infllmv2 {command} IMPL'"
            )


def _names_bench(args: Sequence[object]) -> bool:
    return any(BENCH_MODULE in str(arg) or str(BENCH) in str(arg) for arg in args)


def _destination(name: str) -> str:
    return f"infllmv2_{name.replace('-', '_')}"
