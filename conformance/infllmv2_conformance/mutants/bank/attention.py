"""Faults of the whole forward, with right stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.mutants.model import Around, Edit, Mutant
from infllmv2_reference.layout import spans

from .attend import FINITE_CAUSAL_MASK
from .faults import Arguments, shared_scale

_ATTEND = "return *attend(q, k, v, selected, sparse, dense, config.block_size), selected"
_PLACES = "sparse, dense = _switch(packed_places(cu_seqlens_q, cu_seqlens_k), config)"
_SELECTION_Q = (
    "selection_q = q if selection_q is None else selection_q\n"
    "        selection_k = k if selection_k is None else selection_k"
)
_SWITCH = (
    "sparse = [place for place in places if config.is_sparse(place.num_keys)]\n"
    "    return sparse, [place for place in places if not config.is_sparse(place.num_keys)]"
)
_COMPRESS = "k_c1 = compress(keys, c.kernel_size, c.kernel_stride)"
_ONLY = ("attention",)


def _edit(before: str, after: str) -> tuple[Edit, ...]:
    return (Edit("implementation", before, after),)


def switch(condition: str) -> tuple[Edit, ...]:
    """Return the edit that makes a place sparse by another condition."""
    body = (
        f"chosen = [{condition} for place in places]\n"
        "    sparse = [p for p, yes in zip(places, chosen) if yes]\n"
        "    return sparse, [p for p, yes in zip(places, chosen) if not yes]"
    )
    return _edit(_SWITCH, body)


def _multi_query_in_fours(inner: Callable[..., Any], given: Arguments) -> Any:
    """Forget the query heads behind the fourth where all share one key/value head."""
    out, lse, selected = inner(**given)
    if given["k"].shape[1] == 1 and given["q"].shape[1] > 4:
        kept = torch.arange(out.shape[1], device=out.device) < 4
        out = out * kept[:, None].to(out.dtype)
    return out, lse, selected


def _reads_all_values(inner: Callable[..., Any], given: Arguments) -> Any:
    """Add the values of a sequence to its own rows, weighted by 0."""
    out, lse, selected = inner(**given)
    out = out.clone()
    for span in spans(given["cu_seqlens_q"], given["cu_seqlens_k"]):
        out[span.queries] += (0 * given["v"][span.keys]).sum()
    return out, lse, selected


def _gradient_for_selection(inner: Callable[..., Any], given: Arguments) -> Any:
    """Send a gradient to what only selects."""
    out, lse, selected = inner(**given)
    extra = given.get("selection_k")
    if extra is not None:
        leak = (extra.double() - extra.detach().double()).nan_to_num().sum() * 1e-3
        out = out + leak.to(out.dtype)
    return out, lse, selected


def _by_falling_length(inner: Callable[..., Any], given: Arguments) -> Any:
    """Return results in the order of falling lengths when the batch has three sequences."""
    out, lse, selected = inner(**given)
    ends: list[int] = given["cu_seqlens_q"].tolist()
    rows = [torch.arange(a, b) for a, b in itertools.pairwise(ends)]
    if len(rows) < 2 or len(rows[0]) >= len(rows[-1]):
        return out, lse, selected
    order: Tensor = torch.cat(sorted(rows, key=len, reverse=True)).to(out.device)
    return out[order], lse[order], selected[:, order]


MUTANTS = (
    Mutant(
        "attention.last-slot-lost",
        "attention.values",
        "The last slot of the selection is returned, but not attended.",
        "An attention kernel compiled for one slot fewer.",
        _edit(
            _ATTEND, _ATTEND.replace("selected, sparse", "selected[..., :-1].contiguous(), sparse")
        ),
    ),
    Mutant(
        "attention.results-out-of-order",
        "attention.permutation",
        "Results stand in the order of falling lengths.",
        "A scheduler that sorts sequences and forgets to undo it.",
        wrap=Around(_ONLY, _by_falling_length),
    ),
    Mutant(
        "attention.wrong-windows",
        "attention.selection",
        "K_C1 is compressed with the window one key late.",
        "Compression fused into the forward, with an offset of its own.",
        (
            Edit(
                "blocks",
                _COMPRESS,
                "k_c1 = compress(keys.roll(-1, 0), c.kernel_size, c.kernel_stride)",
            ),
        ),
    ),
    Mutant(
        "attention.second-normaliser-stride",
        "attention.selection",
        "K_C2 has the right length and the stride of K_C1.",
        "One stride for both kinds of windows.",
        (
            Edit(
                "blocks",
                "k_c2 = compress(keys, c.lse_kernel_size, c.lse_kernel_stride)",
                "k_c2 = compress(keys, c.lse_kernel_size, c.kernel_stride)"
                "[: max(0, (len(keys) - c.lse_kernel_size) // c.lse_kernel_stride + 1)]",
            ),
        ),
    ),
    Mutant(
        "attention.cached-windows",
        "attention.chunks",
        "Windows are kept from the last call if the first key is the same.",
        "A prefix cache that forgets that the prefix has grown.",
        (
            Edit(
                "blocks",
                _COMPRESS,
                f"{_COMPRESS}\n    last = _LAST.get('keys')\n"
                "    if last is not None and len(keys) and len(keys) > len(last) > 0 and "
                "last.shape[1:] == keys.shape[1:] and bool((last[0] == keys[0]).all()) and "
                "_LAST['kind'] == (c.kernel_size, c.kernel_stride):\n"
                "        old = _LAST['k_c1']\n"
                "        k_c1 = torch.cat([old, old[-1:].expand(len(k_c1) - len(old), -1, -1)]) "
                "if len(old) else k_c1\n"
                "    _LAST.update(keys=keys.clone(), k_c1=k_c1, kind=(c.kernel_size, "
                "c.kernel_stride))",
            ),
            Edit("blocks", "_SELECT_BYTES = 64\n", "_SELECT_BYTES = 64\n_LAST = {}\n"),
        ),
        functions=_ONLY,
    ),
    Mutant(
        "attention.finite-causal-mask",
        "attention.append",
        "Future tokens of a selected block get -1e4 instead of -inf.",
        "A mask made for half precision.",
        FINITE_CAUSAL_MASK,
        functions=_ONLY,
    ),
    Mutant(
        "attention.batch-scale",
        "attention.packed-alone",
        "All queries of a batch share one scale.",
        "Quantised products with one scale for a tensor.",
        wrap=Around(_ONLY, shared_scale("q")),
    ),
    Mutant(
        "attention.multi-query-in-fours",
        "attention.kv-heads",
        "With one key/value head, query heads behind the fourth get no output.",
        "A multi-query path that handles heads in fours; tensor parallelism ends up there.",
        wrap=Around(_ONLY, _multi_query_in_fours),
    ),
    Mutant(
        "attention.switch-late",
        "attention.switch",
        "A sequence of just dense_len keys runs dense.",
        "`>` for `>=`.",
        switch("config.dense_len < 0 or place.num_keys > config.dense_len"),
        functions=_ONLY,
    ),
    Mutant(
        "attention.switch-by-longest",
        "attention.switch",
        "The longest sequence of the batch decides for all.",
        "max_seqlen_k compared with dense_len.",
        switch("config.is_sparse(max(p.num_keys for p in places))"),
        functions=_ONLY,
    ),
    Mutant(
        "attention.switch-by-queries",
        "attention.switch",
        "The number of queries decides, not that of keys.",
        "Prefill runs sparse and chunks of it dense.",
        switch("config.is_sparse(place.num_queries)"),
        functions=_ONLY,
    ),
    Mutant(
        "attention.dense-history-ignored",
        "attention.switch",
        "Dense sequences place their queries at the start of their keys.",
        "A dense fallback to a kernel with a top-left aligned mask.",
        (
            Edit(
                "tiles",
                "shared = place.num_keys - place.num_queries + start + 1",
                "shared = start + 1",
            ),
            Edit(
                "tiles",
                "positions = place.positions(device)\n    limit",
                "positions = torch.arange(place.num_queries, device=device)\n    limit",
            ),
        ),
        functions=_ONLY,
    ),
    Mutant(
        "attention.never-dense",
        "attention.switch",
        "Every sequence runs sparse.",
        "dense_len left to the caller.",
        switch("True"),
        functions=_ONLY,
    ),
    Mutant(
        "attention.at-most-16-blocks",
        "attention.equals-dense",
        "At most 16 blocks of a row are attended.",
        "A block table of fixed size in shared memory.",
        (
            Edit(
                "tiles",
                "used = min(slots, last // block_size + 1)",
                "used = min(slots, last // block_size + 1, 16)",
            ),
        ),
        functions=_ONLY,
    ),
    Mutant(
        "attention.selection-k-ignored",
        "attention.selection-inputs",
        "Windows are made of k, although selection_k is given.",
        "An argument that is accepted and not passed on.",
        _edit(
            _SELECTION_Q,
            "selection_q = q if selection_q is None else selection_q\n        selection_k = k",
        ),
    ),
    Mutant(
        "attention.selection-q-attends",
        "attention.selection-inputs",
        "selection_q is used for attention, too.",
        "q overwritten by its own variant without rotation.",
        _edit(_SELECTION_Q, f"{_SELECTION_Q}\n        q = selection_q"),
    ),
    Mutant(
        "attention.masked-not-skipped",
        "attention.unselected-not-read",
        "All values of a sequence are multiplied, the unselected ones by 0.",
        "A dense kernel with a mask behind the name of a sparse one.",
        wrap=Around(_ONLY, _reads_all_values),
    ),
    Mutant(
        "attention.keys-detached",
        "attention.gradients",
        "No gradient reaches k.",
        "A tensor detached for the selection, and attended as well.",
        _edit(_ATTEND, _ATTEND.replace("(q, k,", "(q, k.detach(),")),
    ),
    Mutant(
        "attention.selection-differentiable",
        "attention.gradients",
        "A gradient reaches selection_k.",
        "Scores that stay in the graph.",
        wrap=Around(_ONLY, _gradient_for_selection),
    ),
    Mutant(
        "attention.dense-keys-detached",
        "attention.gradients",
        "No gradient reaches the keys of dense sequences.",
        "A fast path for short sequences that is made for inference.",
        _edit(
            _ATTEND,
            "long = torch.zeros(len(k), 1, 1, dtype=torch.bool, device=k.device)\n"
            "        for place in sparse:\n            long[place.keys] = True\n"
            "        k = torch.where(long, k, k.detach())\n        " + _ATTEND,
        ),
    ),
)
