"""Product-key top-k in one kernel for k up to 64 and n below 32768; with torch's own sorts beyond that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.triton import product_keys
from sparse_ffn.backends.triton.launch import rows
from sparse_ffn.ops.product_key_topk import reference
from sparse_ffn.ops.product_key_topk.backend import Best


def forward(scores: Tensor, k: int) -> Best:
    """The k largest sums [T, H, k] of scores [T, H, 2, n], and the indices of their values."""
    first, second = scores.unbind(2)
    index = product_key_topk(first, second, k)
    return Best(reference.sums(first, second, index), index)


@on_device
def product_key_topk(first: Tensor, second: Tensor, k: int) -> Tensor:
    """The indices, as the reference gives them."""
    n = first.shape[-1]
    if not product_keys.fits(n, k):
        return reference.product_key_topk(first, second, k)
    out = first.new_empty(*first.shape[:-1], k, dtype=torch.int64)
    product_keys.product_keys(rows(first.reshape(-1, n)), rows(second.reshape(-1, n)), k, out)
    return out


@on_device
def backward(grad: Tensor, selected: Tensor, scores_size: Sequence[int], scores_stride: Sequence[int]) -> Tensor:
    """Gradient of the scores [T, H, 2, n], in their strides; no atomics, so runs are bit-equal."""
    dscores = torch.empty_strided(scores_size, scores_stride, dtype=grad.dtype, device=grad.device).zero_()
    product_keys.product_keys_gradient(grad.contiguous(), selected.contiguous(), dscores)
    return dscores
