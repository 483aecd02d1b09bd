"""Thin adapters that put other people's kernels behind the contract, one module per package."""
