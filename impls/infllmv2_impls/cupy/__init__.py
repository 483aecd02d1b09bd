"""The contract in CUDA C++: for NVIDIA GPUs from compute capability 8.0 on, forward only.

Kernels are compiled by NVRTC at their first use and launched through CuPy. Nothing in a call waits
for the device: grids follow from shapes, and every block of threads finds its sequence by itself.
"""

from .implementation import CupyHopper, CupyImplementation, CupyPortable

__all__ = ["CupyHopper", "CupyImplementation", "CupyPortable"]
