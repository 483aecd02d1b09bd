"""Calls of a cache's functions that must be refused, one wrong argument at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .capabilities import Capabilities
from .invalid import Invalid


def invalid_caches(capabilities: Capabilities) -> Iterator[Invalid]:
    """Yield the wrong calls of `new_cache` that the implementation claims to refuse.

    Args:
        capabilities: what is claimed.
    """
    sizes = {"batch": -1, "max_seqlen_k": -1, "num_kv_heads": 0, "head_dim": 0}
    calls = [Invalid("shapes", f"{n} of {wrong}", {n: wrong}, (n,)) for n, wrong in sizes.items()]
    calls.append(Invalid("dtypes", "dtype of integers", {"dtype": torch.int32}, ("dtype",)))
    calls.append(Invalid("config", "config that is a mapping", {"config": {}}, ("config",)))
    yield from _claimed(calls, capabilities)


def invalid_appends(
    given: dict[str, Any], room: list[int], capabilities: Capabilities
) -> Iterator[Invalid]:
    """Yield the wrong calls of `append` that the implementation claims to refuse.

    Args:
        given: the arguments of a right call, with a token or more.
        room: how many tokens every sequence can still take.
        capabilities: what is claimed.
    """
    k, v = given["k"], given["v"]
    calls = [
        *_of_tensor("k", k),
        *_of_tensor("v", v),
        Invalid("shapes", "v with a row too few", {"v": v[:-1]}, ("v",)),
        *_of_lengths("cu_seqlens", "max_seqlen", given, ("k", k)),
        _of_selection("selection_k", given, k),
    ]
    sizes = given["cu_seqlens"].diff().tolist()
    more = max(room) + 1
    sizes[room.index(max(room))] = more
    ends = torch.tensor([0, *sizes], device=k.device).cumsum(0).int()
    rows = torch.zeros(int(ends[-1]), dtype=torch.long, device=k.device)
    changes = {"k": k[rows], "v": v[rows], "cu_seqlens": ends, "max_seqlen": max(sizes)}
    extra = given.get("selection_k")
    changes |= {} if extra is None else {"selection_k": extra[rows]}
    names = ("cu_seqlens", "max_seqlen_k")
    calls.append(Invalid("cu_seqlens", "an append of more tokens than fit", changes, names))
    yield from _claimed(calls, capabilities)


def invalid_decodes(
    given: dict[str, Any], lengths: list[int], num_kv_heads: int, capabilities: Capabilities
) -> Iterator[Invalid]:
    """Yield the wrong calls of `decode` that the implementation claims to refuse.

    Args:
        given: the arguments of a right call, with a query or more.
        lengths: how many tokens of every sequence the cache holds.
        num_kv_heads: of the cache.
        capabilities: what is claimed.
    """
    q = given["q"]
    calls = [
        *_of_tensor("q", q),
        *_of_lengths("cu_seqlens_q", "max_seqlen_q", given, ("q", q)),
        _of_selection("selection_q", given, q),
    ]
    if num_kv_heads > 1:
        names = ("q", "num_heads", "heads")
        what = "a number of query heads that HK does not divide"
        calls.append(Invalid("shapes", what, {"q": torch.cat([q, q[:, :1]], dim=1)}, names))
    ends = torch.tensor([0, *(n + 1 for n in lengths)], device=q.device).cumsum(0).int()
    rows = torch.zeros(int(ends[-1]), dtype=torch.long, device=q.device)
    changes = {"q": q[rows], "cu_seqlens_q": ends, "max_seqlen_q": max(lengths) + 1}
    extra = given.get("selection_q")
    changes |= {} if extra is None else {"selection_q": extra[rows]}
    what = "more queries than the cache has tokens"
    calls.append(Invalid("cu_seqlens", what, changes, ("cu_seqlens_q",)))
    yield from _claimed(calls, capabilities)


def invalid_resets(lengths: list[int], capabilities: Capabilities) -> Iterator[Invalid]:
    """Yield the wrong calls of `reset` that the implementation claims to refuse.

    Args:
        lengths: how many tokens of every sequence the cache holds.
        capabilities: what is claimed.
    """
    longer = [*lengths[:-1], lengths[-1] + 1]
    calls = [
        Invalid("shapes", "lengths of another batch", {"lengths": [*lengths, 0]}, ("lengths",)),
        Invalid("cu_seqlens", "lengths below 0", {"lengths": [-1] * len(lengths)}, ("lengths",)),
        Invalid("cu_seqlens", "lengths beyond the tokens", {"lengths": longer}, ("lengths",)),
    ]
    yield from _claimed(calls, capabilities)


def _claimed(calls: list[Invalid], capabilities: Capabilities) -> Iterator[Invalid]:
    yield from (wrong for wrong in calls if wrong.kind in capabilities.validates)


def _of_tensor(name: str, x: Tensor) -> list[Invalid]:
    other = x[..., 1:].contiguous()
    dtype = torch.float32 if x.dtype == torch.float64 else torch.float64
    return [
        Invalid("shapes", f"{name} without its head axis", {name: x[:, 0]}, (name,)),
        Invalid("shapes", f"{name} of another head dim", {name: other}, (name, "head_dim")),
        Invalid("dtypes", f"{name} of integers", {name: x.int()}, (name,)),
        Invalid("dtypes", f"{name} of another dtype", {name: x.to(dtype)}, (name,)),
        Invalid("devices", f"{name} on another device", {name: x.to("meta")}, (name, "device")),
    ]


def _of_selection(name: str, given: dict[str, Any], twin: Tensor) -> Invalid:
    """Return a call without the input that `use_nope` asks for, or with one it does not."""
    missing = name in given
    what = f"use_nope without {name}" if missing else f"{name} without use_nope"
    return Invalid("config", what, {name: None if missing else twin}, (name, "use_nope"))


def _of_lengths(
    name: str, longest: str, given: dict[str, Any], rows: tuple[str, Tensor]
) -> list[Invalid]:
    ends: Tensor = given[name]
    shifted = ends.clone()
    shifted[0] = 1
    more = torch.cat([ends, ends[-1:]])
    most = int(ends.diff().max())
    names = (name, rows[0])
    return [
        Invalid("dtypes", f"{name} of int64", {name: ends.long()}, (name,)),
        Invalid("shapes", f"{name} of another batch", {name: more}, (name,)),
        Invalid("cu_seqlens", f"{name} that does not start at 0", {name: shifted}, (name,)),
        Invalid("cu_seqlens", f"{rows[0]} with a row too few", {rows[0]: rows[1][:-1]}, names),
        Invalid("cu_seqlens", f"{longest} below the longest", {longest: most - 1}, (longest, name)),
    ]
