"""Packed batches as the kernels take them; one definition for all sets of kernels."""

from infllmv2_impls.packing import Lengths, Lines, Windows, num_slots

__all__ = ["Lengths", "Lines", "Windows", "num_slots"]
