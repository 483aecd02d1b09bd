"""The emulator computes what a device does, and refuses what a device leaves undefined."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from infllmv2_impls.cupy import launch
from infllmv2_impls.cupy.attend_hopper import tensor_map
from infllmv2_impls.cupy.launch import Argument, Kernel

sys.path.insert(0, str(Path(__file__).parent))
import cuda_emulator

SAMPLES = str(Path(cuda_emulator.__file__).parent / "samples.cu")
HOPPER_SAMPLES = str(Path(cuda_emulator.__file__).parent / "samples_hopper.cu")
ORDERS = ("1", "-1", "7", "8")
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


@pytest.mark.parametrize("order", ORDERS)
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


def run_hopper(name: str, threads: int, panels: int, dtype: torch.dtype, *arguments: Argument):
    """Run a kernel with so many boxes in shared memory; tensors of three axes go there by a map."""
    kernel = Kernel(HOPPER_SAMPLES, name, (("BF16", int(dtype == torch.bfloat16)),))
    shared_bytes = panels * 64 * 64 * 2 + 64
    with mock.patch.object(launch, "backend", cuda_emulator.Emulator()):
        values = [tensor_map(x) if isinstance(x, Tensor) and x.ndim == 3 else x for x in arguments]
        launch.launch(kernel, (1, 1, 1), threads, shared_bytes, torch.empty(0), *values)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_groups(
    dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFLLMV2_EMULATOR_ORDER", order)
    a, b, v = (torch.randn(rows, 1, 128).to(dtype) for rows in (64, 128, 64))
    weights = torch.randn(64, 64).to(dtype)
    rows = [torch.zeros(64, columns) for columns in (64, 128)]
    columns = [torch.zeros(64, columns) for columns in (64, 128)]
    run_hopper("multiply_boxes", 128, 8, dtype, a, b, v, weights, *rows, *columns)
    a, b, v, weights = (x.squeeze(1).float() for x in (a, b, v, weights))
    for out in rows:
        torch.testing.assert_close(out, a @ b[: out.shape[1]].T, rtol=1e-5, atol=1e-4)
    for out in columns:
        torch.testing.assert_close(out, 1 + weights @ v[:, : out.shape[1]], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("at", [(0, 0, 0), (64, 2, 40), (-8, 1, -3), (24, 1, 200), (0, 3, 0)])
def test_boxes_are_swizzled_and_zero_outside(at: tuple[int, int, int]) -> None:
    x = torch.randn(100, 6, 96).half()[:, ::2]
    out = torch.zeros(64, 8, 8).half()
    run_hopper("fetch_box", 1, 1, torch.float16, x, out.view(-1), *at)
    expected = torch.zeros(64, 64).half()
    for row in range(64):
        for column in range(64):
            place = at[2] + row, at[1], at[0] + column
            if all(0 <= i < size for i, size in zip(place, x.shape, strict=True)):
                expected[row, column] = x[place]
    for row, chunks in enumerate(out):
        swizzled = [chunks[c ^ row % 8] for c in range(8)]
        assert torch.cat(swizzled).equal(expected[row])


@pytest.mark.parametrize(
    "x",
    [torch.zeros(64, 1, 65).half()[..., 1:], torch.zeros(64, 2, 68).half()[..., :64]],
    ids=["begins anywhere", "strides"],
)
def test_refuses_what_the_driver_does(x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled returned 1"):
        run_hopper("fetch_box", 1, 1, torch.float16, x, torch.zeros(1), 0, 0, 0)


FAULTS = (
    ("nothing", ""),
    (
        "is not released",
        r"byte 8200, parity 0: 1 threads wait, 4 of 5 arrivals and 0 bytes are missing",
    ),
    ("expects more", r"byte 8192, parity 0: 128 threads wait, 0 of 1 arrivals and 16 bytes are"),
    ("expects less", "and -16 bytes are missing"),
    ("waits for nothing", "no mbarrier was initialised at byte 8192"),
    (
        "waits for the last phase",
        "number at byte 8208: 128 threads wait for 1, and it is 0; mbarrier at byte 8200, parity 0",
    ),
    ("does not wait for the box", "a product reads byte .*, where a copy is still on its way to"),
    ("releases early", "copy_box to byte .*, which a product under way reads"),
    ("releases twice", "the thread arrives twice in one phase|all 1 arrivals of the mbarrier"),
    ("leaves a product", "returns without having waited for its products"),
    ("leaves a box", "nobody has waited for a copy to byte 0"),
    ("does not fence barriers", "copy_box: no fence_barrier_init for the mbarrier at byte 8192"),
    ("does not fence stores", "a product reads byte .*, stored without fence_async_shared"),
    ("does not fence registers", "a product starts without products_fence"),
    ("stores beside", "was changed while a product that reads it was under way"),
    ("touches an accumulator", "has changed its accumulator while a product was under way"),
    ("touches an operand", "has changed an operand while a product was under way"),
    ("is done early", "products_done without a wait"),
    ("lacks a warp", "this warp multiplies something else than another one of its group"),
    ("lacks a lane", "lane 7 is at products_commit|others are at products_commit"),
    ("disagrees", "this warp multiplies something else than another one of its group"),
    ("goes to the middle", "copy_box to byte 128, which is no multiple of 1024"),
    ("begins in the middle", "does not begin where a swizzle does"),
    ("runs over", "a field has run over"),
    ("takes too much", "threads ask for 92160 registers, of 65536"),
    ("stores under a copy", "byte 77 was stored while a copy was on its way to it"),
    ("arrives for too many", "6 arrivals, and 5 of 5 are missing at the mbarrier at byte 8200"),
    ("does not publish", "number at byte 8208: 128 threads wait for 1, and it is 0"),
    ("reads early", ""),
)


@pytest.mark.parametrize("order", ["1", "-1"])
@pytest.mark.parametrize("fault", range(len(FAULTS)), ids=[name for name, _ in FAULTS])
def test_sees_faults_of_asynchronous_programs(
    fault: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFLLMV2_EMULATOR_ORDER", order)
    name, message = FAULTS[fault]
    x = torch.randn(3, 64, 1, 64).half()
    out = torch.zeros(64, 64)
    arguments = torch.float16, x.flatten(0, 1), out, len(x), fault
    if message:
        with pytest.raises(RuntimeError, match=f"add_rounds: .*({message})"):
            run_hopper("add_rounds", 384, 1, *arguments)
        return
    run_hopper("add_rounds", 384, 1, *arguments)
    if name == "reads early":
        assert out[:2].isnan().all()
        return
    y = x.squeeze(2).float()
    y[:, 0] = 0
    expected = (y @ y.mT).sum(0) + y.sum((0, 1))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-3)
