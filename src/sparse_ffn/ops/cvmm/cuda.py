"""CVMM in the CUDA kernels of csrc/cuda; weights in another dtype than x are cast in each pass, no copy is kept."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse_ffn.backends import cuda
from sparse_ffn.backends.cpu import rows
from sparse_ffn.backends.cuda import DTYPES, Cvmm, pointer
from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.cvmm.backend import Gradients, Slots
from sparse_ffn.ops.segments import is_transposed, unsort

# S slots, N rows of x, M and L the matrices' sides, E experts


@on_device
def forward(x: Tensor, weight: Tensor, slots: Slots, n_out: int) -> Tensor:
    """The output."""
    weight, (expert, gather, scatter, reduction) = weight.to(x.dtype), slots
    order, offsets = sort_by_expert(expert, weight.shape[0])
    targets = _rows(scatter, order)
    arguments, _keep = _arguments(x, weight, offsets, _rows(gather, order), targets, _scale(reduction, order), n_out)
    if scatter is not None:
        members, bounds = sort_by_expert(_void_last(targets, offsets, n_out), n_out)
        arguments.out_members, arguments.out_offsets = members.data_ptr(), bounds.data_ptr()
    out = x.new_zeros(n_out, weight.shape[2])  # nothing writes the rows of void slots
    _workspace = cuda.give_workspace(arguments, "cvmm_forward", x)
    cuda.call("cvmm_forward", ctypes.byref(arguments), out.data_ptr())
    return out


@on_device
def backward(grad: Tensor, x: Tensor, weight: Tensor, slots: Slots) -> Gradients:
    """The gradients."""
    dtype, weight, (expert, gather, scatter, reduction) = weight.dtype, weight.to(x.dtype), slots
    order, offsets = sort_by_expert(expert, weight.shape[0])
    sources, scale = _rows(gather, order), _scale(reduction, order)
    arguments, _keep = _arguments(x, weight, offsets, sources, _rows(scatter, order), scale, grad.shape[0])
    if gather is not None or reduction is not None:  # else every row of x has one slot
        members, bounds = sort_by_expert(_void_last(sources, offsets, x.shape[0]), x.shape[0])
        arguments.x_members, arguments.x_offsets = members.data_ptr(), bounds.data_ptr()
    grad = rows(grad)
    dx, dweight = x.new_zeros(x.shape), x.new_empty(weight.shape)
    dscale = None if scale is None else torch.empty_like(scale)
    _workspace = cuda.give_workspace(arguments, "cvmm_backward", x)
    cuda.call(
        "cvmm_backward",
        ctypes.byref(arguments),
        *(grad.data_ptr(), grad.stride(0), dx.data_ptr(), dweight.data_ptr(), pointer(dscale)),
    )
    dweight = dweight.to(dtype)
    if is_transposed(weight):
        dweight = dweight.transpose(1, 2).contiguous().transpose(1, 2)
    if reduction is None or dscale is None:
        return Gradients(dx, dweight, None)
    return Gradients(dx, dweight, unsort(dscale.unsqueeze(1), order).squeeze(1).to(reduction.dtype))


def _rows(index: Tensor | None, order: Tensor) -> Tensor:
    """The row that each sorted slot reads or writes: int64 [S]."""
    return order.long() if index is None else index.index_select(0, order)


def _void_last(rows: Tensor, offsets: Tensor, n: int) -> Tensor:
    """The rows of sorted slots, n of void ones."""
    return rows.where(torch.arange(rows.shape[0], device=rows.device) < offsets[-1], n)


def _scale(reduction: Tensor | None, order: Tensor) -> Tensor | None:
    return None if reduction is None else reduction.index_select(0, order).float()


def _arguments(
    x: Tensor, weight: Tensor, offsets: Tensor, sources: Tensor, targets: Tensor, scale: Tensor | None, n_out: int
) -> tuple[Cvmm, tuple[Tensor | None, ...]]:
    """The argument block, and the tensors whose memory it points to."""
    if weight.stride(1) != 1 and weight.stride(2) != 1:
        weight = weight.contiguous()
    x = rows(x)
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    arguments = Cvmm(
        *(x.shape[0], n_out, sources.shape[0], *weight.shape),
        *(DTYPES[x.dtype], tf32, cuda.device_number(x), 0, cuda.stream(x), None, 0),
        *(x.data_ptr(), x.stride(0), weight.data_ptr(), *weight.stride()),
        *(pointer(t) for t in (offsets, sources, targets, scale)),
    )
    return arguments, (x, weight, offsets, sources, targets, scale)
