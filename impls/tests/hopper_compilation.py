"""Compile the kernels for Hopper GPUs without one, and print what became of them.

`test_hopper_compiled.py` starts it: kernels are compiled only where Triton does not interpret.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from infllmv2_impls.triton import hopper, hopper_forward, hopper_keys, hopper_queries
from infllmv2_impls.triton.union import FIELDS

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    "*bf16": ("q", "out", "grad_out", "grad_q", "grad_k", "grad_v"),
    "*fp32": ("lse", "lse2", "delta", "parts"),
    "*i32": ("tiles", "counts", "pieces", "members", "records", "starts", "items", "rows"),
    "fp32": ("scale", "scale2"),
}
KERNELS = {
    "forward": (hopper_forward._attend_tile, hopper_forward.STAGES),
    "queries": (hopper_queries._query_gradients, hopper_queries.STAGES),
    "keys": (hopper_keys._key_gradients, hopper_keys.STAGES),
}


def compiled(name: str, group: int, dim: int) -> Any:
    """Return a kernel compiled for compute capability 9.0, in bfloat16."""
    kernel, stages = KERNELS[name]
    constants = {
        "GROUP": group,
        "D": dim,
        "PIECE": hopper.PIECE,
        "FIELDS": FIELDS,
        "STAGES": stages[dim],
    }
    columns = 64 if name == "keys" else dim
    types = {n: kind for kind, names in POINTERS.items() for n in names}
    types |= dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("k_boxes", "v_boxes"), box(hopper.PIECE, columns))
    types |= dict.fromkeys(("q_boxes", "grad_boxes"), box(group, columns))
    names = kernel.arg_names
    aligned = [n for n in names if types.get(n, "").startswith("*") or n.endswith("_stride")]
    source = GluonASTSource(
        kernel,
        {n: types.get(n, "i32") for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def box(rows: int, columns: int) -> str:
    """Return the type of a descriptor of boxes."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return f"tensordesc<bf16[{rows},{columns}],{layout!r}>"


def describe(kernel: Any) -> dict[str, Any]:
    """Return the resources of a kernel, and what its assembler says of its matrix products."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        code = run("cuobjdump", "-sass", str(cubin))
        usage = run("cuobjdump", "-res-usage", str(cubin))
        notes = run("ptxas", "--gpu-name=sm_90a", str(ptx), "-o", str(Path(folder, "again.cubin")))
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack is not None
    return {
        "shared": kernel.metadata.shared,
        "stack": int(stack[1]),
        "products": code.count("HGMMA"),
        "copies": code.count("UTMALDG"),
        "serialized": "serialized" in notes,
    }


def run(tool: str, *arguments: str) -> str:
    """Return all that a tool of Triton prints."""
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    print(json.dumps(describe(compiled(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
