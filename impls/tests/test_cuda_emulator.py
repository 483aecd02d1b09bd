"""The emulator computes what a device does, and refuses what a device leaves undefined."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from infllmv2_impls.cupy import launch
from infllmv2_impls.cupy.launch import Kernel

sys.path.insert(0, str(Path(__file__).parent))
import cuda_emulator

SAMPLES = str(Path(cuda_emulator.__file__).parent / "samples.cu")
DTYPES = (torch.float16, torch.bfloat16)

pytestmark = pytest.mark.skipif(
    not cuda_emulator.is_available(), reason="the emulator needs g++ on x86-64"
)


def run(name: str, threads: int, shared_bytes: int, *arguments: Tensor | int, blocks: int = 1):
    first = arguments[0]
    assert isinstance(first, Tensor)
    bf16 = int(any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in arguments))
    kernel = Kernel(SAMPLES, name, (("BF16", bf16),))
    with mock.patch.object(launch, "backend", cuda_emulator.Emulator()):
        launch.launch(kernel, (blocks, 1, 1), threads, shared_bytes, first, *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    out = torch.zeros(16, 8)
    run("multiply", 32, 768, a, b, out)
    torch.testing.assert_close(out, a.float() @ b.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversions(dtype: torch.dtype) -> None:
    x = torch.randn(10000) * 10.0 ** torch.randint(-9, 6, (10000,))
    special = [0.0, -0.0, float("inf"), 65519.0, 65520.0, 1e-8, float("nan")]
    x = torch.cat([x, torch.tensor(special)])
    y, z = torch.zeros_like(x, dtype=dtype), torch.zeros_like(x)
    run("convert", 32, 0, x, y, z, len(x), blocks=len(x) // 32 + 1)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z, y.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ["1", "-1"])
def test_barriers_and_shuffles(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLLMV2_EMULATOR_ORDER", order)
    out = torch.zeros(256)
    run("add_up", 256, 0, out)
    assert out.eq(255 * 128).all()


def test_shared_memory_is_nan_at_first() -> None:
    out = torch.zeros(32)
    run("reads_unwritten", 32, 128, out)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("returns_early", "waits at barrier 0 for threads that do not come .63 of 64 are there"),
        ("disagrees", "lane 5 is at __shfl_xor_sync"),
        ("writes_behind", "writes behind its 64 bytes"),
        ("does_not_wait", "without having waited for its asynchronous copies"),
    ],
)
def test_refuses(name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        run(name, 64, 64, torch.zeros(64))


def test_refuses_arguments_of_another_type() -> None:
    with pytest.raises(TypeError, match="add_up takes the arguments p, but it gets pi"):
        run("add_up", 256, 0, torch.zeros(256), 1)
