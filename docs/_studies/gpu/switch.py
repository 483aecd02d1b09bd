"""Time the whole forward of `triton` dense, sparse and switched, beside cuDNN, on a GPU.

`python docs/_studies/gpu/switch.py` stores milliseconds in `docs/results/studies/switch.json`: the
median of 15 replays of a CUDA graph, the L2 cache flushed before each, all four taking turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / package) for package in ("reference", "impls", "conformance")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from infllmv2_conformance.bench.machine import describe_machine  # noqa: E402
from infllmv2_impls.triton import TritonImplementation  # noqa: E402
from infllmv2_reference import SparseConfig  # noqa: E402

LENGTHS = (2048, 4096, 6144, 8192, 10240, 12288, 16384)
ALWAYS, NEVER, RELEASED = 1 << 20, -1, 8192
ROUNDS = 15
AR = 0.97


def main() -> None:
    """Time all lengths and store what was found."""
    device = torch.device("cuda")
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    results: dict[str, Any] = {}
    for kind in ("random", "correlated"):
        rows = {str(n): race(competitors(*draw(n, kind, device)), flush) for n in LENGTHS}
        switched = [rows[str(n)] for n in LENGTHS if n >= RELEASED]
        own = max(r["switched"] / min(r["dense"], r["sparse"]) for r in switched) - 1
        best = max(r["switched"] / min(r["cudnn"], r["sparse"]) for r in switched) - 1
        results[kind] = {**rows, "worst_of_own": round(own, 4), "worst_of_cudnn": round(best, 4)}
    record = {
        "study": "switch",
        "command": "python docs/_studies/gpu/switch.py",
        "unit": f"ms, median of {ROUNDS} graph replays, L2 flushed",
        "machine": describe_machine(device),
        "results": results,
    }
    path = ROOT / "docs" / "results" / "studies" / "switch.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def draw(tokens: int, kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of MiniCPM4.1's heads; correlated q and k follow AR(1) along the tokens."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 128, device=device) for heads in (32, 2, 2))
    if kind == "correlated":
        for x in (q, k):
            for i in range(1, tokens):
                x[i].mul_((1 - AR**2) ** 0.5).add_(x[i - 1], alpha=AR)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def competitors(q: Tensor, k: Tensor, v: Tensor) -> dict[str, torch.cuda.CUDAGraph]:
    """Return a graph of each way to compute the forward."""
    tokens = len(q)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
    call = partial(
        TritonImplementation().attention,
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=tokens,
        max_seqlen_k=tokens,
    )
    batched = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True)

    whole = {"dense": ALWAYS, "sparse": NEVER, "switched": RELEASED}
    configs = {name: replace(SparseConfig(), dense_len=n) for name, n in whole.items()}
    graphs = {name: graphed(partial(call, config=c)) for name, c in configs.items()}
    return {"cudnn": graphed(dense), **graphs}


def graphed(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return a graph of a call, which has compiled what it needs before."""
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def race(graphs: dict[str, torch.cuda.CUDAGraph], flush: Tensor) -> dict[str, float]:
    """Return the median milliseconds of each graph; another one begins every round."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for i in range(ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: round(median(found), 4) for name, found in times.items()}


if __name__ == "__main__":
    main()
