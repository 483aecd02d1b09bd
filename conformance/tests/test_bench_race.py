"""The benchmark against implementations that are wrong, that lie about time, or that are slow."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch

from infllmv2_conformance.bench.gate import compare
from infllmv2_conformance.bench.record import Record, load
from infllmv2_conformance.bench.session import Session, Wish
from infllmv2_conformance.bench.watches import CpuWatch, Reading
from infllmv2_conformance.bench.workloads import SHAPES
from infllmv2_conformance.loading import load as load_implementation

CPU = torch.device("cpu")
SMALL = Wish(
    shapes=(SHAPES["tiny"],),
    lengths=(128,),
    budgets=(8,),
    inputs=("random",),
    tasks=("forward",),
    baselines=("flash",),
    dtype="float32",
    effort=0.05,
)
KERNELS = '''
import time
import torch
from infllmv2_impls.eager import IMPLEMENTATION as EAGER

class Honest:
    """The whole contract, or what a subclass makes of it."""
    capabilities = EAGER.capabilities
    def __getattr__(self, name):
        return getattr(EAGER, name)

class OnlyAttend:
    capabilities = EAGER.capabilities
    def attend(self, **given):
        return EAGER.attend(**given)

class Zeros(OnlyAttend):
    def attend(self, q, **given):
        return torch.zeros_like(q), q.new_zeros(q.shape[:2])

class DropsABlock(OnlyAttend):
    def attend(self, selected, **given):
        selected = selected.where(torch.arange(selected.shape[2]) != 3, -1)
        selected = selected.where(selected >= 0, 1 << 20).sort(-1).values
        return EAGER.attend(selected=selected.where(selected < 1 << 20, -1), **given)

class Remembers(OnlyAttend):
    kept = None
    def attend(self, **given):
        self.kept = self.kept or EAGER.attend(**given)
        return self.kept

class WritesItsInput(OnlyAttend):
    def attend(self, **given):
        result = EAGER.attend(**given)
        given["q"][:] = 0
        return result

class Sleeps(OnlyAttend):
    def attend(self, **given):
        time.sleep(0.4)
        return EAGER.attend(**given)

class Raises(OnlyAttend):
    def attend(self, **given):
        raise RuntimeError("no such kernel")

class WrongGradients(OnlyAttend):
    def attend(self, k, **given):
        return EAGER.attend(k=k.detach() + 0.5 * (k - k.detach()), **given)

class Narrow(OnlyAttend):
    capabilities = dict(EAGER.capabilities, head_dims=(64,))

class Short(OnlyAttend):
    capabilities = dict(EAGER.capabilities, longest_context=64)
'''
BAD = {
    "Zeros": ("wrong", "the LSE is wrong"),
    "DropsABlock": ("wrong", "the LSE is wrong"),
    "Remembers": ("wrong", "right before, but not while it was timed: the LSE is wrong"),
    "WritesItsInput": ("wrong", "it changes its inputs"),
    "Sleeps": ("untrusted", "its clock says"),
    "Raises": ("wrong", "raised RuntimeError: no such kernel"),
    "Narrow": ("not run", "head dim 32 is not claimed"),
    "Short": ("not run", "longest_context is 64"),
}


@pytest.fixture
def bench(tmp_path):
    """Benchmark kernels of `KERNELS` in this process; return the figures by competitor."""
    (tmp_path / "kernels.py").write_text(KERNELS)

    def run(*names, wish=SMALL, watch=None, file="bench.json"):
        kernels = [load_implementation(f"{tmp_path}/kernels.py:{name}") for name in names]
        for kernel, name in zip(kernels, names, strict=True):
            kernel.name = name
        record = Record(tmp_path / file, {"device": "cpu", "packages": {}}, wish.settings([*names]))
        Session(kernels, CPU, wish, record, lambda *_: None, watch or CpuWatch(1 << 16)).run()
        found = {}
        for figure in load(tmp_path / file)["figures"]:
            found.setdefault(figure["implementation"], {})[figure["function"]] = figure
        return found

    return run


def test_only_what_is_right_and_believable_gets_a_number(bench):
    """Planted faults, each beside an honest kernel that is not harmed by it."""
    found = bench("OnlyAttend", *BAD)
    honest = found["OnlyAttend"]["attend"]
    assert honest["status"] == "measured", honest["reason"]
    assert 0 < honest["worst_ratio"] < 1
    for name, (status, reason) in BAD.items():
        figure = found[name]["attend"]
        assert (figure["status"], figure["seconds"]) == (status, None), figure
        assert figure["reason"].startswith(reason), figure["reason"]


def test_wrong_gradients_get_no_number(bench):
    wish = Wish(**vars(SMALL) | {"tasks": ("backward",)})
    found = bench("OnlyAttend", "WrongGradients", wish=wish)
    assert found["OnlyAttend"]["attend.backward"]["status"] == "measured"
    wrong = found["WrongGradients"]["attend.backward"]
    assert wrong["reason"].startswith("the gradient of k is wrong")
    assert wrong["seconds"] is None


def test_the_backward_of_a_wanted_function_is_timed(bench):
    """`--functions attend --tasks backward` once timed dense attention alone, and said nothing."""
    changes = {"tasks": ("backward",), "functions": ("attend",), "l2": ("hot",)}
    found = bench("Honest", wish=Wish(**vars(SMALL) | changes))["Honest"]
    assert set(found) == {"attend.backward"}


def test_every_function_that_is_offered_has_a_row(bench):
    wish = Wish(**vars(SMALL) | {"tasks": ("forward", "decode"), "batches": (2,), "l2": ("hot",)})
    found = bench("Honest", wish=wish)["Honest"]
    assert set(found) == {
        "compress_keys",
        "compress_keys[k_c2]",
        "score_windows",
        "pool_blocks",
        "select_blocks",
        "score_blocks",
        "select",
        "attend",
        "attention",
        "decode",
        "append",
    }
    for name, figure in found.items():
        assert figure["status"] == "measured", (name, figure["reason"])
        assert figure["ratio_to_dense"] > 0
        assert figure["roofline"]["share"] > 0
        assert len(figure["seconds"]["rounds"]) >= 3


LIAR = """
import time
from infllmv2_impls.eager import IMPLEMENTATION as EAGER
{imports}

class Liar:
    capabilities = EAGER.capabilities
    def attend(self, **given):
        {patch}
        return EAGER.attend(**given)
"""
CLOCKS = ("process_time", "process_time_ns", "perf_counter", "perf_counter_ns", "monotonic_ns")
PATCHES = {
    "clocks": ("", f"for name in {CLOCKS}: setattr(time, name, lambda: 0)"),
    "watch": (
        "from infllmv2_conformance.bench import watches",
        "watches.CpuWatch.time = lambda self, call: (watches.Reading(1e-7, 1e-7, 1e-7), call())",
    ),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patched_timer_gives_no_credit(patch, tmp_path, infllmv2):
    """Clocks were taken at import; a patched stopwatch contradicts the wall clock."""
    imports, code = PATCHES[patch]
    (tmp_path / "liar.py").write_text(LIAR.format(imports=imports, patch=code))
    options = "--lengths 128 --budgets 8 --inputs random --tasks forward --effort 0.1"
    done = infllmv2("bench", "liar.py:Liar", *options.split(), "--baselines", "flash,eager")
    figures = json.loads((tmp_path / "infllmv2-bench.json").read_text())["figures"]
    figure = next(f for f in figures if f["function"] == "attend")
    if patch == "watch":
        assert done.returncode == 1, done.stdout + done.stderr
        assert figure["status"] == "untrusted"
        assert "it is not believed" in figure["reason"]
    else:
        honest = next(f for f in figures if f["function"] == "attention")  # that of eager
        assert figure["seconds"]["median"] > honest["seconds"]["median"] / 5


class _Simulated(CpuWatch):
    """Time by what kernels say they cost, `drift` times as long on this machine, with 3 % noise.

    The cost stands in for the device's time, so that the gate is tested without the noise of the
    machine that runs the tests.
    """

    def __init__(self, drift, costs):
        super().__init__(1 << 16)
        self.drift, self.costs, self.noise = drift, costs, random.Random(7)

    def time(self, call):
        _, result = super().time(call)
        name = getattr(call, "args", ("?",))[0]
        cost = self.costs.get(name, 1.0)
        seconds = 100 * cost * self.drift * self.noise.uniform(0.97, 1.03)
        return Reading(seconds, seconds, seconds), result


@pytest.mark.parametrize(("slow", "regressions"), [(1.0, 0), (1.2, 1), (0.8, 0)])
def test_a_slow_down_of_20_percent_is_caught_whatever_the_clocks(
    slow, regressions, bench, tmp_path
):
    """Only the kernel's own slow-down counts, not that the whole machine is 30 % slower today."""
    base = {"flash": 1.0, "attend": 3.0}
    wish = Wish(**vars(SMALL) | {"effort": 1e9, "longest_call": 1e9})
    now = base | {"attend": 3.0 * slow}
    bench("OnlyAttend", wish=wish, watch=_Simulated(1.0, base), file="old.json")
    bench("OnlyAttend", wish=wish, watch=_Simulated(1.3, now), file="new.json")
    verdict = compare(load(tmp_path / "old.json"), load(tmp_path / "new.json"))
    assert len(verdict.failed) == regressions
    (change,) = verdict.changes
    assert change.slower == pytest.approx(slow - 1, abs=0.04)


def test_a_kernel_that_does_everything_twice_is_caught(bench, tmp_path):
    """The same with real clocks, and a slow-down beyond their noise on a busy machine."""
    wish = Wish(**vars(SMALL) | {"effort": 0.5})
    bench("OnlyAttend", wish=wish, file="old.json")
    twice = "EAGER.attend(**given); EAGER.attend(**given); return EAGER.attend(**given)"
    source = KERNELS.replace("return EAGER.attend(**given)", twice, 1)
    assert source != KERNELS
    (tmp_path / "kernels.py").write_text(source)
    kernel = load_implementation(f"{tmp_path}/kernels.py:OnlyAttend")
    kernel.name = "OnlyAttend"
    record = Record(
        tmp_path / "new.json", {"device": "cpu", "packages": {}}, wish.settings(["OnlyAttend"])
    )
    Session([kernel], CPU, wish, record, lambda *_: None).run()
    verdict = compare(load(tmp_path / "old.json"), load(tmp_path / "new.json"), fail_above=0.5)
    assert [c.key.split("/")[1] for c in verdict.failed] == ["attend"]


def test_a_run_is_continued_and_stops_in_time(tmp_path, infllmv2):
    options = "--budgets 8 --inputs random --tasks decode --batches 1 --effort 0.01"
    options += " --baselines none"
    first = infllmv2("bench", "eager", "--lengths", "64", *options.split())
    assert first.returncode == 0, first.stderr
    before = json.loads((tmp_path / "infllmv2-bench.json").read_text())
    assert {f["length"] for f in before["figures"]} == {64}
    infllmv2("bench", "eager", "--lengths", "64,128", *options.split())
    after = json.loads((tmp_path / "infllmv2-bench.json").read_text())
    assert [f for f in after["figures"] if f["length"] == 64] == before["figures"]
    assert all(f["status"] == "measured" for f in after["figures"])
    assert after["complete"]
    refused = infllmv2("bench", "eager", "--lengths", "64", *options.split(), "--seed", "1")
    assert refused.returncode == 2
    assert "cannot be continued: settings.seed was 0, and is now 1" in refused.stderr
    assert json.loads((tmp_path / "infllmv2-bench.json").read_text()) == after


def test_what_is_out_of_time_is_said_and_tried_again(bench):
    late = Wish(**vars(SMALL) | {"seconds": 1e-9})
    figure = bench("OnlyAttend", wish=late)["OnlyAttend"]["attend"]
    assert (figure["status"], figure["reason"]) == ("not run", "out of time: it ended before")
    assert bench("OnlyAttend")["OnlyAttend"]["attend"]["status"] == "measured"


def test_the_suite_of_pytest_benchmark_gates_on_device_time(tmp_path, environment):
    """Statistics, storage and `--benchmark-compare-fail` are those of pytest-benchmark."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    wish = "--lengths 128 --budgets 8 --inputs random --tasks forward --effort 0.05"
    fixed = ["--baselines", "none", "--benchmark-storage", "file://stored", "-p", "no:randomly"]
    pytest_of_suite = ["--pyargs", "infllmv2_conformance.bench", *wish.split(), *fixed]

    def run(kernel, *more):
        return subprocess.run(
            [sys.executable, "-m", "pytest", *pytest_of_suite, "--impl", kernel, *more],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    done = run("kernels.py:OnlyAttend", "--benchmark-autosave")
    assert done.returncode == 0, done.stdout + done.stderr
    (stored,) = (tmp_path / "stored").rglob("*.json")
    (result,) = json.loads(stored.read_text())["benchmarks"]
    assert result["options"]["timer"] == "device_time"
    assert result["extra_info"]["timing"] == "cpu"
    assert 1e-4 < result["stats"]["median"] < 10
    source = KERNELS.replace(
        "return EAGER.attend(**given)",
        "[EAGER.attend(**given) for _ in range(9)]; return EAGER.attend(**given)",
        1,
    )
    (tmp_path / "kernels.py").write_text(source)
    slow = run("kernels.py:OnlyAttend", "--benchmark-compare", "--benchmark-compare-fail=min:100%")
    assert slow.returncode == 1
    assert "Performance has regressed" in slow.stdout + slow.stderr
    wrong = run("kernels.py:Zeros")
    assert wrong.returncode == 1
    assert "wrong: the LSE is wrong" in wrong.stdout
