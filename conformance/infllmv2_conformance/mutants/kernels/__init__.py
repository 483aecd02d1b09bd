"""Small right Triton kernels, which the mutants of the GPU's kind of faults are made of.

They run in Triton's interpreter, on the CPU: one program handles one row, as plainly as can be.
"""
# pyright: basic

from __future__ import annotations

from typing import Any, ClassVar

from .attend import attend
from .windows import compress_keys, pool_blocks


class TritonImplementation:
    """Offer three stages, for shapes that an interpreter gets through."""

    capabilities: ClassVar[dict[str, Any]] = {
        "devices": ("cpu",),
        "dtypes": ("float32", "float16"),
        "head_dims": (16, 24),
        "group_sizes": (2, 1, 3),
        "block_sizes": (16,),
        "windows": ((8, 4), (6, 3)),
        "longest_context": 33,
        "skips_unselected": True,
        "non_contiguous": False,
        "validates": (),
        "arithmetic": {"probabilities": "float32"},
    }
    compress_keys = staticmethod(compress_keys)
    pool_blocks = staticmethod(pool_blocks)
    attend = staticmethod(attend)


IMPLEMENTATION = TritonImplementation()
