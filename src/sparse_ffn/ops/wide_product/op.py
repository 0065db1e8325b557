"""Wide product: the torch.library op, its fake, its autograd, and the choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backend import choose
from sparse_ffn.ops.library import define, refuse_double_backward, set_autograd
from sparse_ffn.ops.wide_product import cpu as native
from sparse_ffn.ops.wide_product.reference import wide_product as reference


def wide_product(x: Tensor, w: Tensor) -> Tensor:
    """The product of x [B, M, K] with w [B, N, K] transposed: [B, M, N], in fp32 at least.

    The core gains most with bf16, where torch would round its result, or multiply in fp32.
    """
    if x.dtype == w.dtype and x.dtype in _NATIVE and choose(x) == "cpu":
        out: Tensor = _forward(x, w)
        return out
    return reference(x, w)


_NATIVE = (torch.float32, torch.bfloat16)


def _forward_fake(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], w.shape[1], dtype=torch.float32)


def _backward_fake(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    dx, dw = _backward(grad, *ctx.saved_tensors)
    return dx, dw


_forward = define("wide_product(Tensor x, Tensor w) -> Tensor", native.forward, _forward_fake)
_backward = define(
    "wide_product_backward(Tensor grad, Tensor x, Tensor w) -> (Tensor dx, Tensor dw)", native.backward, _backward_fake
)
_forward = set_autograd(_forward, _autograd, _setup_context)
refuse_double_backward(_backward)
