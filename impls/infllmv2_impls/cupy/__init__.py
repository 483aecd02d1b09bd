"""The contract in CUDA C++, compiled at run time: for NVIDIA GPUs from compute capability 8.0 on."""
