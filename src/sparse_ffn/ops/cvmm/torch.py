"""CVMM by sorting the rows and one matrix product an expert."""

from __future__ import annotations

from torch import Tensor

from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.cvmm.backend import Gradients, Slots
from sparse_ffn.ops.segments import Segments, add_rows, is_transposed, row_dots, segment_mm, segment_outer, unsort

# S slots (rows), N rows of x, M and L the matrices' sides, E experts; rows are sorted by expert unless named otherwise


def forward(x: Tensor, weight: Tensor, slots: Slots, n_out: int) -> Tensor:
    """The output."""
    expert, gather, scatter, reduction = slots
    order, offsets = sort_by_expert(expert, weight.shape[0])
    segments = Segments(offsets)
    y_SL = segment_mm(x.index_select(0, _rows(gather, order)), weight, segments)
    if reduction is not None:
        y_SL = segments.clear(y_SL * reduction.index_select(0, order).to(y_SL.dtype).unsqueeze(1))
    return unsort(y_SL, order) if scatter is None else add_rows(n_out, scatter.index_select(0, order), y_SL)


def backward(grad: Tensor, x: Tensor, weight: Tensor, slots: Slots, needs_weight: bool) -> Gradients:
    """The gradients."""
    expert, gather, scatter, reduction = slots
    order, offsets = sort_by_expert(expert, weight.shape[0])
    segments = Segments(offsets)
    rows = _rows(gather, order)
    x_SM, grad_SL = x.index_select(0, rows), grad.index_select(0, _rows(scatter, order))
    dx_SM = segment_mm(grad_SL, weight.transpose(1, 2), segments)
    dreduction = None
    if reduction is not None:
        dreduction = unsort(segments.clear(row_dots(dx_SM, x_SM, reduction.dtype)), order).squeeze(1)
        factor = reduction.index_select(0, order).to(x.dtype).unsqueeze(1)
        dx_SM = segments.clear(dx_SM * factor)
        grad_SL = grad_SL * factor  # and not x: a loss scale keeps gradients above fp16's smallest numbers
    dx = unsort(dx_SM, order) if gather is None else add_rows(x.shape[0], rows, dx_SM)
    if not needs_weight:
        return Gradients(dx, None, dreduction)
    if is_transposed(weight):
        return Gradients(dx, segment_outer(grad_SL, x_SM, segments).transpose(1, 2), dreduction)
    return Gradients(dx, segment_outer(x_SM, grad_SL, segments), dreduction)


def _rows(index: Tensor | None, order: Tensor) -> Tensor:
    return order if index is None else index.index_select(0, order)
