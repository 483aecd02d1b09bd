"""`attend` as operators of PyTorch: traceable, differentiable, and safe to capture in a CUDA graph.

Nothing here waits for the device: grids and scratch follow from shapes and from the arguments.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from . import attend_backward, attend_forward, hopper_forward, hopper_keys, hopper_queries
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
    q, k, v = (_rows(x) for x in (q, k, v))
    with _device_of(q):
        union = _unite(selected, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, dense_len, shape)
        kernels = hopper_forward if shape.hopper else attend_forward
        return kernels.attend_tiles(q, k, v, union, shape)


@attend_operator.register_fake
def _(
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
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    dense_len: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k` and `v`; `out` and `lse` are what the forward returned."""
    shape = Shape.of(q, k, block_size)
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    q, k, v = (_rows(x) for x in (q, k, v))
    with _device_of(q):
        union = _unite(selected, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, dense_len, shape)
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
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
    ctx.numbers = inputs[6:]


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
) -> Union:
    return unite(
        selected,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        max_seqlen_k,
        shape.block_size,
        dense_len,
        tokens=shape.tokens,
        piece=shape.piece,
    )


def _rows(x: Tensor) -> Tensor:
    """Return a tensor whose rows kernels can read: the last axis is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one, where kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def interpreted() -> bool:
    """Say whether Triton interprets kernels on the CPU."""
    return bool(triton.knobs.runtime.interpret)
