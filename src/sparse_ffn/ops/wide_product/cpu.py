"""Wide product in the CPU core: low-precision operands are multiplied as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.backends.cpu import NORMS
from sparse_ffn.ops.cvmm import cpu as cvmm
from sparse_ffn.ops.products import product, slow_dtypes


class Normalised(NamedTuple):
    """Normalised pieces [M, pieces, N / pieces], and the factor that each was multiplied by [M, pieces]."""

    out: Tensor
    scale: Tensor


class Gradients(NamedTuple):
    """The gradients."""

    x: Tensor
    w: Tensor | None


def forward(x: Tensor, w: Tensor) -> Tensor:
    """As the reference."""
    return _product(x, w, None, 1)[0]


def normalised_forward(x: Tensor, w: Tensor, pieces: int, norm: str) -> Normalised:
    """As the reference, and the factors."""
    out, scale = _product(x.unsqueeze(0), w.unsqueeze(0), norm, pieces)
    assert scale is not None
    return Normalised(out.view(x.shape[0], pieces, w.shape[0] // pieces), scale.view(x.shape[0], pieces))


def _product(x: Tensor, w: Tensor, norm: str | None, pieces: int) -> tuple[Tensor, Tensor | None]:
    out = cpu.empty(*x.shape[:2], w.shape[1], dtype=torch.float32)
    scale = None if norm is None else cpu.empty(*x.shape[:2], pieces, dtype=torch.float32)
    x = x if x.stride(-1) == 1 else x.contiguous()
    cpu.call("wide_product_forward", (x, w.contiguous(), out, scale), 0 if norm is None else NORMS[norm])
    return out, scale


def backward(grad: Tensor, x: Tensor, w: Tensor, needs_w: bool) -> Gradients:
    """Gradients of x and w. They are rounded to their dtype in any case: so may the factor be."""
    return _gradients(grad.to(x.dtype), x, w, needs_w)


def _gradients(grad: Tensor, x: Tensor, w: Tensor, needs_w: bool) -> Gradients:
    """By torch for 16 bits where the processor has instructions; its sums in fp32 depend on the number of threads."""
    if x.dtype != torch.float32 and x.dtype not in slow_dtypes():
        return Gradients(product(grad, w), product(grad.mT, x) if needs_w else None)
    dx = _product(grad, w.mT, None, 1)[0].to(x.dtype)
    if not needs_w:
        return Gradients(dx, None)
    batch = torch.arange(w.shape[0], device="cpu").repeat_interleave(x.shape[1])
    return Gradients(dx, cvmm.weight_gradient(x.flatten(0, 1), grad.flatten(0, 1), w, batch))


def normalised_backward(
    grad: Tensor, x: Tensor, w: Tensor, out: Tensor, scale: Tensor, needs_w: bool, norm: str
) -> Gradients:
    """Gradients of x and w; grad [M, pieces, width] may be strided."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dproduct = cpu.empty(*out.shape, dtype=x.dtype)
    cpu.call("normalised_backward", (grad, out, scale, dproduct), NORMS[norm])
    dx, dw = _gradients(dproduct.flatten(1).unsqueeze(0), x.unsqueeze(0), w.unsqueeze(0), needs_w)
    return Gradients(dx.squeeze(0), None if dw is None else dw.squeeze(0))
