"""From numbers to codes: groups with a scale, and a zero point if asymmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.ops.codes import Codes, in_groups

CLIPS = {"max": (1.0,), "mse": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
"""Shares of a group's range that a scale may span, the largest first: it wins where errors are equal."""


def quantize(rows: Tensor, bits: int, group: int, symmetric: bool, scale: str) -> Codes:
    """The codes of rows [..., C], C a multiple of ``group``, in fp32 arithmetic.

    Symmetric, s = c·max|w| / (2^(b-1) - 1) and q = round(w/s). Asymmetric, the range from lo = min(0, min w) to
    hi = max(0, max w), times c, has the step s = (hi - lo) / (2^b - 1), z = round(-lo/s) and q = round(w/s) + z. Codes
    are clamped to their bits. s is rounded to the dtype it is stored in, the rows' if that has 16 bits, before its use.
    """
    groups = in_groups(rows.float(), group)
    stored = rows.dtype if rows.dtype.itemsize == 2 else torch.float32
    clips = iter(CLIPS[scale])
    best = _codes(groups, bits, symmetric, next(clips), stored)
    least = _error(groups, *best)
    for clip in clips:
        found = _codes(groups, bits, symmetric, clip, stored)
        error = _error(groups, *found)
        better = error < least
        least = torch.where(better, error, least)
        best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
    step, zero, code = best
    code = code.flatten(-2)
    zero_point = None if symmetric else zero.squeeze(-1).to(torch.uint8)
    if bits == 8:
        return Codes((code if symmetric else code - 128).to(torch.int8), step.squeeze(-1), zero_point)
    half = in_groups((code + 8 if symmetric else code).to(torch.uint8), 2)
    return Codes(half[..., 0] | half[..., 1] << 4, step.squeeze(-1), zero_point)


def _error(groups: Tensor, step: Tensor, zero: Tensor, code: Tensor) -> Tensor:
    return (groups - (code - zero) * step.float()).square().sum(-1, keepdim=True)


def _codes(groups: Tensor, bits: int, symmetric: bool, clip: float, stored: torch.dtype) -> list[Tensor]:
    """Scales [..., n, 1] in the dtype they are stored in, zero points and codes as fp32."""
    if symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        step = (clip * groups.abs().amax(-1, keepdim=True) / high).to(stored)
        zero = torch.zeros_like(step, dtype=torch.float32)
    else:
        low, high = 0, 2**bits - 1
        least = clip * groups.amin(-1, keepdim=True).clamp(max=0)
        step = ((clip * groups.amax(-1, keepdim=True).clamp(min=0) - least) / high).to(stored)
        zero = _divided(-least, step).round().clamp(low, high)
    return [step, zero, (_divided(groups, step).round() + zero).clamp(low, high)]


def _divided(numbers: Tensor, step: Tensor) -> Tensor:
    """0 where the step is 0: of a group of zeros, or of numbers too small for the dtype of the scales."""
    step = step.float()
    return torch.where(step > 0, numbers / step, 0)


def empty(rows: Tensor, bits: int, group: int, symmetric: bool) -> Codes:
    """Codes of the same shapes and dtypes without their numbers: of rows on meta, and to be filled."""
    *lead, columns = rows.shape
    stored = rows.dtype if rows.dtype.itemsize == 2 else torch.float32
    counts = (*lead, columns // group)
    return Codes(
        rows.new_empty((*lead, columns * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8),
        rows.new_empty(counts, dtype=stored),
        None if symmetric else rows.new_empty(counts, dtype=torch.uint8),
    )
