"""CVMM by quantised rows out of the Triton kernels: few slots each by itself, many in tiles of one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.backends.triton import codes as kernels
from sparse_ffn.backends.triton import combine, config, routing, scattered
from sparse_ffn.backends.triton.decode import use_decode
from sparse_ffn.backends.triton.launch import cdiv, precision, rows
from sparse_ffn.ops.codes import Codes
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.quantized_cvmm.backend import Gradients

# S slots, E experts


@on_device
def forward(x: Tensor, codes: Codes, slots: Slots, down: bool, n_out: int) -> Tensor:
    """The output."""
    expert, gather, scatter, reduction = slots
    (E, G, C), S = codes.shape, expert.shape[0]
    if not use_decode(S, E):
        return _grouped(x, codes, slots, down, n_out)[0]
    y = x.new_empty(S, C if down else G, dtype=x.dtype if scatter is None else torch.float32)
    places = (None if gather is None else gather.contiguous(), expert.contiguous())
    weight = None if reduction is None else reduction.contiguous()
    kernels.multiply_slots(rows(x), *places, codes.in_rows(), down, weight, y)
    if scatter is None:
        return y
    out = x.new_empty(n_out, y.shape[1])
    combine.add_segments(y, *sort_by_expert(scatter, n_out), out)
    return out


@on_device
def backward(grad: Tensor, x: Tensor, codes: Codes, slots: Slots, down: bool) -> Gradients:
    """The gradients: that of x is a product with the same rows, the other way."""
    expert, gather, scatter, reduction = slots
    back = Slots(expert, scatter, gather, reduction)
    return Gradients(*_grouped(grad, codes, back, not down, x.shape[0], None if reduction is None else x))


def _grouped(
    a: Tensor, codes: Codes, slots: Slots, down: bool, n_out: int, partner: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The products, weighted and summed, and before that their dot products with the rows of a partner [n_out, N]."""
    expert, gather, scatter, reduction = slots
    (E, G, C), S, how, a, codes = codes.shape, expert.shape[0], precision(a), rows(a), codes.in_rows()
    kind = "fp32" if a.dtype == torch.float32 and how != "tf32" else "odd"  # codes take the registers, as addresses do
    block_m = config.block_m(a.device, kind, S / max(E, 1))
    block_m = min(block_m, 16) if kind == "fp32" else block_m  # a taller tile spills
    plan = routing.sort_slots(expert, E, 1, block_m, inverse=False)
    width, depth = (C, G) if down else (G, C)
    tile = config.tile(a.device, "one", kind, width, depth, plan.block_m)
    read, weight = scattered.sources(gather, plan.order), None if reduction is None else reduction.contiguous()
    partner, partner_rows = None if partner is None else rows(partner), scattered.sources(scatter, plan.order)
    dots = None if partner is None else a.new_zeros(cdiv(width, tile.n), S, dtype=torch.float32)  # void slots keep 0

    def product(part: slice, y: Tensor) -> None:
        kernels.multiply(
            plan, a, read, codes, down, part, y, tile, how, weight=weight,
            partner=None if partner is None else (partner[:, part], partner_rows),
            dots=None if dots is None else dots[part.start // tile.n :],
        )  # fmt: skip

    out = scattered.sums(a, product, scatter, S, n_out, width, depth, tile.n)
    return out, None if dots is None or reduction is None else dots.sum(0).to(reduction.dtype)
