"""Wide product: the torch.library op, its fake, its autograd, and the choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.library import define, refuse_double_backward, set_autograd
from sparse_ffn.ops.wide_product import cpu, reference


def wide_product(x: Tensor, w: Tensor) -> Tensor:
    """The product of x [B, M, K] with w [B, N, K] transposed: [B, M, N], in fp32 at least.

    The core gains most with bf16, where torch would round its result, or multiply in fp32.
    """
    dtype = torch.promote_types(x.dtype, w.dtype)
    x, w = x.to(dtype), w.to(dtype)
    if not _native(x, w):
        return reference.wide_product(x, w)
    out: Tensor = _forward(x, w)
    return out


def normalised_product(x: Tensor, w: Tensor, pieces: int, norm: str | None) -> Tensor:
    """Pieces, normalised, of x [M, K] times w [N, K] transposed: [M, pieces, N / pieces], in fp32 at least."""
    if not _native(x, w):
        return reference.normalised_product(x, w, pieces, norm)
    if norm is None:
        return wide_product(x.unsqueeze(0), w.unsqueeze(0)).view(x.shape[0], pieces, w.shape[0] // pieces)
    out: Tensor = _normalised(x, w, pieces, norm)[0]
    return out


def _native(x: Tensor, w: Tensor) -> bool:
    return x.dtype == w.dtype and x.dtype in (torch.float32, torch.bfloat16) and choose(x) == "cpu"


def _forward_fake(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], w.shape[1], dtype=torch.float32)


def _backward_fake(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    dx, dw = _backward(grad, *ctx.saved_tensors)
    return dx, dw


_forward = define("wide_product(Tensor x, Tensor w) -> Tensor", cpu.forward, _forward_fake)
_backward = define(
    "wide_product_backward(Tensor grad, Tensor x, Tensor w) -> (Tensor dx, Tensor dw)", cpu.backward, _backward_fake
)
_forward = set_autograd(_forward, _autograd, _setup_context)
_backward = refuse_double_backward(_backward)


def _normalised_fake(x: Tensor, w: Tensor, pieces: int, norm: str) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape[0], pieces, w.shape[0] // pieces, dtype=torch.float32)
    return out, x.new_empty(x.shape[0], pieces, dtype=torch.float32)


def _normalised_backward_fake(
    grad: Tensor, x: Tensor, w: Tensor, out: Tensor, scale: Tensor, norm: str
) -> tuple[Tensor, Tensor]:
    return _backward_fake(grad, x, w)


def _normalised_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, _, ctx.norm = inputs
    ctx.save_for_backward(x, w, *output)
    ctx.mark_non_differentiable(output[1])


def _normalised_autograd(ctx: Any, grad: Tensor, unused: Any) -> tuple[Tensor | None, ...]:
    dx, dw = _normalised_backward(grad, *ctx.saved_tensors, ctx.norm)
    return dx, dw, None, None


_normalised = define(
    "normalised_product(Tensor x, Tensor w, int pieces, str norm) -> (Tensor out, Tensor scale)",
    cpu.normalised_forward,
    _normalised_fake,
)
_normalised_backward = define(
    "normalised_product_backward(Tensor grad, Tensor x, Tensor w, Tensor out, Tensor scale, str norm) "
    "-> (Tensor dx, Tensor dw)",
    cpu.normalised_backward,
    _normalised_backward_fake,
)
_normalised = set_autograd(_normalised, _normalised_autograd, _normalised_setup)
_normalised_backward = refuse_double_backward(_normalised_backward)
