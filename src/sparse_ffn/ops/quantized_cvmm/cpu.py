"""CVMM by quantised rows in the CPU core: few slots read codes alone, many make an expert's numbers once."""

from __future__ import annotations

from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.backends.layout import contiguous, rows
from sparse_ffn.ops.codes import Codes
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.quantized_cvmm.backend import Gradients, backward_of


def forward(x: Tensor, codes: Codes, slots: Slots, down: bool, n_out: int) -> Tensor:
    """The output."""
    out = cpu.empty(n_out, codes.shape[2 if down else 1], dtype=x.dtype)
    scale = None if slots.reduction is None else slots.reduction.float().contiguous()
    indices = (slots.expert.contiguous(), contiguous(slots.gather), contiguous(slots.scatter), scale)
    cpu.call("quantized_cvmm", (rows(x), *codes.in_rows(), *indices, out), int(down))
    return out


def backward(grad: Tensor, x: Tensor, codes: Codes, slots: Slots, down: bool) -> Gradients:
    """The gradients."""
    return backward_of(forward, grad, x, codes, slots, down)
