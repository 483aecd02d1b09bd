"""The whole contract in plain PyTorch, written apart from the reference: gathered and in chunks.

It runs on any device and in any floating dtype, with memory bounded by `places.CHUNK_BYTES` besides
inputs and results. Every function takes chunks of query rows with their positions; a position is
all that a row knows of its place, so prefill, chunks with history and decoding are one code path.
"""

from .implementation import IMPLEMENTATION, EagerImplementation

__all__ = ["IMPLEMENTATION", "EagerImplementation"]
