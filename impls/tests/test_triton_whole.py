"""Attention and the cache in Triton against eager, and what loading it says where it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from infllmv2_impls.eager import IMPLEMENTATION as EAGER
from infllmv2_reference import SparseConfig
from infllmv2_reference.layout import cu_seqlens_of

pytest.importorskip("triton")

from infllmv2_impls.triton import TritonImplementation
from infllmv2_impls.triton.device import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter

DEVICE = "cpu" if INTERPRETED else "cuda"
TRITON = TritonImplementation()
SMALL = SparseConfig(
    block_size=16, kernel_size=8, kernel_stride=4, window_size=16, topk=4, dense_len=120
)
HEADS, KV_HEADS, DIM = 4, 2, 32


def draw(rows: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, DIM, generator=generator, dtype=torch.float32).to(DEVICE)


def compare(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Compare output, LSE and, in sparse sequences, the selection."""
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(actual[2], expected[2])


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, use_nope=True, dense_len=-1, lse="exact")]
)
def test_attention_with_the_switch_on_the_device(config: SparseConfig) -> None:
    num_q, num_k = [3, 5, 0, 4], [200, 119, 30, 120]
    given: dict[str, Any] = {
        "q": draw(sum(num_q), HEADS, 0),
        "k": draw(sum(num_k), KV_HEADS, 1),
        "v": draw(sum(num_k), KV_HEADS, 2),
        "cu_seqlens_q": cu_seqlens_of(num_q, DEVICE),
        "cu_seqlens_k": cu_seqlens_of(num_k, DEVICE),
        "max_seqlen_q": max(num_q),
        "max_seqlen_k": max(num_k),
        "config": config,
    }
    if config.use_nope:
        given |= {"selection_q": draw(sum(num_q), HEADS, 3), "selection_k": draw(sum(num_k), 2, 4)}
    compare(TRITON.attention(**given), EAGER.attention(**given))


def test_batches_below_the_switch_select_nothing() -> None:
    given: dict[str, Any] = {
        "q": draw(2, HEADS, 0),
        "k": draw(40, KV_HEADS, 1),
        "v": draw(40, KV_HEADS, 2),
        "cu_seqlens_q": cu_seqlens_of([2], DEVICE),
        "cu_seqlens_k": cu_seqlens_of([40], DEVICE),
        "max_seqlen_q": 2,
        "max_seqlen_k": 40,
        "config": SMALL,
    }
    compare(TRITON.attention(**given), EAGER.attention(**given))


def test_attention_compiles_without_a_break_and_differentiates() -> None:
    q, k, v = (draw(n, h, i) for i, (n, h) in enumerate(((3, HEADS), (150, 2), (150, 2))))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    lengths = {"cu_seqlens_q": cu_seqlens_of([3], DEVICE), "max_seqlen_q": 3}
    lengths |= {"cu_seqlens_k": cu_seqlens_of([150], DEVICE), "max_seqlen_k": 150}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return TRITON.attention(q=q, k=k, v=v, **lengths, config=SMALL)

    out, lse, selected = compiled(q, k, v)
    expected = EAGER.attention(q=q, k=k, v=v, **lengths, config=SMALL)
    compare((out, lse, selected), expected)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    for ours, theirs in zip(
        gradients, torch.autograd.grad(expected[0].sum(), (q, k, v)), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_cache_of_sequences_that_advance_apart() -> None:
    """Append, decode, take back and append again; room in the cache is never read as tokens."""
    caches = [
        implementation.new_cache(
            batch=3,
            max_seqlen_k=170,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            dtype=torch.float32,
            device=torch.device(DEVICE),
            config=SMALL,
        )
        for implementation in (TRITON, EAGER)
    ]
    if isinstance(caches[0].keys, Tensor):
        for room in (caches[0].keys, caches[0].values):
            room.fill_(torch.nan)

    def on_both(function: str, **given: Any) -> list[Any]:
        pairs = zip((TRITON, EAGER), caches, strict=True)
        return [getattr(x, function)(cache=cache, **given) for x, cache in pairs]

    def append(counts: list[int], seed: int) -> None:
        new = {"k": draw(sum(counts), KV_HEADS, seed), "v": draw(sum(counts), KV_HEADS, seed + 1)}
        on_both("append", **new, cu_seqlens=cu_seqlens_of(counts, DEVICE), max_seqlen=max(counts))

    def decode(counts: list[int], seed: int) -> None:
        lengths = {"cu_seqlens_q": cu_seqlens_of(counts, DEVICE), "max_seqlen_q": max(counts)}
        compare(*on_both("decode", q=draw(sum(counts), HEADS, seed), **lengths))

    append([118, 0, 150], 10)
    decode([1, 0, 2], 12)
    append([1, 30, 7], 13)
    append([1, 0, 1], 15)
    decode([3, 1, 1], 17)
    on_both("reset", lengths=[60, 30, 151])
    append([5, 1, 0], 18)
    decode([1, 1, 1], 20)
    for ours, theirs in zip(*on_both("cached_windows"), strict=True):
        assert_close(ours, theirs)


def test_tokens_beyond_the_capacity_touch_nothing() -> None:
    cache = TRITON.new_cache(
        batch=2,
        max_seqlen_k=20,
        num_kv_heads=1,
        head_dim=16,
        dtype=torch.float32,
        device=torch.device(DEVICE),
        config=SMALL,
    )
    k = torch.ones(30, 1, 16, device=DEVICE)
    given = {"cu_seqlens": cu_seqlens_of([30, 0], DEVICE), "max_seqlen": 30}
    TRITON.append(cache=cache, k=k, v=k, **given)
    assert cache.keys[:20].eq(1).all()
    assert cache.keys[20:].eq(0).all()
    assert cache.k_c1[4:].eq(0).all()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process without the variable that interprets kernels."""
    inherited = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    folder = Path(__file__).parent
    inherited["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=600,
        check=False,
    )


LOAD = "from infllmv2_conformance.loading import load; load('triton')"


@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU, on which the kernels run")
def test_says_how_to_run_without_a_gpu() -> None:
    error = run_python(LOAD).stderr.splitlines()[-1]
    assert "the Triton kernels need a CUDA device, and torch finds none" in error
    assert "set TRITON_INTERPRET=1" in error
    assert run_python(LOAD, TRITON_INTERPRET="1").returncode == 0


def test_says_that_triton_is_not_installed() -> None:
    error = run_python(f"import sys; sys.modules['triton'] = None; {LOAD}").stderr.splitlines()[-1]
    assert "the package 'triton' is not installed" in error


COMPILE = """
import json, torch
from compiled_kernels import compiling, selection_at
for dtype, dim, group in ((torch.bfloat16, 128, 16), (torch.float32, 256, 7)):
    with compiling() as launches:
        selection_at(131072, dtype, dim, group)
    for launch in launches:
        registers, stack = launch.resources()
        fast = "HGMMA" in launch.sass()
        numbers = (launch.shared, registers, stack, launch.warps, fast)
        print(json.dumps([launch.name, str(dtype), *numbers]))
"""


def test_kernels_fit_a_hopper_gpu() -> None:
    """Compile for one, which need not be there: no local memory in hot loops, fast products."""
    pytest.importorskip("triton.backends.nvidia")
    done = run_python(COMPILE)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(name, dtype): numbers for name, dtype, *numbers in lines}
    assert len(found) == 8
    for (name, dtype), (shared, registers, stack, warps, fast) in found.items():
        assert shared <= 227 << 10, name
        assert registers * warps * 32 <= 1 << 16, name
        assert stack <= 16, (name, dtype)
        is_product = name in ("score_kernel", "lse_kernel")
        assert fast == (is_product and dtype == "torch.bfloat16"), name
