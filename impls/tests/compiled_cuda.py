"""Compile what the CuPy implementation would launch, for GPUs that need not be there.

`python impls/tests/compiled_cuda.py` measures anew and writes `cupy_budgets.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from infllmv2_impls.cupy import CupyImplementation, launch
from infllmv2_impls.cupy.compiling import Kernel, compile_kernel, import_cupy
from infllmv2_reference.config import SparseConfig

BUDGETS = Path(__file__).parent / "cupy_budgets.json"
MODEL = (torch.bfloat16, 128, 16, 64)
"""Dtype, head dim, group and block size of MiniCPM4.1."""
OTHERS = (
    (torch.float16, 64, 2, 16),
    (torch.float16, 32, 7, 32),
    (torch.bfloat16, 96, 1, 48),
    (torch.float16, 256, 8, 128),
)
KEYS = 16384
TOKENS = 64


@dataclass(frozen=True)
class Launch:
    """Hold a kernel, its threads and its dynamic shared memory."""

    kernel: Kernel
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Resources:
    """Hold what a thread and a block need: registers, bytes of spills, static shared memory."""

    registers: int
    spills: int
    shared: int


class Recorder:
    """Run nothing, and remember what was asked for."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.launches: dict[Launch, None] = {}

    def check(self) -> None:
        """Everything can run here."""

    def run(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        on: Tensor,
        values: tuple[np.generic, ...],
    ) -> None:
        """Remember a launch."""
        self.launches[Launch(kernel, threads, shared_bytes)] = None


@contextmanager
def recording() -> Iterator[Recorder]:
    """Record the launches of the block instead of running them."""
    recorder = Recorder()
    with mock.patch.object(launch, "backend", recorder):
        yield recorder


def launches(dtype: torch.dtype, head_dim: int, group: int, block_size: int) -> list[Launch]:
    """Return what prefill, decoding and the single stages launch for a model."""
    size = min(block_size // 2, 32)
    config = SparseConfig(
        block_size=block_size,
        kernel_size=size,
        kernel_stride=size // 2,
        window_size=4 * block_size,
        topk=16,
        dense_len=0,
    )
    with recording() as recorder:
        impl = CupyImplementation()
        for tokens in (TOKENS, 1):
            q = torch.zeros(tokens, group, head_dim, dtype=dtype)
            k = torch.zeros(KEYS, 1, head_dim, dtype=dtype)
            lengths: dict[str, Any] = {
                "cu_seqlens_q": torch.tensor([0, tokens], dtype=torch.int32),
                "cu_seqlens_k": torch.tensor([0, KEYS], dtype=torch.int32),
                "max_seqlen_q": tokens,
                "max_seqlen_k": KEYS,
            }
            impl.attention(q=q, k=k, v=k, config=config, **lengths)
        _stages(impl, config, q, k, lengths)
        cache = impl.new_cache(
            batch=1,
            max_seqlen_k=KEYS,
            num_kv_heads=1,
            head_dim=head_dim,
            dtype=dtype,
            device=torch.device("cpu"),
            config=config,
        )
        ends = lengths["cu_seqlens_q"]
        impl.append(cache=cache, k=k[:1], v=k[:1], cu_seqlens=ends, max_seqlen=1)
    return list(recorder.launches)


def _stages(
    impl: CupyImplementation, config: SparseConfig, q: Tensor, k: Tensor, lengths: dict[str, Any]
) -> None:
    """Call the stages that the whole forward leaves out."""
    windows = {"k_c1": k, "k_c2": k}
    windows |= {f"cu_seqlens_{name}": lengths["cu_seqlens_k"] for name in ("c1", "c2")}
    scores = impl.score_windows(q=q, **windows, config=config, **lengths)
    pooled = impl.pool_blocks(scores=scores, config=config, **lengths)
    impl.select_blocks(block_scores=pooled, config=config, **lengths)


def title(kernel: Kernel, arch: str) -> str:
    """Return the key of a kernel's budget."""
    macros = (f"{name}={value}" for name, value in kernel.defines)
    return " ".join((kernel.name, arch, *macros))


def resources(kernel: Kernel, arch: str) -> Resources:
    """Compile a kernel and return what it needs."""
    log = compile_kernel(kernel, arch, "--ptxas-options=-v").log
    parts = log.split(f"Compiling entry function '{kernel.name}'")
    if len(parts) != 2:
        raise ValueError(f"the log of {title(kernel, arch)} does not name the kernel once:\n{log}")
    text = parts[1].partition("Compiling entry function")[0]

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Resources(number(r"Used (\d+) registers"), spills, number(r"(\d+) bytes smem"))


def measure(pairs: Iterable[tuple[Kernel, str]]) -> dict[str, Resources]:
    """Compile kernels for architectures, several at a time."""
    every = list(dict.fromkeys(pairs))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: resources(*pair), every))
    return {title(*pair): result for pair, result in zip(every, found, strict=True)}


def of_model() -> list[tuple[Kernel, str]]:
    """Return the kernels and architectures that have budgets."""
    kernels = [x.kernel for x in launches(*MODEL)]
    return [(x, arch) for x in kernels for arch in ("sm_80", "sm_90")]


def nvrtc_version() -> str:
    """Return the version of the compiler; budgets hold for one."""
    return ".".join(map(str, import_cupy("cupy_backends.cuda.libs.nvrtc").getVersion()))


if __name__ == "__main__":
    measured = {name: vars(found) for name, found in sorted(measure(of_model()).items())}
    BUDGETS.write_text(json.dumps({"nvrtc": nvrtc_version(), "kernels": measured}, indent=1) + "\n")
