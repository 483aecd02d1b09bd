"""Compile what a launch would compile, for a GPU that need not be there, instead of launching."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
_TYPES = {
    "torch.float16": "*fp16",
    "torch.bfloat16": "*bf16",
    "torch.float32": "*fp32",
    "torch.int32": "*i32",
}
_DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Compiled:
    """Say what became of one launch.

    Args:
        name: of the kernel.
        constants: its constexpr arguments.
        warps: of a program.
        grid: of the launch.
        kernel: as Triton returns it, with `asm`.
    """

    name: str
    constants: dict[str, Any]
    warps: int
    grid: tuple[int, ...]
    kernel: Any

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory of a program."""
        return self.kernel.metadata.shared

    def resources(self) -> tuple[int, int]:
        """Return registers and bytes of stack of a thread."""
        found = re.search(r"REG:(\d+) STACK:(\d+)", self._disassemble("-res-usage"))
        assert found is not None
        return int(found[1]), int(found[2])

    def sass(self) -> str:
        """Return the machine code."""
        return self._disassemble("-sass")

    def _disassemble(self, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.kernel.asm["cubin"])
            command = [str(_DISASSEMBLER), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def compiling(target: GPUTarget = HOPPER) -> Iterator[list[Compiled]]:
    """Collect the launches made inside, each compiled for `target`; nothing runs."""
    launches: list[Compiled] = []

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        signature, constants, attributes = _specialise(self, args, kwargs)
        options = {n: kwargs[n] for n in ("num_warps", "num_stages", "maxnreg") if n in kwargs}
        keys = {(self.arg_names.index(n),): value for n, value in constants.items()}
        source = ASTSource(self, signature, keys, attributes)
        kernel = triton.compile(source, target=target, options=options)
        warps = options.get("num_warps", 4)
        launches.append(Compiled(self.fn.__name__, constants, warps, tuple(grid), kernel))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def _specialise(
    kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Return signature, constants and attributes as Triton derives them from arguments."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {n: v for n, v in kwargs.items() if n in kernel.arg_names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        aligned = special and (
            isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        )
        if parameter.is_constexpr or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[str(value.dtype)]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
        else:
            signature[parameter.name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def selection_at(length: int, dtype: torch.dtype, head_dim: int, group: int) -> None:
    """Launch what compresses and selects in a prefill of so many tokens, with two kv heads."""
    from infllmv2_impls.packing import Lengths, Windows
    from infllmv2_impls.triton import compress, select
    from infllmv2_reference.config import SparseConfig

    def new(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    config, ends = SparseConfig(), new(2, of=torch.int32)
    k = new(length, 2, head_dim)
    kinds: list[Windows] = []
    for size, stride in ((32, 16), (128, 64)):
        means, _ = compress.compress_keys(k, ends, size, stride)
        kinds.append(Windows(means, ends, size, stride))
    lengths = Lengths(ends, ends, length, length)
    select.select(new(length, 2 * group, head_dim), *kinds, lengths, config)
