"""Calls that an implementation must refuse, one wrong argument at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .capabilities import Capabilities
from .failure import fail

_PACKED = ("q", "k", "v", "k_c1")
_ROWS = ("scores", "block_scores", "selected")


@dataclass(frozen=True)
class Invalid:
    """Describe a wrong call.

    Args:
        kind: which entry of `Capabilities.validates` covers it.
        what: the fault, in words.
        changes: the arguments that differ from a right call.
        names: the error must name one of these arguments.
    """

    kind: str
    what: str
    changes: dict[str, Any]
    names: tuple[str, ...]


def invalid_calls(
    function: str, given: dict[str, Any], capabilities: Capabilities
) -> Iterator[Invalid]:
    """Yield the wrong calls that the implementation claims to refuse.

    Args:
        function: the contract function.
        given: the arguments of a right call.
        capabilities: what is claimed.
    """
    makers = (_shapes, _dtypes, _devices, _cu_seqlens, _selected, _config)
    calls = [wrong for maker in makers for wrong in maker(given)]
    calls += _missing_selection_inputs(given) if function == "attention" else []
    yield from (wrong for wrong in calls if wrong.kind in capabilities.validates)


def check_refused(wrong: Invalid, error: Exception | None) -> None:
    """Fail unless a wrong call raised an error of the right kind that names the argument.

    Args:
        wrong: the call.
        error: what it raised, None if nothing.
    """
    if error is None:
        fail(f"{wrong.what} was accepted", expected="ValueError or TypeError")
    elif not isinstance(error, (ValueError, TypeError)):
        fail(
            f"{wrong.what} raised the wrong kind of error",
            expected="ValueError or TypeError",
            actual=f"{type(error).__name__}: {error}",
        )
    elif not any(re.search(rf"\b{name}\b", str(error)) for name in wrong.names):
        fail(
            f"the error about {wrong.what} does not name the argument",
            expected=f"a message with one of {list(wrong.names)}",
            actual=f"{type(error).__name__}: {error}",
        )


def _shapes(given: dict[str, Any]) -> Iterator[Invalid]:
    def wrong(what: str, names: tuple[str, ...], **changes: Any) -> Invalid:
        return Invalid("shapes", what, changes, names)

    for name in _PACKED:
        if name in given:
            x: Tensor = given[name]
            yield wrong(f"{name} without its head axis", (name,), **{name: x[:, 0]})
    for name in ("q", "v"):
        if name in given:
            x = given[name]
            others = (name, "k", "k_c1", "head_dim")
            yield wrong(f"{name} of another head dim", others, **{name: x[..., 1:].contiguous()})
    if "q" in given:
        q = given["q"]
        kv_heads = given["k" if "k" in given else "k_c1"].shape[1]
        if kv_heads > 1:
            more = torch.cat([q, q[:, :1]], dim=1)
            names = ("q", "num_heads", "heads")
            yield wrong("a number of query heads that HK does not divide", names, q=more)
        if len(q):
            yield wrong("q with a row too few", ("q", "cu_seqlens_q"), q=q[:-1])
    for name in ("k", "v"):
        if name in given and len(given[name]):
            names = (name, "k", "cu_seqlens_k")
            yield wrong(f"{name} with a row too few", names, **{name: given[name][:-1]})
    for name in _ROWS:
        if name in given and given[name].shape[1]:
            x = given[name]
            yield wrong(f"{name} with a row too few", (name,), **{name: x[:, :-1].contiguous()})
            if name != "selected" and x.shape[2]:
                yield wrong(f"{name} with a column too few", (name,), **{name: x[..., :-1]})


def _dtypes(given: dict[str, Any]) -> Iterator[Invalid]:
    for name in _PACKED:
        if name in given:
            yield Invalid("dtypes", f"{name} of integers", {name: given[name].int()}, (name,))
    if "v" in given:
        other = torch.float64 if given["v"].dtype != torch.float64 else torch.float32
        changes = {"v": given["v"].to(other)}
        yield Invalid("dtypes", "v of another dtype than k", changes, ("v", "k"))
    for name in ("cu_seqlens_q", "cu_seqlens_k", "selected"):
        if name in given:
            yield Invalid("dtypes", f"{name} of int64", {name: given[name].long()}, (name,))


def _devices(given: dict[str, Any]) -> Iterator[Invalid]:
    for name in ("k", "v", "k_c1", "cu_seqlens_k", *_ROWS):
        if name in given:
            changes = {name: given[name].to("meta")}
            yield Invalid("devices", f"{name} on another device", changes, (name, "device"))


def _cu_seqlens(given: dict[str, Any]) -> Iterator[Invalid]:
    def wrong(what: str, names: tuple[str, ...], **changes: Any) -> Invalid:
        return Invalid("cu_seqlens", what, changes, names)

    for side in ("q", "k"):
        name = f"cu_seqlens_{side}"
        if name not in given or len(given[name]) < 2 or int(given[name][-1]) == 0:
            continue
        ends: Tensor = given[name]
        shifted = ends.clone()
        shifted[0] = 1
        yield wrong(f"{name} that does not start at 0", (name,), **{name: shifted})
        falling = torch.cat([ends[:1], ends[-1:] + 1, ends[-1:]])
        yield wrong(f"{name} that falls", (name,), **{name: falling})
        short = f"max_seqlen_{side}"
        longest = int(ends.diff().max())
        yield wrong(f"{short} below the longest sequence", (short, name), **{short: longest - 1})
    if "cu_seqlens_q" in given and int(given["cu_seqlens_k"][-1]):
        longer = torch.cat([given["cu_seqlens_q"], given["cu_seqlens_q"][-1:]])
        names = ("cu_seqlens_q", "cu_seqlens_k")
        yield wrong("cu_seqlens of different batches", names, cu_seqlens_q=longer)


def _selected(given: dict[str, Any]) -> Iterator[Invalid]:
    selected: Tensor | None = given.get("selected")
    if selected is not None and selected.numel():
        for value in (-2, 1 << 28):
            wrong = selected.clone()
            wrong[..., 0] = value
            what = f"a selected block {value}"
            yield Invalid("selected", what, {"selected": wrong}, ("selected",))


def _config(given: dict[str, Any]) -> Iterator[Invalid]:
    if "config" in given:
        yield Invalid("config", "config that is a mapping", {"config": {}}, ("config",))
    for name in ("block_size", "kernel_size", "kernel_stride"):
        if name in given:
            yield Invalid("config", f"{name} of 0", {name: 0}, (name,))


def _missing_selection_inputs(given: dict[str, Any]) -> list[Invalid]:
    config = replace(given["config"], use_nope=True)
    names = ("selection_q", "selection_k", "use_nope")
    changes = {"config": config, "selection_q": None, "selection_k": None}
    what = "use_nope without selection_q and selection_k"
    return [Invalid("config", what, changes, names)]
