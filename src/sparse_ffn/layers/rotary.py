"""Rotary positions of the heads of attention."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(x: Tensor, share: float) -> Tensor:
    """Rotary positions (2104.09864): turn pairs of the first channels of x [..., T, C] by angles that grow with T."""
    pairs = int(x.shape[-1] * share) // 2
    if not pairs:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = 10_000.0 ** (-torch.arange(pairs, device=x.device, dtype=wide) / pairs)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=wide).unsqueeze(1) * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    both = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(half.to(x.dtype) for half in both), rest], dim=-1)
