"""Validate the arguments of contract functions, before any work, for any implementation.

Every error names the argument, what it must be and what it was. Types and dtypes that are wrong
raise TypeError; shapes, devices and values ValueError.

With `values=False` nothing is read from a device: lengths, windows and selections are trusted, and
a number of rows is compared with other tensors, not with `cu_seqlens`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_blocks, num_windows
from infllmv2_reference.layout import check_cu_seqlens, check_packed, lengths_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Dtypes = tuple[torch.dtype, ...]


def check_compress(
    k: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    kernel_size: int,
    kernel_stride: int,
    dtypes: Dtypes = FLOATS,
    values: bool = True,
) -> None:
    """Check the arguments of `compress_keys`."""
    _check_tensor("k", k, "[total_k, HK, D]", dtypes)
    _check_tensor("cu_seqlens_k", cu_seqlens_k, "[batch + 1]", (torch.int32,), like=("k", k))
    check_count("max_seqlen_k", max_seqlen_k)
    check_count("kernel_size", kernel_size, 1)
    check_count("kernel_stride", kernel_stride, 1)
    if values:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, "max_seqlen_k")
        _check_rows("k", k, 0, "cu_seqlens_k", cu_seqlens_k)


def check_scoring(
    q: Tensor,
    k_c1: Tensor,
    k_c2: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_c1: Tensor,
    cu_seqlens_c2: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    config: SparseConfig,
    dtypes: Dtypes = FLOATS,
    values: bool = True,
) -> None:
    """Check the arguments of `score_windows`, `score_blocks` and `select`.

    `k_c2` and its lengths are not looked at with the exact normaliser, which does not read them.
    """
    _check_config(config)
    _check_tensor("q", q, "[total_q, HQ, D]", dtypes)
    c = config
    kinds = [("c1", k_c1, cu_seqlens_c1, c.kernel_size, c.kernel_stride)]
    if c.lse == "approximate":
        kinds.append(("c2", k_c2, cu_seqlens_c2, c.lse_kernel_size, c.lse_kernel_stride))
    for name, windows, ends, _, _ in kinds:
        _check_tensor(f"k_{name}", windows, "[total_c, HK, D]", (q.dtype,), like=("q", q))
        _check_heads(q, f"k_{name}", windows)
        _check_tensor(f"cu_seqlens_{name}", ends, "[batch + 1]", (torch.int32,), like=("q", q))
        _check_equal(f"k_{name}.shape[1:]", windows.shape[1:], "k_c1.shape[1:]", k_c1.shape[1:])
    _check_lengths("q", q, 0, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, values)
    for name, windows, ends, size, stride in kinds:
        _check_equal(f"len(cu_seqlens_{name})", len(ends), "len(cu_seqlens_k)", len(cu_seqlens_k))
        if values:
            counts = [num_windows(n, size, stride) for n in lengths_of(cu_seqlens_k)]
            _check_windows(name, windows, ends, counts)


def check_scores(
    name: str,
    scores: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    config: SparseConfig,
    dtypes: Dtypes = FLOATS,
    values: bool = True,
) -> None:
    """Check the arguments of `pool_blocks` (`scores`) and `select_blocks` (`block_scores`)."""
    _check_config(config)
    _check_tensor(name, scores, "[HK, total_q, columns]", dtypes)
    _check_lengths(name, scores, 1, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, values)
    if not values:
        return
    longest = max(lengths_of(cu_seqlens_k), default=0)
    if name == "scores":
        needed = num_windows(longest, config.kernel_size, config.kernel_stride)
    else:
        needed = num_blocks(longest, config.block_size)
    if scores.shape[2] < needed:
        raise ValueError(
            f"{name} must have at least {needed} columns for {longest} keys, "
            f"but it has {scores.shape[2]}"
        )


def check_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    dtypes: Dtypes = FLOATS,
) -> None:
    """Check the arguments of `attend`, the values of `selected` included."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_attend_form(q, k, v, selected, *lengths, block_size, dtypes)
    _check_lengths("q", q, 0, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_rows("k", k, 0, "cu_seqlens_k", cu_seqlens_k)
    starts = cu_seqlens_q.tolist()
    for i, num_keys in enumerate(lengths_of(cu_seqlens_k)):
        blocks = num_blocks(num_keys, block_size)
        _check_selected(selected[:, starts[i] : starts[i + 1]], i, blocks)


def check_attend_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    dtypes: Dtypes = FLOATS,
) -> None:
    """Check the arguments of `attend`, but no values that lie on the device."""
    check_count("block_size", block_size, 1)
    check_count("max_seqlen_q", max_seqlen_q)
    check_count("max_seqlen_k", max_seqlen_k)
    _check_qkv(q, k, v, dtypes)
    _check_tensor("selected", selected, "[HK, total_q, K]", (torch.int32,), like=("q", q))
    _check_equal("selected.shape[0]", selected.shape[0], "k.shape[1]", k.shape[1])
    _check_equal("selected.shape[1]", selected.shape[1], "q.shape[0]", q.shape[0])
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_tensor(name, ends, "[batch + 1]", (torch.int32,), like=("q", q))
    _check_equal("len(cu_seqlens_k)", len(cu_seqlens_k), "len(cu_seqlens_q)", len(cu_seqlens_q))


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    config: SparseConfig,
    selection_q: Tensor | None,
    selection_k: Tensor | None,
    dtypes: Dtypes = FLOATS,
    values: bool = True,
) -> None:
    """Check the arguments of `attention`."""
    _check_config(config)
    _check_qkv(q, k, v, dtypes)
    check_selection_input("selection_q", selection_q, "q", q, config)
    check_selection_input("selection_k", selection_k, "k", k, config)
    _check_lengths("q", q, 0, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, values)
    if values:
        _check_rows("k", k, 0, "cu_seqlens_k", cu_seqlens_k)


def check_append(
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    selection_k: Tensor | None,
    stored: Tensor,
    lengths: list[int],
    capacity: int,
    config: SparseConfig,
    values: bool = True,
) -> None:
    """Check the arguments of `append` against the cache: `stored` is `[any, HK, D]`."""
    _check_tensor("k", k, "[total, HK, D]", (stored.dtype,), like=("cache", stored))
    _check_equal("k.shape[1:]", k.shape[1:], "the cache's [HK, D]", stored.shape[1:])
    _check_tensor("v", v, "[total, HK, D]", (stored.dtype,), like=("cache", stored))
    _check_equal("v.shape", v.shape, "k.shape", k.shape)
    check_selection_input("selection_k", selection_k, "k", k, config)
    _check_tensor("cu_seqlens", cu_seqlens, "[batch + 1]", (torch.int32,), like=("k", k))
    check_count("max_seqlen", max_seqlen)
    _check_equal("len(cu_seqlens)", len(cu_seqlens), "the cache's batch + 1", len(lengths) + 1)
    if not values:
        return
    check_cu_seqlens("cu_seqlens", cu_seqlens, max_seqlen, "max_seqlen")
    _check_rows("k", k, 0, "cu_seqlens", cu_seqlens)
    for i, (new, old) in enumerate(zip(lengths_of(cu_seqlens), lengths, strict=True)):
        if old + new > capacity:
            raise ValueError(
                f"cu_seqlens must keep every sequence within the cache's max_seqlen_k={capacity}, "
                f"but sequence {i} has {old} tokens and gets {new} more"
            )


def check_decode(
    q: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    selection_q: Tensor | None,
    stored: Tensor,
    lengths: list[int],
    config: SparseConfig,
    values: bool = True,
) -> None:
    """Check the arguments of `decode` against the cache: `stored` is `[any, HK, D]`."""
    _check_tensor("q", q, "[total_q, HQ, D]", (stored.dtype,), like=("cache", stored))
    _check_heads(q, "cache", stored)
    check_selection_input("selection_q", selection_q, "q", q, config)
    _check_tensor("cu_seqlens_q", cu_seqlens_q, "[batch + 1]", (torch.int32,), like=("q", q))
    check_count("max_seqlen_q", max_seqlen_q)
    _check_equal("len(cu_seqlens_q)", len(cu_seqlens_q), "the cache's batch + 1", len(lengths) + 1)
    if not values:
        return
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, "max_seqlen_q")
    _check_rows("q", q, 0, "cu_seqlens_q", cu_seqlens_q)
    for i, (new, old) in enumerate(zip(lengths_of(cu_seqlens_q), lengths, strict=True)):
        if new > old:
            raise ValueError(
                f"cu_seqlens_q must give no sequence more queries than the cache holds tokens, "
                f"but sequence {i} has {new} queries and {old} tokens"
            )


def check_new_cache(
    batch: int,
    max_seqlen_k: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    config: SparseConfig,
    dtypes: Dtypes = FLOATS,
) -> None:
    """Check the arguments of `new_cache`."""
    _check_config(config)
    check_count("batch", batch)
    check_count("max_seqlen_k", max_seqlen_k)
    check_count("num_kv_heads", num_kv_heads, 1)
    check_count("head_dim", head_dim, 1)
    if dtype not in dtypes:
        raise TypeError(f"dtype must be {_one_of(dtypes)}, but it is {dtype}")


def check_reset(new: list[int], lengths: list[int]) -> None:
    """Check the argument `lengths` of `reset` against the cache's lengths."""
    if len(new) != len(lengths):
        raise ValueError(
            f"lengths must have one entry for each of the cache's {len(lengths)} sequences, "
            f"but it has {len(new)}"
        )
    for i, (after, before) in enumerate(zip(new, lengths, strict=True)):
        check_count(f"lengths[{i}]", after)
        if after > before:
            raise ValueError(
                f"lengths[{i}] must be at most the sequence's {before} tokens, but it is {after}"
            )


def check_selection_input(
    name: str, value: Tensor | None, like_name: str, like: Tensor, config: SparseConfig
) -> None:
    """Raise unless a selection input is given exactly if `config.use_nope`, shaped as its twin."""
    if config.use_nope != (value is not None):
        word = "given" if config.use_nope else "None"
        was = "None" if value is None else "given"
        raise ValueError(
            f"{name} must be {word} with config.use_nope={config.use_nope}, but it is {was}"
        )
    if value is not None:
        _check_tensor(name, value, "[rows, heads, D]", (like.dtype,), like=(like_name, like))
        _check_equal(f"{name}.shape", value.shape, f"{like_name}.shape", like.shape)


def check_count(name: str, value: object, least: int = 0) -> None:
    """Raise unless `value` is an int of `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, but it is {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, but it is {value}")


def _check_config(config: object) -> None:
    if not isinstance(config, SparseConfig):
        raise TypeError(f"config must be a SparseConfig, but it is {config!r}")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, dtypes: Dtypes) -> None:
    _check_tensor("q", q, "[total_q, HQ, D]", dtypes)
    _check_tensor("k", k, "[total_k, HK, D]", (q.dtype,), like=("q", q))
    _check_tensor("v", v, "[total_k, HK, D]", (q.dtype,), like=("q", q))
    _check_heads(q, "k", k)
    _check_equal("v.shape", v.shape, "k.shape", k.shape)


def _check_heads(q: Tensor, name: str, k: Tensor) -> None:
    """Raise unless heads and head dims of the queries fit those of keys or windows."""
    _check_equal(f"{name}.shape[2]", k.shape[2], "q.shape[2]", q.shape[2])
    if k.shape[1] < 1 or q.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must have a positive multiple of the {k.shape[1]} heads of {name}, "
            f"but it has {q.shape[1]}"
        )
    check_count("the head dim of q", q.shape[2], 1)


def _check_lengths(
    name: str,
    rows: Tensor,
    axis: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    values: bool = True,
) -> None:
    """Raise unless the lengths are those of a packed batch with `rows` as its queries."""
    for ends_name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_tensor(ends_name, ends, "[batch + 1]", (torch.int32,), like=(name, rows))
    check_count("max_seqlen_q", max_seqlen_q)
    check_count("max_seqlen_k", max_seqlen_k)
    if values:
        check_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _check_rows(name, rows, axis, "cu_seqlens_q", cu_seqlens_q)
        return
    _check_equal("len(cu_seqlens_k)", len(cu_seqlens_k), "len(cu_seqlens_q)", len(cu_seqlens_q))
    if len(cu_seqlens_q) < 1:
        raise ValueError("cu_seqlens_q must have shape [batch + 1], but it has [0]")


def _check_rows(name: str, rows: Tensor, axis: int, ends_name: str, ends: Tensor) -> None:
    total = f"{ends_name}[-1]"
    _check_equal(f"{name}.shape[{axis}]", rows.shape[axis], total, int(ends[-1]))


def _check_windows(name: str, windows: Tensor, ends: Tensor, counts: list[int]) -> None:
    expected = [sum(counts[:i]) for i in range(len(counts) + 1)]
    if ends.tolist() != expected:
        raise ValueError(
            f"cu_seqlens_{name} must count the complete windows, {expected}, "
            f"but it is {ends.tolist()}"
        )
    if len(windows) < expected[-1]:
        raise ValueError(
            f"k_{name} must have at least cu_seqlens_{name}[-1]={expected[-1]} rows, "
            f"but it has {len(windows)}"
        )


def _check_selected(selected: Tensor, sequence: int, blocks: int) -> None:
    """Raise unless every row is ascending block indices below `blocks`, then -1."""
    if selected.numel() == 0:
        return
    low, high = (int(x) for x in selected.aminmax())
    if low < -1 or high >= blocks:
        raise ValueError(
            f"selected must hold -1 or blocks 0..{blocks - 1} in sequence {sequence}, "
            f"but it holds {low if low < -1 else high}"
        )
    before, after = selected[..., :-1], selected[..., 1:]
    if not bool(((after == -1) | ((before >= 0) & (before < after))).all()):
        raise ValueError(
            f"selected must be strictly ascending, then -1, in every row, "
            f"but it is not in sequence {sequence}"
        )


def _check_tensor(
    name: str, value: object, shape: str, dtypes: Dtypes, like: tuple[str, Tensor] | None = None
) -> None:
    """Raise unless `value` is a tensor of this form, on the device of `like` if that is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, but it is {type(value).__name__}")
    if value.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, but it has {list(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {_one_of(dtypes)}, but it is {value.dtype}")
    if like is not None and value.device != like[1].device:
        raise ValueError(
            f"{name} must be on {like[1].device}, the device of {like[0]}, "
            f"but it is on {value.device}"
        )


def _check_equal(name: str, value: object, other_name: str, other: object) -> None:
    if value != other:
        was, must = (list(x) if isinstance(x, tuple) else x for x in (value, other))
        raise ValueError(f"{name} must be {other_name}={must}, but it is {was}")


def _one_of(dtypes: Dtypes) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
