"""Product-key top-k in the native core: both halves and the pairs that can win, in one pass over the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ffn import native
from sparse_ffn.native import ProductKeys


def forward(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest sums [T, H, k] and their value indices, for scores [T, H, 2, n] of at most fp32."""
    table = scores.float()
    if table.stride(3) != 1:
        table = table.contiguous()
    best = native.empty(*scores.shape[:2], k, dtype=torch.float32)
    index = native.empty(*scores.shape[:2], k, dtype=torch.int64)
    native.call("product_key_topk", _arguments(table, k), table.data_ptr(), index.data_ptr(), best.data_ptr())
    return best.to(scores.dtype), index


def backward(grad: Tensor, index: Tensor, n: int, stride: Sequence[int]) -> Tensor:
    """Gradient of the scores [T, H, 2, n], in their strides."""
    n_tokens, n_heads, k = grad.shape
    total, shape = grad.float().contiguous(), (n_tokens, n_heads, 2, n)
    dscores = native.empty(math.prod(shape), dtype=torch.float32).as_strided(shape, stride)
    native.call(
        "product_key_topk_backward",
        *(_arguments(dscores, k), total.data_ptr(), index.data_ptr(), dscores.data_ptr()),
    )
    return dscores.to(grad.dtype)


def _arguments(scores: Tensor, k: int) -> ProductKeys:
    n_tokens, n_heads, _, n = scores.shape
    return ProductKeys(n_tokens, n_heads, n, k, *scores.stride()[:3], torch.get_num_threads(), 0)
