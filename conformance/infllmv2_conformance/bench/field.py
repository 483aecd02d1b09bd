"""What all competitors of one workload are given: the same tensors at the same addresses."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.candidate import Candidate
from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import num_blocks, num_windows
from infllmv2_reference.layout import cu_seqlens_of

from . import given
from .sampled import Compressed, RowOracle, choose_sites
from .tensors import Tensors, checksum, draw, swap_heads
from .workloads import Workload


class Field:
    """Hold the tensors of a workload, and what stages are given, each computed when asked for.

    Args:
        workload: the shapes.
        device: where the tensors live.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload, self.device, self.config = workload, device, workload.config
        self.tensors: Tensors = draw(workload, device)
        self.sites = choose_sites(workload)
        self.gradient: Tensor | None = None
        self._compressed: Compressed = {}  # of k, which stays as it is
        self._swapped: list[tuple[Tensor, int]] = [(self.tensors.q, 1)]
        if workload.task == "forward":  # in `decode` the cache holds copies of k and v
            self._swapped.append((self.tensors.v, 1))
        elif workload.task == "backward":  # q and v are saved for it: swap what is sent back
            self.gradient = self._draw_gradient()
            self._swapped = [(self.gradient, 1)]

    @cached_property
    def keys(self) -> Tensor:
        """Return a copy of k for compression, which is given new numbers like q is."""
        return self.swapped(self.tensors.k.clone(), 1)

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        """Return K_C1 and K_C2 as scoring takes them; of one sequence."""
        c = self.config
        k_c1 = given.compress(self.tensors.k, c.kernel_size, c.kernel_stride)
        k_c2 = given.compress(self.tensors.k, c.lse_kernel_size, c.lse_kernel_stride)
        ends = (cu_seqlens_of([len(x)], self.device) for x in (k_c1, k_c2))
        names = ("k_c1", "k_c2", "cu_seqlens_c1", "cu_seqlens_c2")
        return dict(zip(names, (k_c1, k_c2, *ends), strict=True))

    @property
    def scoring(self) -> dict[str, Any]:
        """Return the arguments of the functions that score."""
        return {
            "q": self.tensors.q,
            **self.windows,
            **self.tensors.lengths,
            "config": self.config,
        }

    @cached_property
    def scores(self) -> Tensor:
        """Return scores of windows, float32 `[HK, T, C]`."""
        return self.swapped(given.window_scores(*self._scored), 0)

    @cached_property
    def block_scores(self) -> Tensor:
        """Return scores of blocks, float32 `[HK, T, N]`."""
        return self.swapped(given.block_scores(*self._scored), 0)

    @cached_property
    def selected(self) -> Tensor:
        """Return a selection, int32 `[HK, T, K]`."""
        return given.selection(*self._scored)

    @property
    def _scored(self) -> tuple[Tensor, Tensor, Tensor, SparseConfig]:
        return self.tensors.q, self.windows["k_c1"], self.windows["k_c2"], self.config

    def swapped(self, x: Tensor, axis: int) -> Tensor:
        """Return `x`, whose heads along `axis` are swapped at every `refresh` from now on."""
        self._swapped.append((x, axis))
        return x

    @property
    def attending(self) -> dict[str, Any]:
        """Return the arguments of `attend`."""
        t = self.tensors
        tensors = {"q": t.q, "k": t.k, "v": t.v, "selected": self.selected}
        return {**tensors, **t.lengths, "block_size": self.config.block_size}

    def oracle(self, candidate: Candidate, given_windows: bool = False) -> RowOracle:
        """Return the oracle of single rows for the tensors as they are now."""
        windows = (self.windows["k_c1"], self.windows["k_c2"]) if given_windows else None
        arithmetic = candidate.capabilities.arithmetic
        return RowOracle(self.workload, self.tensors, arithmetic, windows, self._compressed)

    def refresh(self) -> None:
        """Give every input other numbers at its old address, so that no result can be kept."""
        for x, axis in self._swapped:
            swap_heads(x, axis)

    def restore(self) -> None:
        """Write q, k and v again as they were drawn, for those who come after a vandal."""
        fresh = draw(self.workload, self.device)
        for name in ("q", "k", "v"):
            getattr(self.tensors, name).copy_(getattr(fresh, name))

    def checksums(self) -> list[int]:
        """Return what tells whether an input was changed."""
        t = self.tensors
        shared = [t.q, t.k, t.v, t.cu_seqlens_q, t.cu_seqlens_k]
        shared += [self.__dict__[n] for n in ("selected",) if n in self.__dict__]
        shared += list(self.__dict__.get("windows", {}).values())
        return [checksum(x) for x in [*shared, *(x for x, _ in self._swapped)]]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the largest result of each function that may not fit."""
        w, c = self.workload, self.config
        rows = w.shape.kv_heads * w.queries * w.batch * 4
        windows = rows * num_windows(w.length, c.kernel_size, c.kernel_stride)
        blocks = rows * num_blocks(w.length, c.block_size)
        return {
            "score_windows": windows,
            "pool_blocks": windows + blocks,
            "select_blocks": blocks,
            "score_blocks": blocks,
        }

    def _draw_gradient(self) -> Tensor:
        q = self.tensors.q
        generator = torch.Generator(self.device).manual_seed(self.workload.seed + 5)
        gradient = torch.empty_like(q)
        for head in range(q.shape[1]):
            size = (len(q), q.shape[2])
            noise = torch.randn(size, generator=generator, device=self.device)
            gradient[:, head] = noise.to(q.dtype)
        return gradient


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that a device still has, None where it is not known."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached
