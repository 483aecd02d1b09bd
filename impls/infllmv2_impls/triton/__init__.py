"""The contract in Triton: for NVIDIA GPUs, tuned and tested on Hopper (compute capability 9.0).

Nothing in a call waits for the device: grids follow from shapes, and every program finds its
sequence by itself. So calls can be captured in CUDA graphs, and `ops` offers the stages to
`torch.compile`. With TRITON_INTERPRET=1, set before Python starts, the same kernels run on a CPU,
slowly.
"""

from .implementation import TritonImplementation

__all__ = ["TritonImplementation"]
