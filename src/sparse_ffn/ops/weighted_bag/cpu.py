"""Weighted bag in the CPU core: forward, and a backward that reads each value row once for both gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.ops.weighted_bag.backend import Gradients


def forward(values: Tensor, index: Tensor, weight: Tensor, *, skips: bool = False) -> Tensor:
    """The bags [N, O], in the dtype of values. With ``skips`` rows of weight 0 are not read, whatever lies there."""
    out = cpu.empty(index.shape[0], values.shape[-1], dtype=values.dtype)
    cpu.call("bag_forward", (*_table(values, index, weight), out), int(skips))
    return out


def dot_products(x: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """x[n] · values[index[n, k]] as [N, K], in the dtype of values: what a bag's weights have as their gradient."""
    dots = cpu.empty(*index.shape, dtype=values.dtype).zero_()  # the weights too: they are read, and count for nothing
    cpu.call("bag_backward", (*_table(values, index, dots), x.contiguous(), dots, None))
    return dots


def backward(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, needs_values: bool = True) -> Gradients:
    """Gradients of values and weight."""
    if not needs_values:
        return Gradients(None, dot_products(grad, values, index).to(weight.dtype))
    dvalues = cpu.empty(*values.shape, dtype=values.dtype)
    dweight = cpu.empty(*weight.shape, dtype=values.dtype)
    cpu.call("bag_backward", (*_table(values, index, weight), grad.contiguous(), dweight, dvalues))
    return Gradients(dvalues, dweight.to(weight.dtype))


def values_backward(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Gradient of values alone; only the shape and dtype of ``values`` matter."""
    dvalues = cpu.empty(*values.shape, dtype=values.dtype)
    cpu.call("bag_backward", (*_table(values, index, weight), grad.contiguous(), None, dvalues))
    return dvalues


def backward_rows(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of values that were read [R], ascending, their gradients [R, O], and the gradient of weight."""
    read = torch.zeros(values.shape[0], dtype=torch.bool, device="cpu").index_fill_(0, index.flatten(), True)
    rows = read.nonzero().squeeze(1)
    drows = cpu.empty(rows.shape[0], values.shape[1], dtype=values.dtype)
    dweight = cpu.empty(*weight.shape, dtype=values.dtype)
    cpu.call("bag_backward_sparse", (*_table(values, index, weight), grad.contiguous(), dweight, drows))
    return rows, drows, dweight.to(weight.dtype)


def _table(values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The core's ``sparse_ffn_table``."""
    return values.contiguous(), index.contiguous(), weight.to(values.dtype).contiguous()
