"""Product-key top-k in the CPU core: both halves, then the pairs that can be among the k best, in one pass.

The core counts sub-keys in 16 bits; torch's sorts serve beyond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.ops.product_key_topk import torch as sorts
from sparse_ffn.ops.product_key_topk.backend import Best

MOST = 0x7FFF
"""Sub-keys of a half."""


def forward(scores: Tensor, k: int) -> Best:
    """The k largest sums [T, H, k] and the indices of their values, for scores [T, H, 2, n] of at most fp32."""
    if scores.shape[-1] > MOST:
        return sorts.forward(scores, k)
    table = scores.float()
    if table.stride(-1) != 1:
        table = table.contiguous()
    best = cpu.empty(*scores.shape[:2], k, dtype=torch.float32)
    index = cpu.empty(*scores.shape[:2], k, dtype=torch.int64)
    cpu.call("product_key_topk", (table, index, best))
    return Best(best.to(scores.dtype), index)


def backward(grad: Tensor, selected: Tensor, scores_size: Sequence[int], scores_stride: Sequence[int]) -> Tensor:
    """Gradient of the scores [T, H, 2, n], in their strides."""
    if scores_size[-1] > MOST:
        return sorts.backward(grad, selected, scores_size, scores_stride)
    dscores = cpu.empty(math.prod(scores_size), dtype=torch.float32)
    in_place = _writes(scores_size, scores_stride)
    dscores = dscores.as_strided(scores_size, scores_stride) if in_place else dscores.view(scores_size)
    cpu.call("product_key_topk_backward", (grad.float().contiguous(), selected, dscores))
    if in_place and grad.dtype == torch.float32:
        return dscores
    return torch.empty_strided(scores_size, scores_stride, dtype=grad.dtype, device="cpu").copy_(dscores)


def _writes(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the core writes a tensor of these strides: the rows in any order, without gaps between or inside."""
    by_step = sorted((step, n) for step, n in zip(stride, size, strict=True) if n != 1)
    dense = all(step == math.prod(n for _, n in by_step[:i]) for i, (step, _) in enumerate(by_step))
    return dense and (stride[-1] == 1 or size[-1] == 1)
