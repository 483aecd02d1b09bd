"""The eager implementation's cache against prefill with the reference, and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from infllmv2_impls.eager import IMPLEMENTATION
from infllmv2_reference import SparseConfig, attention, compress_for_selection
from infllmv2_reference.layout import cu_seqlens_of

TINY = SparseConfig(
    block_size=8, kernel_size=4, kernel_stride=2, window_size=8, topk=3, dense_len=-1
)
CONFIGS = {
    "approximate": TINY,
    "ragged": replace(TINY, kernel_size=7, kernel_stride=3, lse_kernel=(11, 5), init_blocks=2),
    "switch": replace(TINY, dense_len=60),
}


@pytest.mark.parametrize("name", ["approximate", "ragged", "switch"])
@pytest.mark.parametrize("use_nope", [False, True])
def test_cache_equals_prefill(name: str, use_nope: bool) -> None:
    c = replace(CONFIGS[name], use_nope=use_nope)
    generator = torch.Generator().manual_seed(3)
    totals = [70, 33, 0, 101]

    def draw(heads: int) -> list[Tensor]:
        shape = (heads, 8)
        return [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in totals]

    q, k, v, selection_q, selection_k = draw(6), draw(2), draw(2), draw(6), draw(2)
    device = torch.device("cpu")
    cache = IMPLEMENTATION.new_cache(
        batch=4,
        max_seqlen_k=101,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float64,
        device=device,
        config=c,
    )
    done = [0] * 4
    steps = [[20, 0, 0, 1], [1, 1, 0, 40], [0, 32, 0, 60], "reset", [49, 5, 0, 0], [10, 10, 0, 41]]
    for step in steps:
        if step == "reset":
            done = [10, 3, 0, 60]
            IMPLEMENTATION.reset(cache=cache, lengths=done)
            continue
        assert isinstance(step, list)
        ends = [min(d + n, t) for d, n, t in zip(done, step, totals, strict=True)]
        new = {
            "cu_seqlens": cu_seqlens_of([e - d for e, d in zip(ends, done, strict=True)]),
            "max_seqlen": max(e - d for e, d in zip(ends, done, strict=True)),
        }

        def pack(x: list[Tensor], starts: list[int], stops: list[int]) -> Tensor:
            return torch.cat([r[a:b] for r, a, b in zip(x, starts, stops, strict=True)])

        extra = {"selection_k": pack(selection_k, done, ends)} if use_nope else {}
        IMPLEMENTATION.append(
            cache=cache, k=pack(k, done, ends), v=pack(v, done, ends), **new, **extra
        )
        extra = {"selection_q": pack(selection_q, done, ends)} if use_nope else {}
        out, lse, selected = IMPLEMENTATION.decode(
            cache=cache,
            q=pack(q, done, ends),
            cu_seqlens_q=new["cu_seqlens"],
            max_seqlen_q=new["max_seqlen"],
            **extra,
        )
        row = 0
        windows = IMPLEMENTATION.cached_windows(cache=cache)
        for i, (start, end) in enumerate(zip(done, ends, strict=True)):
            nope = (selection_q[i][start:end], selection_k[i][:end]) if use_nope else ()
            expected = attention(q[i][start:end], k[i][:end], v[i][:end], c, *nope)
            rows = slice(row, row + end - start)
            assert_close(out[rows], expected.out, rtol=1e-12, atol=1e-12)
            assert_close(lse[rows], expected.lse, rtol=1e-12, atol=1e-12)
            if expected.selected is not None:
                assert torch.equal(selected[:, rows], expected.selected)
            for kind, keys in enumerate(
                compress_for_selection((selection_k if use_nope else k)[i][:end], c)
            ):
                values, at = windows[2 * kind], windows[2 * kind + 1].tolist()
                assert_close(values[at[i] : at[i + 1]], keys, rtol=1e-12, atol=1e-12)
            row += end - start
        done = ends


def test_window_bits_do_not_depend_on_the_chunk() -> None:
    k = torch.randn(200, 2, 8)
    whole = IMPLEMENTATION.compress_keys(
        k=k, cu_seqlens_k=cu_seqlens_of([200]), max_seqlen_k=200, kernel_size=7, kernel_stride=3
    )[0]
    for start in range(0, 150, 3):
        part, _ = IMPLEMENTATION.compress_keys(
            k=k[start : start + 7],
            cu_seqlens_k=cu_seqlens_of([7]),
            max_seqlen_k=7,
            kernel_size=7,
            kernel_stride=3,
        )
        assert torch.equal(part[0], whole[start // 3])


def test_bad_cache_calls_write_nothing() -> None:
    cache = IMPLEMENTATION.new_cache(
        batch=2,
        max_seqlen_k=10,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        config=TINY,
    )
    k = torch.ones(13, 2, 8)
    with pytest.raises(
        ValueError, match="max_seqlen_k=10, but sequence 1 has 0 tokens and gets 11"
    ):
        IMPLEMENTATION.append(
            cache=cache, k=k, v=k, cu_seqlens=cu_seqlens_of([2, 11]), max_seqlen=11
        )
    assert cache.lengths == [0, 0]
    assert bool((cache.keys == 0).all())
    with pytest.raises(ValueError, match=r"lengths\[0\] must be at most"):
        IMPLEMENTATION.reset(cache=cache, lengths=[1, 0])
    with pytest.raises(ValueError, match="sequence 0 has 1 queries and 0 tokens"):
        IMPLEMENTATION.decode(
            cache=cache, q=torch.ones(1, 2, 8), cu_seqlens_q=cu_seqlens_of([1, 0]), max_seqlen_q=1
        )


def test_long_context_memory() -> None:
    """64 queries over 128k keys; 1024 need as much, see `long_context.py`."""
    script = Path(__file__).with_name("long_context.py")
    command = [sys.executable, str(script), "64", "131072"]
    numbers = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert numbers["peak"] - numbers["before"] < 2**29  # importing CUDA builds of torch takes more
