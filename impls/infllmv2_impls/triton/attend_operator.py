"""`attend` as operators of PyTorch: traceable, differentiable, and safe to capture in a CUDA graph.

Nothing here waits for the device: grids and scratch follow from shapes and from the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import attend_backward, attend_forward, hopper_forward, hopper_keys, hopper_queries
from .attend_tokens import attend_tokens, few
from .device import launching_on, unit_stride
from .readers import list_readers
from .shapes import Shape
from .union import Union, unite


@torch.library.custom_op("infllmv2_triton::attend", mutates_args=())
def attend_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    dense_len: int,
) -> tuple[Tensor, Tensor]:
    """Return `out` and `lse`; see `attend.attend`, which checks the arguments."""
    shape = Shape.of(q, k, block_size)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    with launching_on(q):
        if few(q, max_seqlen_q, shape):
            return attend_tokens(q, k, v, selected, cu_seqlens_q, cu_seqlens_k, dense_len, shape)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_k, dense_len
        union = _unite(selected, *lengths, shape, shape.forward_tokens)
        kernels = hopper_forward if shape.hopper else attend_forward
        return kernels.attend_tiles(q, k, v, union, shape)


@attend_operator.register_fake
def _(q: Tensor, *_others: Tensor | int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("infllmv2_triton::attend_backward", mutates_args=())
def attend_backward_operator(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    block_size: int,
    dense_len: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k` and `v`; `out` and `lse` are what the forward returned."""
    shape = Shape.of(q, k, block_size)
    out, lse, grad_out, grad_lse = (x.contiguous() for x in (out, lse, grad_out, grad_lse))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    q, k, v = (unit_stride(x) for x in (q, k, v))
    with launching_on(q):
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_k, dense_len
        union = _unite(selected, *lengths, shape, shape.backward_tokens)
        lse2, delta = attend_backward.row_statistics(out, lse, grad_out, grad_lse)
        rows = q, k, v, grad_out, lse2, delta
        kernels = hopper_queries if shape.hopper else attend_backward
        grad_q = kernels.query_gradients(*rows, union, shape)
        readers = list_readers(
            union,
            cu_seqlens_q,
            cu_seqlens_k,
            dense_len,
            total_q=q.shape[0],
            total_k=k.shape[0],
            most_pieces=selected.shape[2] * (block_size // shape.piece),
            item_readers=shape.item_readers(q.shape[0]),
        )
        kernels = hopper_keys if shape.hopper else attend_backward
        grad_k, grad_v = kernels.key_gradients(*rows, readers, shape)
    return grad_q, grad_k, grad_v


@attend_backward_operator.register_fake
def _(
    _grad_out: Tensor, _grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Tensor | int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
    ctx.numbers = inputs[7:]  # without the most queries, which only the forward looks at


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = attend_backward_operator(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers)
    return *grads, *[None] * 7


attend_operator.register_autograd(_differentiate, setup_context=_save)


def _unite(
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    dense_len: int,
    shape: Shape,
    tokens: int,
) -> Union:
    return unite(
        selected,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_k,
        shape.block_size,
        dense_len,
        tokens=tokens,
        piece=shape.piece,
    )
