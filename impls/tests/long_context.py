"""Run a chunk of queries over a long history and print what it needs; `test_eager.py` starts it.

By hand, as the measurement in the documentation: `python impls/tests/long_context.py 1024 131072`.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch

from infllmv2_impls.eager import IMPLEMENTATION
from infllmv2_reference.config import SparseConfig
from infllmv2_reference.layout import cu_seqlens_of


def measure(num_queries: int, num_keys: int, gradients: bool = False) -> dict[str, float]:
    """Return seconds and peak memory of one `attention` with 32 query and 2 kv heads, bf16."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, 128, generator=generator, dtype=torch.bfloat16)

    q, k, v = normal(num_queries, 32), normal(num_keys, 2), normal(num_keys, 2)
    for x in (q, k, v):
        x.requires_grad_(gradients)
    before, start = _peak_bytes(), time.monotonic()
    out, _, selected = IMPLEMENTATION.attention(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_of([num_queries]),
        cu_seqlens_k=cu_seqlens_of([num_keys]),
        max_seqlen_q=num_queries,
        max_seqlen_k=num_keys,
        config=SparseConfig.minicpm4(),
    )
    if gradients:
        out.float().square().sum().backward()
    seconds = time.monotonic() - start
    assert bool(out.isfinite().all())
    assert int((selected >= 0).sum(dim=-1).min()) == 96
    return {"seconds": seconds, "before": before, "peak": _peak_bytes()}


def _peak_bytes() -> int:
    """Return the largest resident size of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:3]]
    print(json.dumps(measure(*numbers, gradients="gradients" in sys.argv[3:])))
