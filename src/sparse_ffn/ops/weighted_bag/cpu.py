"""Weighted bag in the native core: forward, and a backward that reads each value row once for both gradients."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse_ffn import native
from sparse_ffn.native import DTYPES, Bag


def forward(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The bags [N, O]."""
    arguments, _keep = _arguments(values, index, weight)
    out = native.empty(index.shape[0], values.shape[1], dtype=values.dtype)
    native.call("bag_forward", arguments, out.data_ptr())
    return out


def backward(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of values and weight."""
    arguments, _keep = _arguments(values, index, weight)
    grad = grad.contiguous()
    dvalues = native.empty(*values.shape, dtype=values.dtype)
    dweight = native.empty(*weight.shape, dtype=values.dtype)
    native.call("bag_backward", arguments, grad.data_ptr(), dweight.data_ptr(), dvalues.data_ptr())
    return dvalues, dweight.to(weight.dtype)


def values_backward(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Gradient of values alone; only the shape and dtype of ``values`` matter."""
    arguments, _keep = _arguments(values, index, weight)
    grad = grad.contiguous()
    dvalues = native.empty(*values.shape, dtype=values.dtype)
    native.call("bag_backward", arguments, grad.data_ptr(), None, dvalues.data_ptr())
    return dvalues


def backward_rows(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of values that were read [R], ascending, their gradients [R, O], and the gradient of weight."""
    arguments, _keep = _arguments(values, index, weight)
    grad = grad.contiguous()
    most = min(index.numel(), values.shape[0])
    rows, count = native.empty(most, dtype=torch.int64), ctypes.c_int64(0)
    drows = native.empty(most, values.shape[1], dtype=values.dtype)
    dweight = native.empty(*weight.shape, dtype=values.dtype)
    native.call(
        "bag_backward_sparse",
        arguments,
        *(t.data_ptr() for t in (grad, dweight, rows, drows)),
        ctypes.byref(count),
    )
    return rows[: count.value], drows[: count.value], dweight.to(weight.dtype)


def _arguments(values: Tensor, index: Tensor, weight: Tensor) -> tuple[Bag, tuple[Tensor, ...]]:
    """The core's argument block, and the tensors whose memory it points to."""
    keep = (values.contiguous(), index.contiguous(), weight.to(values.dtype).contiguous())
    arguments = Bag(
        *(index.shape[0], index.shape[1], values.shape[0], values.shape[1]),
        *(DTYPES[values.dtype], torch.get_num_threads()),
        *(t.data_ptr() for t in keep),
    )
    return arguments, keep
