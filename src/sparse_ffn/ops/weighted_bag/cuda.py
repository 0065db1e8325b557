"""Weighted bag in the CUDA kernels of csrc/cuda; the gradient of values sums each row's slots in their order."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse_ffn.backends import cuda
from sparse_ffn.backends.cuda import DTYPES, Bag
from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.weighted_bag.backend import Gradients


@on_device
def forward(values: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The bags [N, O] in ``dtype`` (None: that of values), to which values are cast."""
    values = values if dtype is None else values.to(dtype)
    arguments, _keep = _arguments(values, index, weight, 0)
    out = values.new_empty(index.shape[0], values.shape[1])
    cuda.call("bag_forward", ctypes.byref(arguments), out.data_ptr())
    return out


@on_device
def backward(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> Gradients:
    """Gradients of values and weight."""
    members, offsets = sort_by_expert(index.reshape(-1), values.shape[0])
    return _backward(grad, values, index, weight, members, offsets)


@on_device
def backward_rows(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of values that were read [R], ascending, their gradients [R, O], and the gradient of weight."""
    rows, compact = torch.unique(index, return_inverse=True)
    members, offsets = sort_by_expert(compact.reshape(-1), rows.shape[0])
    drows, dweight = _backward(grad, values, index, weight, members, offsets)
    return rows, drows, dweight


@on_device
def segment_sums(rows: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    """Sums of rows [S, O] over segments of ``members``, int32 [S], that begin at ``offsets``, int32 [R + 1]: [R, O]."""
    ones = torch.ones(rows.shape[0], 1, device=rows.device, dtype=torch.float32)
    arguments, _keep = _arguments(rows, members.unsqueeze(1), ones, offsets.shape[0] - 1)  # only dweight reads index
    arguments.members, arguments.offsets = members.data_ptr(), offsets.data_ptr()
    out = rows.new_empty(offsets.shape[0] - 1, rows.shape[1])
    _workspace = cuda.give_workspace(arguments, "bag_backward", rows)
    cuda.call("bag_backward", ctypes.byref(arguments), arguments.values, None, out.data_ptr())
    return out


def _backward(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, members: Tensor, offsets: Tensor
) -> Gradients:
    dtype, values = values.dtype, values.to(grad.dtype)
    arguments, _keep = _arguments(values, index, weight, offsets.shape[0] - 1)
    arguments.members, arguments.offsets = members.data_ptr(), offsets.data_ptr()
    grad = grad.contiguous()
    dvalues = values.new_empty(offsets.shape[0] - 1, values.shape[1])
    dweight = values.new_empty(weight.shape, dtype=torch.float32)
    _workspace = cuda.give_workspace(arguments, "bag_backward", values)
    cuda.call("bag_backward", ctypes.byref(arguments), grad.data_ptr(), dweight.data_ptr(), dvalues.data_ptr())
    return Gradients(dvalues.to(dtype), dweight.to(weight.dtype))


def _arguments(values: Tensor, index: Tensor, weight: Tensor, rows: int) -> tuple[Bag, tuple[Tensor, ...]]:
    """The argument block, and the tensors whose memory it points to."""
    keep = (values.contiguous(), index.contiguous(), weight.float().contiguous())
    arguments = Bag(
        *(*index.shape, *values.shape, rows),
        *(DTYPES[values.dtype], cuda.device_number(values), cuda.stream(values), None, 0),
        *(t.data_ptr() for t in keep),
    )
    return arguments, keep
