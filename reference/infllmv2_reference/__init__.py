"""InfLLM-V2 attention in plain PyTorch: the executable specification.

One sequence at a time, one stage per module, in the order of the data:
`compress_keys` -> `score_windows` -> `pool_blocks` -> `select_blocks` -> `attend_blocks`.
"""

from .attend import attend_blocks, attend_dense
from .cache import Cache, append_tokens, decode, empty_cache, truncate
from .compress import compress_keys
from .config import SparseConfig
from .pipeline import Attention, attention, compress_for_selection, select_by_windows
from .pool import pool_blocks
from .score import score_windows
from .select import select_blocks

SPEC_VERSION = "1.0.0"
"""Version of the semantics. It changes when the result of a legal input changes."""

__all__ = [
    "SPEC_VERSION",
    "Attention",
    "Cache",
    "SparseConfig",
    "append_tokens",
    "attend_blocks",
    "attend_dense",
    "attention",
    "compress_for_selection",
    "compress_keys",
    "decode",
    "empty_cache",
    "pool_blocks",
    "score_windows",
    "select_blocks",
    "select_by_windows",
    "truncate",
]
