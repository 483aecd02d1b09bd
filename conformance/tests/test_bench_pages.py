"""Stored benchmarks, the pages made of them, and the workflow that makes new ones."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from infllmv2_conformance.bench.figures import not_run
from infllmv2_conformance.bench.gate import compare
from infllmv2_conformance.bench.plots import PLOTS, THEMES, draw_all
from infllmv2_conformance.bench.record import RecordError, load
from infllmv2_conformance.bench.words import SHAPE_NAMES
from infllmv2_conformance.bench.workloads import SHAPES, Workload
from infllmv2_conformance.cli import run_command
from infllmv2_conformance.errors import UsageError

ROOT = Path(__file__).parents[2]
STORED = sorted((ROOT / "docs" / "results" / "benchmarks").glob("*.json"))


@pytest.fixture(scope="module")
def pages():
    """The script that fills in the pages."""
    path = ROOT / "docs" / "_scripts" / "benchmarks.py"
    spec = importlib.util.spec_from_file_location("benchmark_pages", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_and_plots_are_those_of_the_stored_figures(pages):
    assert list(pages.find_stale()) == []


def test_a_changed_figure_makes_pages_and_plots_stale(pages, tmp_path, monkeypatch):
    for name in (*pages.FILES, *(p.relative_to(ROOT) for p in STORED)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for drawn in pages.benchmarks():
        folder = pages.folder_of(drawn)
        folder.mkdir()
        for path in (ROOT / drawn.relative_to(tmp_path)).with_suffix("").glob("*.svg"):
            (folder / path.name).write_bytes(path.read_bytes())
    assert list(pages.find_stale()) == []
    benchmark = pages.benchmarks()[0]  # that of README.md
    data = json.loads(benchmark.read_text())
    figure = next(f for f in data["figures"] if f["length"] == 8192 and f["seconds"])
    figure["seconds"]["median"] *= 2
    benchmark.write_text(json.dumps(data))
    stale = list(pages.find_stale())
    assert "README.md" in stale
    assert f"{benchmark.stem}/latency-dark.svg" in stale


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_benchmarks_say_what_they_are(path):
    data = load(path)
    machine = data["machine"]
    assert len(machine["commit"]) == 40
    assert {"name", "driver", "sm_clock_mhz"} <= machine["gpu"].keys()
    assert {"torch", "triton"} <= machine["packages"].keys()
    assert machine["cuda"]
    assert data["ceilings"]["copy"] > 1e11
    for figure in data["figures"]:
        if figure["status"] == "measured":
            assert figure["worst_ratio"] <= 1
            assert {"median", "iqr", "min", "rounds"} <= figure["seconds"].keys()
            assert len(figure["seconds"]["rounds"]) >= 3
        else:
            assert figure["seconds"] is None
            assert figure["reason"]


def test_plots_are_drawn_for_light_and_dark_pages(tmp_path):
    names = {path.name for path in draw_all(load(STORED[0]), tmp_path)}
    assert names == {f"{name}-{theme.name}.svg" for name in PLOTS for theme in THEMES}
    light, dark = ((tmp_path / f"latency-{t.name}.svg").read_text() for t in THEMES)
    assert THEMES[0].ink in light
    assert THEMES[1].ink in dark
    assert "milliseconds</text>" in light  # text, not outlines
    assert light.count("\n") == dark.count("\n")


def test_a_file_that_is_no_benchmark_is_refused(tmp_path, capsys):
    path = tmp_path / "report.json"
    for text, message in (
        ("{", "cannot read the benchmark"),
        ('{"format": "infllmv2-report"}', "is not a benchmark of infllmv2"),
        ('{"format": "infllmv2-bench", "format_version": 9}', "has version 9"),
    ):
        path.write_text(text)
        with pytest.raises(RecordError, match=message):
            load(path)
        before = path.read_bytes()
        assert run_command(["bench", "eager", "--lengths", "64", "--output", str(path)]) == 2
        assert message in capsys.readouterr().err
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench", "Missing argument"),
        ("bench eager --lengths 8q", "lengths must be numbers such as 8k,128k,1M"),
        ("bench eager --shapes minicmp4", "unknown shape 'minicmp4'; known: minicpm4"),
        ("bench eager --budgets 5", "budget must be at least 6 for the shape tiny"),
        ("bench eager --l2 warm", "unknown l2 'warm'; known: cold, hot, both"),
        ("bench eager --functions atend", "did you mean attend?"),
        ("bench eager --baselines nothing", "unknown implementation 'nothing'"),
        ("bench eager --compare nowhere.json", "cannot read the benchmark nowhere.json"),
        ("bench-compare a.json b.json", "cannot read the benchmark a.json"),
    ],
)
def test_usage_errors_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def _figure(**facts):
    workload = Workload(SHAPES["tiny"], 64, 8)
    (figure,) = not_run(workload, [("kernel", "attend")], ("cold",), "why")
    times = {"median": 1.0, "iqr": 0.0, "min": 1.0, "mean": 1.0, "rounds": [1.0] * 3}
    measured = {"status": "measured", "reason": None, "seconds": times, "host_seconds": 0.1}
    figure |= measured | {"timing": "events", "dense": "cudnn", "ratio_to_dense": 2.0}
    return figure | facts


def _data(*figures, gpu="H100"):
    return {"machine": {"gpu": {"name": gpu}, "device": "cuda"}, "figures": list(figures)}


def test_the_gate_fails_what_got_slower_or_lost_its_number():
    old = _data(_figure())
    assert compare(old, _data(_figure(ratio_to_dense=2.19))).failed == []
    (slower,) = compare(old, _data(_figure(ratio_to_dense=2.21))).failed
    assert slower.slower == pytest.approx(0.105)
    gone = {"seconds": None, "ratio_to_dense": None, "reason": "the output is wrong"}
    (lost,) = compare(old, _data(_figure(status="wrong", **gone))).failed
    assert lost.reason == "the output is wrong"
    (other,) = compare(old, _data(_figure(dense="flash"))).failed
    assert other.reason == "compared with flash, not cudnn"


def test_the_gate_skips_what_says_nothing():
    host = _figure(host_seconds=0.9)
    assert compare(_data(host), _data(_figure(ratio_to_dense=9.0))).by_host
    became_host = _figure(host_seconds=2.0, ratio_to_dense=4.0)
    assert compare(_data(_figure()), _data(became_host)).failed  # a new wait is a regression
    late = _figure(status="not run", seconds=None, ratio_to_dense=None, reason="out of time")
    both = _data(_figure(), _figure(l2="hot")), _data(_figure(), late | {"l2": "hot"})
    assert len(compare(*both).skipped) == 1
    with pytest.raises(UsageError, match="of H100 and of H200 cannot be compared"):
        compare(_data(_figure()), _data(_figure(), gpu="H200"))
    with pytest.raises(UsageError, match="no figure in common"):
        compare(_data(_figure()), _data(_figure(l2="hot")))


def test_bench_compare_ends_with_status_1_if_slower(tmp_path, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, ratio in zip(paths, (2.0, 2.4), strict=True):
        head = {"format": "infllmv2-bench", "format_version": 1}
        path.write_text(json.dumps(head | _data(_figure(ratio_to_dense=ratio))))
    assert run_command(["bench-compare", *map(str, paths)]) == 1
    assert "slower by 20.0 %" in capsys.readouterr().out
    assert run_command(["bench-compare", *map(str, paths), "--fail-above", "0.25"]) == 0
    assert run_command(["bench-compare", *map(str, reversed(paths))]) == 0


def test_the_command_starts_without_torch(environment):
    code = "import sys, infllmv2_conformance.cli; print('torch' in sys.modules)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert tuple(SHAPES) == SHAPE_NAMES


def test_forks_never_reach_the_gpu_runner():
    text = (ROOT / ".github" / "workflows" / "gpu.yml").read_text()
    workflow = yaml.safe_load(text)
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as a boolean
    assert "pull_request_target" not in triggers
    assert triggers["push"] == {"branches": ["main"]}
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"] == {"group": "gpu-runner", "cancel-in-progress": False}
    assert "secrets." not in text
    for job in workflow["jobs"].values():
        condition = " ".join(job["if"].split())
        assert "head.repo.full_name == github.repository" in condition
        assert "labels.*.name, 'gpu'" in condition


@pytest.mark.parametrize("name", ["counts", "overlap", "stats", "table", "watches", "workloads"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"infllmv2_conformance.bench.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted
    assert result.failed == 0


def test_every_field_of_the_file_is_documented():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in (*_figure(), *load(STORED[0])):
        if name not in ("format", "format_version", "package_version"):
            assert f"`{name}`" in page, name
