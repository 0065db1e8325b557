"""CVMM in the CUDA kernels of csrc/cuda; weights in another dtype than x are cast in each pass, no copy is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import cuda
from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.layout import rows
from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.cvmm.backend import Gradients, Slots
from sparse_ffn.ops.segments import is_transposed, unsort

# S slots, N rows of x, M and L the matrices' sides, E experts


@on_device
def forward(x: Tensor, weight: Tensor, slots: Slots, n_out: int) -> Tensor:
    """The output."""
    weight, (expert, gather, scatter, reduction) = _matrices(weight, x), slots
    order, offsets = sort_by_expert(expert, weight.shape[0])
    sources, targets, scale = _rows(gather, order), _rows(scatter, order), _scale(reduction, order)
    out = x.new_zeros(n_out, weight.shape[2])  # nothing writes the rows of void slots
    if scatter is None:
        cuda.multiply("product_rows", rows(x), out, weight, offsets, sources, targets, scale)
        return out
    of_slots = x.new_empty(order.shape[0], weight.shape[2])
    cuda.multiply("product_rows", rows(x), of_slots, weight, offsets, sources, None, None)
    _add_up(of_slots, _void_last(targets, offsets, n_out), scale, out)
    return out


@on_device
def backward(grad: Tensor, x: Tensor, weight: Tensor, slots: Slots, needs_weight: bool) -> Gradients:
    """The gradients."""
    dtype, weight, (expert, gather, scatter, reduction) = weight.dtype, _matrices(weight, x), slots
    order, offsets = sort_by_expert(expert, weight.shape[0])
    sources, targets, scale = _rows(gather, order), _rows(scatter, order), _scale(reduction, order)
    x, grad, to_x = rows(x), rows(grad), weight.transpose(1, 2)
    dx, dscale = x.new_zeros(x.shape), None
    if gather is None and reduction is None:  # every row of x has one slot
        cuda.multiply("product_rows", grad, dx, to_x, offsets, targets, sources, None)
    else:
        of_slots, sources_or_void = x.new_empty(order.shape[0], x.shape[1]), _void_last(sources, offsets, x.shape[0])
        cuda.multiply("product_rows", grad, of_slots, to_x, offsets, targets, None, None)
        _add_up(of_slots, sources_or_void, scale, dx)
        if scale is not None:
            dscale = torch.empty_like(scale.unsqueeze(1))
            cuda.bag("bag_weights", of_slots, x.contiguous(), dscale, index=sources_or_void.unsqueeze(1))
    dweight, dreduction = None, None
    if needs_weight:
        dweight = x.new_empty(weight.shape)
        cuda.multiply("product_matrices", x, grad, dweight, offsets, sources, targets, scale)
        dweight = dweight.to(dtype)
        if is_transposed(weight):
            dweight = dweight.transpose(1, 2).contiguous().transpose(1, 2)
    if reduction is not None and dscale is not None:
        dreduction = unsort(dscale, order).squeeze(1).to(reduction.dtype)
    return Gradients(dx, dweight, dreduction)


def _matrices(weight: Tensor, x: Tensor) -> Tensor:
    """The matrices in x's dtype, with one unit stride."""
    weight = weight.to(x.dtype)
    return weight if weight.stride(1) == 1 or weight.stride(2) == 1 else weight.contiguous()


def _add_up(of_slots: Tensor, row: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Write into each row of out the sum of its slots' rows, times their scale, in the order of the slots."""
    members, bounds = sort_by_expert(row, out.shape[0])
    weight = None if scale is None else scale.unsqueeze(1)
    cuda.bag("bag_values", of_slots, out, weight, members=members, offsets=bounds)


def _rows(index: Tensor | None, order: Tensor) -> Tensor:
    """The row that each sorted slot reads or writes: int64 [S]."""
    return order.long() if index is None else index.index_select(0, order)


def _void_last(rows: Tensor, offsets: Tensor, n: int) -> Tensor:
    """The rows of sorted slots, n of void ones."""
    return rows.where(torch.arange(rows.shape[0], device=rows.device) < offsets[-1], n)


def _scale(reduction: Tensor | None, order: Tensor) -> Tensor | None:
    return None if reduction is None else reduction.index_select(0, order).float()
