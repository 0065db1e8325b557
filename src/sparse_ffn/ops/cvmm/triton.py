"""CVMM out of the Triton kernels: rows are gathered inside the product, sums over scattered rows keep their order."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.triton import config, grouped, outer, routing, scattered
from sparse_ffn.backends.triton.launch import cdiv, matrices, precision, rows
from sparse_ffn.ops.cvmm.backend import Gradients, Slots
from sparse_ffn.ops.segments import is_transposed

# S slots, N rows of x, M and L the matrices' sides, E experts


@on_device
def forward(x: Tensor, weight: Tensor, slots: Slots, n_out: int) -> Tensor:
    """The output."""
    expert, gather, scatter, reduction = slots
    (E, M, L), S, how, x = weight.shape, expert.shape[0], precision(x), rows(x)
    kind = config.arithmetic(x.dtype, how, x, weight)
    plan = routing.sort_slots(expert, E, 1, config.block_m(x.device, kind, S / max(E, 1)), inverse=False)
    tile = config.tile(x.device, "one", kind, L, M, plan.block_m, alone=True)
    b, sources = matrices(weight, x.dtype), scattered.sources(gather, plan.order)
    scale = None if reduction is None else reduction.contiguous()

    def product(part: slice, y: Tensor) -> None:
        grouped.multiply(plan, x, b[:, :, part], y, tile, how, rows=sources, scale=scale, unsort=True)

    return scattered.sums(x, product, scatter, S, n_out, L, M, tile.n)


@on_device
def backward(grad: Tensor, x: Tensor, weight: Tensor, slots: Slots, needs_weight: bool) -> Gradients:
    """The gradients."""
    expert, gather, scatter, reduction = slots
    (E, M, L), S, how, x, grad = weight.shape, expert.shape[0], precision(x), rows(x), rows(grad)
    kind = config.arithmetic(x.dtype, how, x, grad, weight)
    mean = S / max(E, 1)
    plan = routing.sort_slots(expert, E, 1, config.block_m(x.device, kind, mean), inverse=False)
    x_rows, grad_rows = scattered.sources(gather, plan.order), scattered.sources(scatter, plan.order)
    scale = None if reduction is None else reduction.contiguous()

    tile = config.tile(x.device, "one", kind, M, L, plan.block_m, alone=reduction is None)
    dots = None if scale is None else x.new_zeros(cdiv(M, tile.n), S, dtype=torch.float32)
    b = matrices(weight, x.dtype).transpose(1, 2)

    def product(part: slice, y: Tensor) -> None:
        grouped.multiply(
            plan, grad, b[:, :, part], y, tile, how, rows=grad_rows, scale=scale, unsort=True,
            partner=None if scale is None else (x[:, part], x_rows),
            dots=None if dots is None else dots[part.start // tile.n :],
        )  # fmt: skip

    dx = scattered.sums(x, product, gather, S, x.shape[0], M, L, tile.n)
    dreduction = None if reduction is None or dots is None else dots.sum(0).to(reduction.dtype)
    if not needs_weight:
        return Gradients(dx, None, dreduction)
    if is_transposed(weight):
        dweight = weight.new_empty(E, L, M)
        outer.outer(
            grad, x, plan.offsets, plan.order, dweight, config.tile(x.device, "outer", kind, M, mean, side=L), how,
            left_rows=grad_rows, right_rows=x_rows, scale=scale,
        )  # fmt: skip
        dweight = dweight.transpose(1, 2)
    else:
        dweight = weight.new_empty(E, M, L)
        outer.outer(
            x, grad, plan.offsets, plan.order, dweight, config.tile(x.device, "outer", kind, L, mean, side=M), how,
            left_rows=x_rows, right_rows=grad_rows, scale=scale,
        )  # fmt: skip
    return Gradients(dx, dweight, dreduction)
