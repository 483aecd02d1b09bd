"""Run the benchmark under pytest: which figures there are, and what they measured."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.plugin import option

from .figures import Figure, identity, key_of
from .machine import describe_machine
from .planning import make_candidates, make_wish
from .record import Record
from .session import Session
from .workloads import Workload

WISHES = ("lengths", "shapes", "budgets", "inputs", "tasks", "batches", "baselines", "l2")


def _keep_quiet(workload: Workload, figures: list[Figure], overlap: object) -> None:
    """Show nothing: pytest tells about each figure."""
    del workload, figures, overlap


class BenchPlugin:
    """Hooks and fixtures of a session that benchmarks.

    Args:
        config: of the session; `--impl` may name several, parted by commas.
    """

    def __init__(self, config: pytest.Config) -> None:
        if find_spec("pytest_benchmark") is None:
            raise pytest.UsageError("the benchmark needs pytest-benchmark: pip install it")
        try:
            names = option(config, "impl").split(",")
            candidates, self.device = make_candidates(names, option(config, "device"))
            texts = {name: option(config, name) for name in WISHES}
            wish = make_wish(
                self.device,
                [candidate.name for candidate in candidates],
                seed=option(config, "seed"),
                effort=option(config, "effort"),
                **texts,
            )
            self.machine = describe_machine(self.device)
            self._folder = tempfile.TemporaryDirectory(prefix="infllmv2-bench-")
            path = Path(option(config, "output") or Path(self._folder.name) / "bench.json")
            record = Record(path, self.machine, wish.settings(names))
            self.session = Session(candidates, self.device, wish, record, _keep_quiet)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
        self._figures: dict[str, Figure] = record.figures

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make a test of every figure."""
        if "figure" not in metafunc.fixturenames:
            return
        found: list[tuple[Workload, str]] = []
        for workload in self.session.wish.workloads():
            for who, what in self.session.entrants(workload):
                names = [identity(workload, who, what, s) for s in self.session.wish.l2]
                found += [(workload, key_of(name)) for name in names]
        metafunc.parametrize("figure", found, ids=[key for _, key in found], indirect=True)

    @pytest.fixture
    def figure(self, request: pytest.FixtureRequest) -> Figure:
        """Return a figure; the first of a workload times all of them."""
        workload, key = request.param
        if self.session.record.ceilings is None:
            self.session.measure_ceilings()
        if not self.session.record.has(key):
            self.session.run_workload(workload)
        return self.session.record.figures[key]

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        """Tell pytest-benchmark about the GPU and the versions; it compares them."""
        gpu = self.machine.get("gpu") or {}
        names = ("name", "driver", "multiprocessors", "memory_bytes", "l2_bytes")
        machine_info["gpu"] = {name: gpu.get(name) for name in names} if gpu else None
        machine_info["packages"] = self.machine["packages"]
        machine_info["cuda"] = self.machine["cuda"]

    def pytest_unconfigure(self) -> None:
        """Take the temporary record away."""
        self._folder.cleanup()
