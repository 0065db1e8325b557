"""Weighted bag by torch's embedding bag, or on a CPU by one matrix product where the table is small.

On a GPU the product's matrix would be made by float atomics, since a bag may name a row several times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.ops.weighted_bag import reference
from sparse_ffn.ops.weighted_bag.backend import Gradients

# A gathered row is read at memory speed, a matrix product runs at arithmetic speed: the product over the whole table
# is faster on a CPU while the table has at most about this many times the rows of a bag.
DENSE_UP_TO = 12
_SUM = 0  # embedding bag's mode
_aten = torch.ops.aten


def forward(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The bags [N, O], in the dtype of values."""
    if _dense(values, index):
        return reference.weighted_bag(values, index, weight)
    flat, offsets, flat_weight = _flat(values, index, weight)
    out: Tensor = _aten._embedding_bag_forward_only(values, flat, offsets, False, _SUM, False, flat_weight)[0]
    return out


def backward(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, needs_values: bool = True) -> Gradients:
    """Gradients of values and weight."""
    n, k = index.shape
    if _dense(values, index):
        dweight = (grad @ values.t()).gather(1, index).to(weight.dtype)
        if not needs_values:
            return Gradients(None, dweight)
        small = weight.to(values.dtype)
        return Gradients(small.new_zeros(n, values.shape[0]).scatter_add(1, index, small).t() @ grad, dweight)
    grad = grad.contiguous()  # embedding bag reads past the strides of a view
    flat, offsets, flat_weight = _flat(values, index, weight)
    bag = torch.arange(n, device=index.device).repeat_interleave(k)
    dweight = _aten._embedding_bag_per_sample_weights_backward(grad, values, flat, offsets, bag, _SUM)
    dweight = dweight.view(n, k).to(weight.dtype)
    if not needs_values:
        return Gradients(None, dweight)
    size = torch.full_like(offsets, k)
    if values.is_cpu:  # there rows are added in the dtype of the gradient: in bf16 a sum of ones ends at 256
        wide = torch.promote_types(values.dtype, torch.float32)
        grad, flat_weight = grad.to(wide), flat_weight.to(wide)
    dvalues: Tensor = _aten._embedding_bag_dense_backward(
        grad, flat, bag, size, offsets.new_empty(0), values.shape[0], False, _SUM, flat_weight
    )
    return Gradients(dvalues.to(values.dtype), dweight)


def backward_rows(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of values that were read [R], ascending, their gradients [R, O], and the gradient of weight."""
    rows, compact = torch.unique(index, return_inverse=True)
    drows, dweight = backward(grad, values[rows], compact, weight)
    assert drows is not None
    return rows, drows, dweight


def _dense(values: Tensor, index: Tensor) -> bool:
    small = values.device.type == "cpu" and values.shape[0] <= DENSE_UP_TO * index.shape[1]
    return small or index.numel() == 0 or values.shape[1] == 0


def _flat(values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index, where each bag begins, and weight, as embedding bag wants them: it reads past the strides of a view."""
    offsets = torch.arange(index.shape[0], device=index.device) * index.shape[1]
    return index.reshape(-1).contiguous(), offsets, weight.reshape(-1).to(values.dtype).contiguous()
