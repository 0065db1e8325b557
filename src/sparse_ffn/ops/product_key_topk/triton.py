"""Product-key top-k in one kernel for k up to 64 and n below 32768; with torch's own sorts beyond that."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.kernels import product_keys
from sparse_ffn.kernels.launch import on_device, rows
from sparse_ffn.ops.product_key_topk import torch as plain


@on_device
def product_key_topk(first: Tensor, second: Tensor, k: int) -> Tensor:
    """As the reference."""
    n = first.shape[-1]
    if not product_keys.fits(n, k):
        return plain.product_key_topk(first, second, k)
    out = first.new_empty(*first.shape[:-1], k, dtype=torch.int64)
    product_keys.product_keys(rows(first.reshape(-1, n)), rows(second.reshape(-1, n)), k, out)
    return out
