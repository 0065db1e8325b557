"""Weighted bag in the CUDA kernels of csrc/cuda; the gradient of values sums each row's slots in their order."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import cuda
from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.weighted_bag.backend import Gradients


@on_device
def forward(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The bags [N, O], in the dtype of values."""
    out = values.new_empty(index.shape[0], values.shape[1])
    cuda.bag("bag_sums", out, values.contiguous(), _weight(weight), k=index.shape[1], index=index.contiguous())
    return out


@on_device
def backward(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, needs_values: bool = True) -> Gradients:
    """Gradients of values and weight."""
    grad, dvalues = grad.contiguous(), None
    if needs_values:
        dvalues = _of_values(grad, weight, *sort_by_expert(index.reshape(-1), values.shape[0]))
    return Gradients(dvalues, _of_weight(grad, values, index, weight))


@on_device
def backward_rows(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of values that were read [R], ascending, their gradients [R, O], and the gradient of weight."""
    rows, compact = torch.unique(index, return_inverse=True)
    members, offsets = sort_by_expert(compact.reshape(-1), rows.shape[0])
    grad = grad.contiguous()
    drows = _of_values(grad, weight, members, offsets)
    return rows, drows, _of_weight(grad, values, index, weight)


@on_device
def segment_sums(rows: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    """Sums of rows [S, O] over segments of ``members``, int32 [S], that begin at ``offsets``, int32 [R + 1]: [R, O]."""
    out = rows.new_empty(offsets.shape[0] - 1, rows.shape[1])
    cuda.bag("bag_values", rows.contiguous(), out, None, members=members, offsets=offsets)
    return out


def _of_values(grad: Tensor, weight: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    """Gradients of the rows whose slots are ``members``, as in ``segment_sums``, for a contiguous grad."""
    out = grad.new_empty(offsets.shape[0] - 1, grad.shape[1])
    cuda.bag("bag_values", grad, out, _weight(weight), k=weight.shape[1], members=members, offsets=offsets)
    return out


def _of_weight(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    dweight = weight.new_empty(weight.shape, dtype=torch.float32)
    cuda.bag("bag_weights", grad, values.contiguous(), dweight, k=index.shape[1], index=index.contiguous())
    return dweight.to(weight.dtype)


def _weight(weight: Tensor) -> Tensor:
    return weight.float().contiguous()
