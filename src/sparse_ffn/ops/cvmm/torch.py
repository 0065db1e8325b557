"""CVMM by sorting the rows and one matrix product an expert."""

from __future__ import annotations

from torch import Tensor

from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.library import absent
from sparse_ffn.ops.segments import add_rows, is_transposed, segment_mm, segment_outer, unsort

# S slots (rows), N rows of x, M and L the matrices' sides, E experts; rows are sorted by expert unless named otherwise


def forward(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    reduction: Tensor | None,
    n_out: int,
) -> Tensor:
    """Output [n_out, L]."""
    order, bounds = _sort(expert, weight.shape[0])
    y_SL = segment_mm(x.index_select(0, _rows(gather, order)), weight, bounds)
    if reduction is not None:
        y_SL = y_SL * reduction.index_select(0, order).to(y_SL.dtype).unsqueeze(1)
    return unsort(y_SL, order, n_out) if scatter is None else add_rows(n_out, scatter.index_select(0, order), y_SL)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    reduction: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and reduction (empty if absent)."""
    order, bounds = _sort(expert, weight.shape[0])
    rows = _rows(gather, order)
    x_SM, grad_SL = x.index_select(0, rows), grad.index_select(0, _rows(scatter, order))
    dx_SM = segment_mm(grad_SL, weight.transpose(1, 2), bounds)
    dreduction = absent(x)
    if reduction is not None:
        per_slot = (dx_SM.to(reduction.dtype) * x_SM).sum(1, keepdim=True)
        dreduction = unsort(per_slot, order, len(expert)).squeeze(1)
        factor = reduction.index_select(0, order).to(x.dtype).unsqueeze(1)
        x_SM, dx_SM = x_SM * factor, dx_SM * factor
    dx = unsort(dx_SM, order, len(expert)) if gather is None else add_rows(x.shape[0], rows, dx_SM)
    if is_transposed(weight):
        return dx, segment_outer(grad_SL, x_SM, bounds).transpose(1, 2), dreduction
    return dx, segment_outer(x_SM, grad_SL, bounds), dreduction


def _sort(expert: Tensor, n_experts: int) -> tuple[Tensor, list[int]]:
    """The slots in order, without the void ones, and where each expert's begin."""
    order, offsets = sort_by_expert(expert, n_experts)
    bounds = offsets.tolist()
    return order[: bounds[-1]], bounds


def _rows(index: Tensor | None, order: Tensor) -> Tensor:
    return order if index is None else index.index_select(0, order)
