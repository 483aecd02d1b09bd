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

from infllmv2_impls.cupy import CupyImplementation, attend_hopper, launch
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
HOPPER = (
    (torch.bfloat16, 16, 128),
    (torch.bfloat16, 8, 64),
    (torch.bfloat16, 32, 128),
    (torch.float16, 16, 64),
)
"""Dtype, group and head dim of the kernel for Hopper GPUs."""
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}
SHARED["sm_90a"] = SHARED["sm_90"]
"""The most shared memory of a block, by architecture."""
ARCHITECTURES = tuple(SHARED)
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
    """Hold what a thread and a block need: registers, bytes of spills, of all shared memory."""

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

    def capability(self, device: torch.device | None) -> tuple[int, int]:
        """Claim to be no Hopper GPU, so that portable kernels are launched."""
        return 8, 0

    def encode_tensor_map(self, *arguments: Any) -> int:
        """Leave the description empty."""
        return 0

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


def hopper_launches() -> list[Launch]:
    """Return the launches of the kernel for Hopper GPUs, which only such a device is given."""
    return [
        Launch(
            attend_hopper.kernel(dtype, group, dim),
            attend_hopper.THREADS,
            attend_hopper.shared_bytes(dim),
        )
        for dtype, group, dim in HOPPER
    ]


def with_budgets(arch: str) -> list[Launch]:
    """Return the launches that have budgets for an architecture, one of each kernel."""
    if arch == "sm_90a":
        return hopper_launches()
    every = sorted(launches(*MODEL), key=lambda x: x.shared_bytes)
    return list({x.kernel: x for x in every}.values())


def title(kernel: Kernel, arch: str) -> str:
    """Return the key of a kernel's budget."""
    macros = (f"{name}={value}" for name, value in kernel.defines)
    return " ".join((kernel.name, arch, *macros))


def log_of(kernel: Kernel, arch: str) -> str:
    """Compile a kernel and return what the assembler says of it."""
    log = compile_kernel(kernel, arch, "--ptxas-options=-v").log
    if log.count(f"Compiling entry function '{kernel.name}'") != 1:
        raise ValueError(f"the log of {title(kernel, arch)} does not name the kernel once:\n{log}")
    return log


def resources(launch: Launch, arch: str) -> Resources:
    """Compile a kernel and return what it needs."""
    name = launch.kernel.name
    text = log_of(launch.kernel, arch).partition(f"Compiling entry function '{name}'")[2]
    text = text.partition("Compiling entry function")[0]

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    shared = number(r"(\d+) bytes smem") + launch.shared_bytes
    return Resources(number(r"Used (\d+) registers"), spills, shared)


def measure(every: Iterable[Launch], arch: str) -> dict[str, Resources]:
    """Compile kernels for an architecture, several at a time."""
    every = list(every)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: resources(x, arch), every))
    return {title(x.kernel, arch): result for x, result in zip(every, found, strict=True)}


def nvrtc_version() -> str:
    """Return the version of the compiler; budgets hold for one."""
    return ".".join(map(str, import_cupy("cupy_backends.cuda.libs.nvrtc").getVersion()))


def main() -> None:
    """Write the budgets, a line for each kernel, so that a change shows what it costs."""
    measured = {
        name: vars(found)
        for arch in ARCHITECTURES
        for name, found in measure(with_budgets(arch), arch).items()
    }
    lines = (f"  {json.dumps(name)}: {json.dumps(measured[name])}" for name in sorted(measured))
    head = f'{{\n "nvrtc": {json.dumps(nvrtc_version())},\n "kernels": {{\n'
    BUDGETS.write_text(head + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    main()
