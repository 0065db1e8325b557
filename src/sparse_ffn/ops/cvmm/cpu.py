"""CVMM in the CPU core."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.backends.layout import contiguous, rows
from sparse_ffn.ops.cvmm.backend import Gradients, Slots
from sparse_ffn.ops.segments import is_transposed


def forward(x: Tensor, weight: Tensor, slots: Slots, n_out: int) -> Tensor:
    """The output."""
    out = cpu.empty(n_out, weight.shape[-1], dtype=x.dtype)
    cpu.call("cvmm_forward", (*_arguments(x, weight, slots), out))
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor, slots: Slots, needs_weight: bool) -> Gradients:
    """The gradients."""
    dx = cpu.empty(*x.shape, dtype=x.dtype)
    dweight, transposed, reduction = None, is_transposed(weight), slots.reduction
    if needs_weight:
        dweight = cpu.empty(*(weight.mT if transposed else weight).shape, dtype=x.dtype)
        dweight = dweight.mT if transposed else dweight
    dreduction = None if reduction is None else cpu.empty(*reduction.shape, dtype=torch.float32)
    cpu.call("cvmm_backward", (*_arguments(x, weight, slots), rows(grad), dx, dweight, dreduction))
    return Gradients(dx, dweight, None if reduction is None or dreduction is None else dreduction.to(reduction.dtype))


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """Gradient of weight alone, of which only the shape matters."""
    dweight = cpu.empty(*weight.shape, dtype=x.dtype)
    cpu.call("cvmm_backward", (*_arguments(x, weight, Slots(expert)), rows(grad), None, dweight, None))
    return dweight


def _arguments(x: Tensor, weight: Tensor, slots: Slots) -> tuple[Tensor | None, ...]:
    """What forward and backward pass begin with."""
    if weight.stride(1) != 1 and weight.stride(2) != 1:
        weight = weight.contiguous()
    expert, gather, scatter, reduction = slots
    scale = None if reduction is None else reduction.float().contiguous()
    return rows(x), weight, expert.contiguous(), contiguous(gather), contiguous(scatter), scale
