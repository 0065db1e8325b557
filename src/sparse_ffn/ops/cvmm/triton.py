"""CVMM out of the Triton kernels: rows are gathered inside the product, sums over scattered rows keep their order."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.kernels import combine, config, grouped, outer, routing
from sparse_ffn.kernels.launch import cdiv, matrices, on_device, precision, rows
from sparse_ffn.ops.library import absent
from sparse_ffn.ops.segments import is_transposed, sort_by_expert

# S slots, N rows of x, M and L the matrices' sides, E experts


@on_device
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
    (E, _, L), S, how = weight.shape, expert.shape[0], precision(x)
    kind = config.arithmetic(x.dtype, how, *weight.shape[1:])
    order, offsets = routing.sort_slots(expert, E)
    plan = routing.plan(order, offsets, 1, config.block_m(x.device, kind, S / E), inverse=False)
    y_SL = x.new_empty(S, L)
    tile = config.tile(x.device, "one", kind, L, plan.block_m)
    scale = None if reduction is None else reduction.contiguous()
    grouped.multiply(
        plan, rows(x), matrices(weight), y_SL, tile, how, rows=_rows(gather, order), scale=scale, unsort=True
    )
    return y_SL if scatter is None else _add(y_SL, scatter, n_out)


@on_device
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
    (E, M, L), S, how, x, grad = weight.shape, expert.shape[0], precision(x), rows(x), rows(grad)
    kind = config.arithmetic(x.dtype, how, *weight.shape[1:])
    order, offsets = routing.sort_slots(expert, E)
    plan = routing.plan(order, offsets, 1, config.block_m(x.device, kind, S / E), inverse=False)
    x_rows, grad_rows = _rows(gather, order), _rows(scatter, order)
    scale = None if reduction is None else reduction.contiguous()

    dx_SM = x.new_empty(S, M)
    tile = config.tile(x.device, "one", kind, M, plan.block_m)
    dots = None if scale is None else x.new_empty(cdiv(M, tile.n), S, dtype=torch.float32)
    grouped.multiply(
        plan, grad, matrices(weight).transpose(1, 2), dx_SM, tile, how, rows=grad_rows, scale=scale,
        partner=None if scale is None else (x, x_rows), dots=dots, unsort=True,
    )  # fmt: skip
    dreduction = absent(x) if reduction is None or dots is None else dots.sum(0).to(reduction.dtype)
    if is_transposed(weight):
        dweight = x.new_empty(E, L, M)
        outer.outer(
            grad, x, offsets, order, dweight, config.tile(x.device, "outer", kind, M, side=L), how,
            left_rows=grad_rows, right_rows=x_rows, scale=scale,
        )  # fmt: skip
        dweight = dweight.transpose(1, 2)
    else:
        dweight = x.new_empty(E, M, L)
        outer.outer(
            x, grad, offsets, order, dweight, config.tile(x.device, "outer", kind, L, side=M), how,
            left_rows=x_rows, right_rows=grad_rows, scale=scale,
        )  # fmt: skip
    return dx_SM if gather is None else _add(dx_SM, gather, x.shape[0]), dweight, dreduction


def _rows(index: Tensor | None, order: Tensor) -> Tensor:
    """The row that each position reads: int32 [S]."""
    return order if index is None else index.index_select(0, order).to(torch.int32)


def _add(y: Tensor, target: Tensor, n: int) -> Tensor:
    """out[target[s]] += y[s] into n rows, in the order of the slots."""
    members, offsets = sort_by_expert(target, n)
    out = y.new_empty(n, y.shape[1])
    combine.add_segments(y, members, offsets, out)
    return out
