"""Several processes give what one gives: the verdict, the cases, the failing case."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infllmv2_conformance.device import use_share
from infllmv2_conformance.suite_plugin import SuitePlugin

BROKEN = Path(__file__).parents[3] / "docs" / "examples" / "broken_kernel.py"
SOME = ("attend.values", "attend.partial-block", "attend.few-blocks", "contract.form", "pool.edges")


def found(path: Path) -> dict[str, Any]:
    """Return what must not depend on the number of processes."""
    data = json.loads(path.read_text())
    results = {
        f"{r['rule']}[{r['function']}]": (
            *(r["outcome"], r["cases"], r["worst_ratio"], r["margins"]),
            (r["failure"] or {}).get("case"),
            (r["failure"] or {}).get("where"),
            (r["failure"] or {}).get("pictures"),
        )
        for r in data["results"]
    }
    return {"rules": data["verdict"]["rules"], "order": list(results), **results}


@pytest.mark.parametrize(
    ("impl", "asked"),
    [
        ("eager", ["--stage", "pool"]),
        (str(BROKEN), [word for rule in SOME for word in ("--rule", rule)]),
    ],
)
def test_two_processes_give_what_one_gives(tmp_path, infllmv2, impl, asked):
    pytest.importorskip("xdist")
    alone = infllmv2("check", impl, *asked, "--report", "alone")
    shared = infllmv2("check", impl, *asked, "--report", "shared", "-n", "2")
    assert alone.returncode == shared.returncode, shared.stdout + shared.stderr
    one, two = (found(tmp_path / name / "report.json") for name in ("alone", "shared"))
    assert one == two
    if impl != "eager":
        assert one["attend.values[None]"][0] == "failed"
        assert one["attend.values[None]"][4].startswith("sequences=")


def test_worker_that_takes_over_gets_the_number_of_the_one_that_died():
    plugin = SuitePlugin.__new__(SuitePlugin)
    plugin.shares, plugin.log = {}, None

    def start(name: str) -> Any:
        node = SimpleNamespace(gateway=SimpleNamespace(id=name), workerinput={})
        plugin.pytest_configure_node(node)
        return node

    nodes = [start(f"gw{i}") for i in range(3)]
    assert [node.workerinput["infllmv2_share"] for node in nodes] == [0, 1, 2]
    plugin.pytest_testnodedown(nodes[1], "it crashed")
    assert start("gw3").workerinput["infllmv2_share"] == 1
    assert start("gw4").workerinput["infllmv2_share"] == 3


def test_workers_share_the_gpus(monkeypatch):
    used: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for worker in range(4):
        use_share(worker)
    assert used == [0, 1, 0, 1]
