"""The contract in CUDA C++, compiled by NVRTC and launched through CuPy."""
