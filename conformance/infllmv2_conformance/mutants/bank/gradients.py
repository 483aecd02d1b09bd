"""Wrong gradients of stage 5, with a right forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.mutants.model import Around, Edit, Mutant

from .faults import Arguments

_DQ = "return (grad_logits @ k).view(q.shape)"
_DK = "tile.add_to(grad_keys, grad_logits.mT @ q.reshape(*grouped, q.shape[-1]))"
_DV = "tile.add_to(grad_values, weights.mT @ grad_rows)"
_SHIFT = "shift = grad_lse[rows] - (grad_rows * out[rows]).sum(dim=-1)  # [t, HQ]"
_SAVED = "q, k, v, selected, out, top, total = ctx.saved_tensors"
_MASK = "weights = weights.masked_fill_(~tile.admitted[:, :, None], 0)"


def _edit(before: str, after: str) -> tuple[Edit, ...]:
    return (Edit("attend", before, after),)


def _gradient_for_all_keys(inner: Callable[..., Any], given: Arguments) -> Any:
    out, *rest = inner(**given)
    return out + _nothing(given["k"]).to(out.dtype), *rest


def _gradient_for_unread_keys(inner: Callable[..., Any], given: Arguments) -> Any:
    """Send a gradient to the blocks that no row of any head selects."""
    out, *rest = inner(**given)
    size, leak = given["block_size"], out.new_zeros((), dtype=torch.float64)
    ends = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"].tolist()
    for i in range(len(ends[0]) - 1):
        rows = given["selected"][:, ends[0][i] : ends[0][i + 1]]
        keys = given["k"][ends[1][i] : ends[1][i + 1]]
        blocks = torch.arange(len(keys), device=keys.device) // size
        read = torch.isin(blocks, rows)
        leak = leak + _nothing(keys[~read]) if rows.numel() else leak
    return out + leak.to(out.dtype), *rest


def _gradient_for_own_blocks(inner: Callable[..., Any], given: Arguments) -> Any:
    """Send a gradient to the last block of every sequence, if no row of any head selects it."""
    out, *rest = inner(**given)
    size, leak = given["block_size"], out.new_zeros((), dtype=torch.float64)
    ends = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"].tolist()
    for i in range(len(ends[0]) - 1):
        rows = given["selected"][:, ends[0][i] : ends[0][i + 1]]
        keys = given["k"][ends[1][i] : ends[1][i + 1]]
        last = (len(keys) - 1) // size
        if rows.numel() and not (rows == last).any():
            leak = leak + _nothing(keys[last * size :])
    return out + leak.to(out.dtype), *rest


def _noisy_gradient(inner: Callable[..., Any], given: Arguments) -> Any:
    """Let the last bit of the gradients differ from call to call."""
    for name in ("k", "v"):
        given[name] = given[name] * 1
        if given[name].requires_grad:
            given[name].register_hook(_noise)
    return inner(**given)


def _noise(x: Tensor) -> Tensor:
    up = torch.rand(x.shape, device=x.device) < 0.5
    return torch.where(up, x * (1 + torch.finfo(x.dtype).eps), x)


def _nothing(x: Tensor) -> Tensor:
    """Return 0, with a gradient that is not."""
    return (x.double() - x.detach().double()).nan_to_num().sum() * 1e-3


MUTANTS = (
    Mutant(
        "attend.dq-no-scale",
        "attend.gradients",
        "The gradient of q lacks the scale of the logits.",
        "The scale folded into q beforehand, and forgotten on the way back.",
        _edit(_DQ, "return (grad_logits @ k).view(q.shape) * q.shape[-1] ** 0.5"),
    ),
    Mutant(
        "attend.dk-no-scale",
        "attend.gradients",
        "The gradient of k lacks the scale of the logits.",
        "The scale folded into q beforehand, and forgotten on the way back.",
        _edit(_DK, _DK.replace("grad_logits.mT", "(grad_logits * q.shape[-1] ** 0.5).mT")),
    ),
    Mutant(
        "attend.dv-not-normalised",
        "attend.gradients",
        "The gradient of v uses exp(logit - maximum), not divided by their sum.",
        "The probabilities of the forward kept before the last step of an online softmax.",
        _edit(_DV, _DV.replace("weights.mT", "(weights * total.view(*grouped, 1)).mT")),
    ),
    Mutant(
        "attend.dk-first-head-only",
        "attend.gradients",
        "Only the first head of a group sends gradients to its keys.",
        "The sum over the group dropped: grouped heads handled as in multi-head attention.",
        _edit(
            _DK,
            "tile.add_to(grad_keys, grad_logits[:, :, :: q.shape[2]].mT @ "
            "q.reshape(*grouped, q.shape[-1])[:, :, :: q.shape[2]])",
        ),
    ),
    Mutant(
        "attend.dv-first-head-only",
        "attend.gradients",
        "Only the first head of a group sends gradients to its values.",
        "The sum over the group dropped.",
        _edit(
            _DV,
            "tile.add_to(grad_values, weights[:, :, :: q.shape[2]].mT @ "
            "grad_rows[:, :, :: q.shape[2]])",
        ),
    ),
    Mutant(
        "attend.no-softmax-correction",
        "attend.gradients",
        "The term grad_out . out is left out.",
        "The softmax taken for an elementwise exponential.",
        _edit(_SHIFT, "shift = grad_lse[rows].clone()"),
    ),
    Mutant(
        "attend.last-row-only",
        "attend.gradients",
        "Gradients of keys and values are stored instead of added: the last query wins.",
        "A store where an atomic addition belongs.",
        (
            Edit("tiles", "accumulate=True", "accumulate=False"),
            Edit(
                "tiles",
                "rows.index_add_(0, self.tokens.flatten(), values)",
                "admitted = self.admitted.flatten()\n"
                "            rows[self.tokens.flatten()[admitted]] = values[admitted]",
            ),
        ),
    ),
    Mutant(
        "attend.bf16-gradients",
        "attend.gradients",
        "The logits' gradients are rounded to bfloat16.",
        "dS cast for a tensor-core product, against what is declared.",
        _edit(
            _DK,
            f"grad_logits = grad_logits.bfloat16().to(q.dtype)\n    {_DK}",
        ),
    ),
    Mutant(
        "attend.dk-of-all-keys",
        "attend.gradients",
        "Every key gets a gradient, whether it is selected or not.",
        "A backward pass that is dense.",
        wrap=Around(("attend",), _gradient_for_all_keys, backward=True),
    ),
    Mutant(
        "attend.dk-of-unread-blocks",
        "attend.gradient-unselected",
        "Blocks that nobody selects get a gradient.",
        "Gradient buffers that are not cleared where no kernel writes.",
        wrap=Around(("attend",), _gradient_for_unread_keys, backward=True),
    ),
    Mutant(
        "attend.backward-visits-own-block",
        "attend.gradient-unselected",
        "Keys of the query's own block get a gradient even if the block is not selected.",
        "A diagonal block handled apart, because selections from stage 4 hold it.",
        wrap=Around(("attend",), _gradient_for_own_blocks, backward=True),
    ),
    Mutant(
        "attend.empty-row-gradient-nan",
        "attend.gradient-empty-rows",
        "Rows with nothing to attend send back NaN.",
        "0 / 0 in the backward pass, guarded in the forward alone.",
        (
            Edit("attend", _SAVED, f"{_SAVED}\n        total = total * (top > -torch.inf)"),
            Edit("attend", _MASK, ""),
        ),
    ),
    Mutant(
        "attend.gradient-noise",
        "attend.gradient-repeatable",
        "The last bit of the gradients of k and v differs from call to call.",
        "Sums over rows by atomic additions.",
        wrap=Around(("attend",), _noisy_gradient),
    ),
)
