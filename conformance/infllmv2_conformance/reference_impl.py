"""The reference as an implementation: one sequence after the other. It shows the suite is sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

import infllmv2_reference as reference
from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import num_blocks, num_windows
from infllmv2_reference.layout import Span, cu_seqlens_of, spans


class ReferenceImplementation:
    """Offer the functions of the reference on packed batches: slow, and without validation."""

    capabilities: ClassVar[dict[str, Any]] = {
        "dtypes": ("float32", "float64", "bfloat16", "float16"),
        "lse_ratios": None,
        "pooling_modes": ("overlap", "paper_eq7"),
        "gradients": True,
        "use_nope": True,
        "skips_unselected": False,
        "validates": (),
        "arithmetic": {"probabilities": "float32"},
    }

    def compress_keys(
        self, *, k: Tensor, cu_seqlens_k: Tensor, kernel_size: int, kernel_stride: int, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Compress every sequence."""
        sequences = k.split(cu_seqlens_k.diff().tolist())
        parts = [reference.compress_keys(x, kernel_size, kernel_stride) for x in sequences]
        return torch.cat([k[:0], *parts]), cu_seqlens_of([len(p) for p in parts], k.device)

    def score_windows(self, **given: Any) -> Tensor:
        """Score every sequence."""
        return _by_windows(reference.score_windows, given)

    def score_blocks(self, **given: Any) -> Tensor:
        """Score and pool every sequence."""
        return _by_windows(_score_blocks, given)

    def select(self, **given: Any) -> Tensor:
        """Score, pool and select every sequence."""
        return _by_windows(reference.select_by_windows, given)

    def pool_blocks(self, *, scores: Tensor, config: SparseConfig, **given: Any) -> Tensor:
        """Pool every sequence."""
        kernel = config.kernel_size, config.kernel_stride

        def pool(s: Span) -> Tensor:
            mine = scores[:, s.queries, : num_windows(s.num_keys, *kernel)]
            return reference.pool_blocks(mine, s.num_keys, config)

        return _pack([pool(s) for s in _spans(given)], scores)

    def select_blocks(self, *, block_scores: Tensor, config: SparseConfig, **given: Any) -> Tensor:
        """Select in every sequence."""

        def select(s: Span) -> Tensor:
            mine = block_scores[:, s.queries, : num_blocks(s.num_keys, config.block_size)]
            return reference.select_blocks(mine, s.num_keys, config)

        rows = [select(s) for s in _spans(given)]
        return _pack(rows, block_scores.new_empty(block_scores.shape[0], 0, config.budget).int())

    def attend(
        self, *, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, block_size: int, **given: Any
    ) -> tuple[Tensor, Tensor]:
        """Attend in every sequence."""
        results = [
            reference.attend_blocks(
                q[s.queries], k[s.keys], v[s.keys], selected[:, s.queries], block_size
            )
            for s in _spans(given)
        ]
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.cat([q[:0], *(out for out, _ in results)])
        return out, torch.cat([q[:0, :, 0].to(wide), *(lse for _, lse in results)])

    def attention(
        self, *, q: Tensor, k: Tensor, v: Tensor, config: SparseConfig, **given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the whole forward on every sequence."""
        selection_q, selection_k = given.get("selection_q"), given.get("selection_k")
        results = [
            reference.attention(
                q[s.queries],
                k[s.keys],
                v[s.keys],
                config,
                None if selection_q is None else selection_q[s.queries],
                None if selection_k is None else selection_k[s.keys],
            )
            for s in _spans(given)
        ]
        empty = torch.empty(k.shape[1], 0, config.budget, dtype=torch.int32, device=q.device)
        unused = [empty.new_full((k.shape[1], len(r.out), config.budget), -1) for r in results]
        selected = [
            u if r.selected is None else r.selected for u, r in zip(unused, results, strict=True)
        ]
        wide = torch.promote_types(q.dtype, torch.float32)
        return (
            torch.cat([q[:0], *(r.out for r in results)]),
            torch.cat([q[:0, :, 0].to(wide), *(r.lse for r in results)]),
            _pack(selected, empty),
        )

    def new_cache(
        self,
        *,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        config: SparseConfig,
        **_: Any,
    ) -> dict[str, Any]:
        """Return one cache of the reference per sequence."""
        caches = [reference.empty_cache(num_kv_heads, head_dim, dtype, device)] * batch
        return {"caches": caches, "config": config}

    def append(self, *, cache: dict[str, Any], k: Tensor, v: Tensor, **given: Any) -> None:
        """Append to every sequence."""
        selection_k = given.get("selection_k")
        rows = list(spans(given["cu_seqlens"], given["cu_seqlens"]))
        cache["caches"] = [
            reference.append_tokens(
                old,
                k[s.keys],
                v[s.keys],
                cache["config"],
                None if selection_k is None else selection_k[s.keys],
            )
            for old, s in zip(cache["caches"], rows, strict=True)
        ]

    def decode(
        self, *, cache: dict[str, Any], q: Tensor, cu_seqlens_q: Tensor, **given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from the last tokens of every sequence."""
        selection_q, config = given.get("selection_q"), cache["config"]
        results = [
            reference.decode(
                one,
                q[s.queries],
                config,
                None if selection_q is None else selection_q[s.queries],
            )
            for one, s in zip(cache["caches"], spans(cu_seqlens_q, cu_seqlens_q), strict=True)
        ]
        shape = (cache["caches"][0].keys.shape[1] if results else 0, 0, config.budget)
        empty = torch.empty(shape, dtype=torch.int32, device=q.device)
        unused = [empty.new_full((shape[0], len(r.out), config.budget), -1) for r in results]
        selected = [
            u if r.selected is None else r.selected for u, r in zip(unused, results, strict=True)
        ]
        wide = torch.promote_types(q.dtype, torch.float32)
        return (
            torch.cat([q[:0], *(r.out for r in results)]),
            torch.cat([q[:0, :, 0].to(wide), *(r.lse for r in results)]),
            _pack(selected, empty),
        )

    def reset(self, *, cache: dict[str, Any], lengths: list[int]) -> None:
        """Cut every sequence back."""
        cache["caches"] = [
            reference.truncate(one, n, cache["config"])
            for one, n in zip(cache["caches"], lengths, strict=True)
        ]

    def cached_windows(self, *, cache: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the windows of every sequence, packed."""
        result: list[Tensor] = []
        for name in ("k_c1", "k_c2"):
            parts = [getattr(one, name) for one in cache["caches"]]
            result += [torch.cat(parts), cu_seqlens_of([len(p) for p in parts], parts[0].device)]
        return result[0], result[1], result[2], result[3]


def _spans(given: dict[str, Any]) -> list[Span]:
    return list(spans(given["cu_seqlens_q"], given["cu_seqlens_k"]))


def _score_blocks(
    q: Tensor, k_c1: Tensor, k_c2: Tensor, num_keys: int, config: SparseConfig
) -> Tensor:
    scores = reference.score_windows(q, k_c1, k_c2, num_keys, config)
    return reference.pool_blocks(scores, num_keys, config)


def _by_windows(function: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
    k_c1, k_c2 = (
        given[f"k_{name}"][: given[f"cu_seqlens_{name}"][-1]].split(
            given[f"cu_seqlens_{name}"].diff().tolist()
        )
        for name in ("c1", "c2")
    )
    q, config = given["q"], given["config"]
    rows = [
        function(q[s.queries], c1, c2, s.num_keys, config)
        for s, c1, c2 in zip(_spans(given), k_c1, k_c2, strict=True)
    ]
    width = config.budget if function is reference.select_by_windows else 0
    wide = torch.promote_types(q.dtype, torch.float32)
    empty = q.new_empty(given["k_c1"].shape[1], 0, width, dtype=torch.int32 if width else wide)
    return _pack(rows, empty)


def _pack(rows: list[Tensor], like: Tensor) -> Tensor:
    """Lay `[HK, T_i, X_i]` end to end; -1 stands behind X_i."""
    width = max([like.shape[-1], *(r.shape[-1] for r in rows)])
    packed = like.new_full((like.shape[0], sum(r.shape[1] for r in rows), width), -1)
    start = 0
    for row in rows:
        packed[:, start : start + row.shape[1], : row.shape[2]] = row
        start += row.shape[1]
    return packed


IMPLEMENTATION = ReferenceImplementation()
