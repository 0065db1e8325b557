"""Weighted bag out of the Triton kernels: values and weights get their gradients in one pass over the rows read."""

from __future__ import annotations

from torch import Tensor

from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.triton import bag, config, segments
from sparse_ffn.backends.triton.launch import rows
from sparse_ffn.ops.weighted_bag.backend import Gradients


@on_device
def forward(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The bags [N, O], in the dtype of values; they are summed in fp32."""
    out = values.new_empty(index.shape[0], values.shape[1])
    bag.bag(rows(values), index.contiguous(), weight.contiguous(), out)
    return out


@on_device
def backward(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, needs_values: bool = True) -> Gradients:
    """Gradients of values (zero where no bag reads) and weight."""
    if not needs_values:
        return Gradients(None, bag.dot_products(rows(grad), rows(values), index.contiguous()).to(weight.dtype))
    dvalues = values.new_empty(values.shape)
    groups = segments.every_row(index, values.shape[0], config.BAG.cap)
    dots = bag.bag_gradient(groups, rows(grad), weight.contiguous(), dvalues, rows(values))
    assert dots is not None
    return Gradients(dvalues, dots.to(weight.dtype))


@on_device
def backward_rows(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of values that were read [R], ascending, their gradients [R, O], and the gradient of weight.

    Waits for the device once, to learn R: a sparse tensor has that size.
    """
    groups, named = segments.named_rows(index, values.shape[0], config.BAG.cap)
    drows = values.new_empty(named.shape[0], values.shape[1])
    dots = bag.bag_gradient(groups, rows(grad), weight.contiguous(), drows, rows(values), named)
    assert dots is not None
    return named, drows, dots.to(weight.dtype)
