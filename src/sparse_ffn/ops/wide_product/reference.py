"""Wide product, the contract: torch's product of the widened operands."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def wide_product(x: Tensor, w: Tensor) -> Tensor:
    """The product of x [B, M, K] with w [B, N, K] transposed: [B, M, N], in fp32 at least."""
    wide = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    return torch.bmm(x.to(wide), w.to(wide).transpose(1, 2))


def normalise(x: Tensor, norm: str | None) -> Tensor:
    """The rows of x without a learned scale, in fp32 at least: ``"layer"``, ``"rms"`` or as they are."""
    if norm is None:
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(x, x.shape[-1:]) if norm == "layer" else F.rms_norm(x, x.shape[-1:], eps=1e-5)


def normalised_product(x: Tensor, w: Tensor, pieces: int, norm: str | None) -> Tensor:
    """Pieces, normalised, of x [M, K] times w [N, K] transposed: [M, pieces, N / pieces], in fp32 at least."""
    product = wide_product(x.unsqueeze(0), w.unsqueeze(0)).squeeze(0)
    return normalise(product.view(product.shape[0], pieces, w.shape[0] // pieces), norm)
