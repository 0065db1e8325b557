"""Product-key top-k with a top-k that may look at the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ffn.ops.product_key_topk import reference
from sparse_ffn.ops.product_key_topk.backend import Best
from sparse_ffn.ops.select import eager_stable_topk

# T tokens, H heads, S the two halves, N sub-keys, K selected


def forward(scores: Tensor, k: int) -> Best:
    """The k largest sums [T, H, K] of scores [T, H, S, N], and the indices of their values."""
    first, second = scores.unbind(2)
    index = reference.product_key_topk(first, second, k, eager_stable_topk)
    return Best(reference.sums(first, second, index), index)


def backward(grad: Tensor, selected: Tensor, scores_size: Sequence[int], scores_stride: Sequence[int]) -> Tensor:
    """Gradient of the scores [T, H, S, N], in their strides."""
    dscores = torch.empty_strided(scores_size, scores_stride, dtype=grad.dtype, device=grad.device).zero_()
    n = scores_size[-1]
    if grad.device.type == "cpu":
        first, second = dscores.unbind(2)
        first.scatter_add_(-1, selected // n, grad)
        second.scatter_add_(-1, selected % n, grad)
        return dscores
    # scatter_add_ would use float atomics; this sorts
    T, H, S = (torch.arange(size, device=grad.device) for size in scores_size[:3])
    place = (T.view(-1, 1, 1, 1), H.view(-1, 1, 1), S.view(-1, 1), torch.stack((selected // n, selected % n), 2))
    return dscores.index_put_(place, grad.unsqueeze(2).expand(-1, -1, 2, -1), accumulate=True)
