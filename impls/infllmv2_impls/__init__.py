"""Implementations of the contract: `eager` in PyTorch, kernels, and adapters of other people's."""
