"""Wide product, the contract: torch's product of the widened operands."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_product(x: Tensor, w: Tensor) -> Tensor:
    """The product of x [B, M, K] with w [B, N, K] transposed: [B, M, N], in fp32 at least."""
    wide = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    return torch.bmm(x.to(wide), w.to(wide).transpose(1, 2))
