"""Every CUDA kernel compiles for every architecture, within its budget; and what fails, and how."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infllmv2_impls.cupy import CupyImplementation, compiling, launch
from infllmv2_impls.cupy.compiling import Kernel, architecture, cubin_file

sys.path.insert(0, str(Path(__file__).parent))
import compiled_cuda
from compiled_cuda import (
    ARCHITECTURES,
    BUDGETS,
    MODEL,
    OTHERS,
    SHARED,
    hopper_launches,
    launches,
    title,
    with_budgets,
)

COMPRESS = Kernel(
    "compress.cu",
    "compress_kernel",
    (("D", 64), ("VEC", 8), ("SIZE", 32), ("STRIDE", 16), ("WINDOWS", 8), ("PARTS", 4)),
)


@pytest.fixture(scope="module")
def nvrtc() -> str:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        return compiled_cuda.nvrtc_version()
    except Exception as error:
        pytest.skip(f"CuPy finds no NVRTC: {error}")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_stay_in_budget(arch: str, nvrtc: str) -> None:
    recorded = json.loads(BUDGETS.read_text())
    budgets: dict[str, Any] = {
        name: budget for name, budget in recorded["kernels"].items() if name.split()[1] == arch
    }
    measured = compiled_cuda.measure(with_budgets(arch), arch)
    unknown = sorted(measured.keys() ^ budgets.keys())
    assert not unknown, f"run impls/tests/compiled_cuda.py: {unknown}"
    assert all(found.shared <= SHARED[arch] for found in measured.values())
    if nvrtc != recorded["nvrtc"]:
        pytest.skip(f"budgets hold for NVRTC {recorded['nvrtc']}; all compile with {nvrtc}")
    over = {
        name: (found, budgets[name])
        for name, found in measured.items()
        if any(getattr(found, kind) > most for kind, most in budgets[name].items())
    }
    assert not over


def test_every_kernel_has_budgets() -> None:
    has = {x.kernel.name for arch in ARCHITECTURES for x in with_budgets(arch)}
    pattern = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(')
    sources = {path: pattern.findall(path.read_text()) for path in compiling.CUDA.glob("*.cu")}
    assert all(sources.values())
    assert {name for names in sources.values() for name in names} == has


@pytest.mark.parametrize("model", OTHERS, ids=str)
def test_kernels_of_other_models_compile(model: tuple[torch.dtype, int, int, int], nvrtc: str):
    arch = ("sm_80", "sm_90", "sm_86", "sm_89")[OTHERS.index(model)]
    measured = compiled_cuda.measure(launches(*model), arch)
    assert all(0 < found.registers <= 255 for found in measured.values())


@pytest.mark.parametrize("launch", hopper_launches(), ids=lambda x: title(x.kernel, "sm_90a"))
def test_products_overlap_on_hopper(launch: compiled_cuda.Launch, nvrtc: str) -> None:
    log = compiled_cuda.log_of(launch.kernel, "sm_90a")
    assert "Potential Performance Loss" not in log, log
    assert "warpgroup.wait is injected" not in log, log


def test_products_that_do_not_overlap_are_seen(nvrtc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = hopper_launches()[0].kernel
    sources = compiling._sources(kernel.file)
    text = sources[kernel.file].replace("products_wait<1>();", "")
    assert text != sources[kernel.file]

    def changed(_: str) -> dict[str, str]:
        return {**sources, kernel.file: text}

    monkeypatch.setattr(compiling, "_sources", changed)
    assert "Potential Performance Loss" in compiled_cuda.log_of(kernel, "sm_90a")


@pytest.mark.parametrize("model", [MODEL, *OTHERS], ids=str)
def test_blocks_fit_the_shared_memory(model: tuple[torch.dtype, int, int, int]) -> None:
    # Heads of 256 channels need more than the smallest devices have, and say so there.
    most = SHARED["sm_86"] if model[1] <= 128 else SHARED["sm_80"]
    too_large = [x for x in launches(*model) if x.shared_bytes > most or x.threads > 1024]
    assert not too_large


def test_a_cubin_is_compiled_once(
    nvrtc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFLLMV2_CACHE_DIR", str(tmp_path))
    path = cubin_file(COMPRESS, "sm_80")
    assert path.parent == tmp_path
    assert path.read_bytes().startswith(b"\x7fELF")
    monkeypatch.setattr(compiling, "compile_kernel", None)
    assert cubin_file(COMPRESS, "sm_80") == path
    assert os.listdir(tmp_path) == [path.name]


def test_a_source_that_does_not_compile_shows_the_log(nvrtc: str) -> None:
    with pytest.raises(RuntimeError, match=r"compress\.cu for sm_80 .*(?s:.*)identifier"):
        compiling.compile_kernel(Kernel("compress.cu", "compress_kernel"), "sm_80")


def test_architectures() -> None:
    assert [architecture(x) for x in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))] == [
        "sm_80", "sm_86", "sm_89", "sm_90", "sm_120",
    ]  # fmt: skip
    assert architecture((9, 0), hopper=True) == "sm_90a"
    with pytest.raises(RuntimeError, match=r"8\.0 or higher, but it is 7\.5"):
        architecture((7, 5))
    with pytest.raises(RuntimeError, match=r"needs compute capability 9\.0, but it is 10\.0"):
        architecture((10, 0), hopper=True)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backend", launch.CupyBackend())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        CupyImplementation()


def test_with_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backend", launch.CupyBackend())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(RuntimeError, match=r"it is 7\.0"):
        CupyImplementation()


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backend", launch.CupyBackend())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"need CuPy .*install infllmv2-conformance\[cupy13\]"):
        CupyImplementation()


def test_arguments_of_a_launch() -> None:
    x = torch.zeros(1)
    seen: list[tuple[np.generic, ...]] = []
    with compiled_cuda.recording() as recorder:
        recorder.run = lambda *arguments: seen.append(arguments[-1])
        launch.launch(COMPRESS, (1, 1, 1), 32, 0, x, x, None, 7, np.int64(1 << 40), 0.5)
        launch.launch(COMPRESS, (1, 0, 1), 32, 0, x)
        with pytest.raises(OverflowError):
            launch.launch(COMPRESS, (1, 1, 1), 32, 0, x, 1 << 31)
        with pytest.raises(ValueError, match="grid must be at most"):
            launch.launch(COMPRESS, (1, 1 << 16, 1), 32, 0, x)
    dtypes = [value.dtype for value in seen[0]]
    assert dtypes == [np.uintp, np.uintp, np.int32, np.int64, np.float32]
    assert seen[0][:2] == (x.data_ptr(), 0)
    assert len(seen) == 1
