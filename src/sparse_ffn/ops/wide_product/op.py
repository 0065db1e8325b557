"""Wide product, with and without norms: the operators, which only the CPU core has."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.operator import Operator
from sparse_ffn.ops.wide_product import cpu, reference


def wide_product(x: Tensor, w: Tensor) -> Tensor:
    """The product of x [B, M, K] with w [B, N, K] transposed: [B, M, N], in fp32 at least.

    The core gains most with bf16, where torch would round its result, or multiply in fp32.
    """
    dtype = torch.promote_types(x.dtype, w.dtype)
    x, w = x.to(dtype), w.to(dtype)
    if not _computed_by_core(x, w):
        return reference.wide_product(x, w)
    out: Tensor = _op.forward(x, w)
    return out


def normalised_product(x: Tensor, w: Tensor, pieces: int, norm: str | None) -> Tensor:
    """Pieces, normalised, of x [M, K] times w [N, K] transposed: [M, pieces, N / pieces], in fp32 at least."""
    if not _computed_by_core(x, w):
        return reference.normalised_product(x, w, pieces, norm)
    if norm is None:
        return wide_product(x.unsqueeze(0), w.unsqueeze(0)).view(x.shape[0], pieces, w.shape[0] // pieces)
    out: Tensor = _normalised.forward(x, w, pieces, norm)[0]
    return out


def _computed_by_core(x: Tensor, w: Tensor) -> bool:
    return x.dtype == w.dtype and x.dtype in (torch.float32, torch.bfloat16) and choose(x) == "cpu"


def _shapes(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], w.shape[1], dtype=torch.float32)


def _normalised_shapes(x: Tensor, w: Tensor, pieces: int, norm: str) -> cpu.Normalised:
    out = x.new_empty(x.shape[0], pieces, w.shape[0] // pieces, dtype=torch.float32)
    return cpu.Normalised(out, x.new_empty(x.shape[0], pieces, dtype=torch.float32))


_op = Operator("wide_product", cpu, _shapes)
_normalised = Operator(
    "normalised_product",
    SimpleNamespace(forward=cpu.normalised_forward, backward=cpu.normalised_backward),
    _normalised_shapes,
)
