"""Product-key top-k in the native core: both halves and the pairs that can win, in one pass over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn import native


def product_key_topk(first: Tensor, second: Tensor, k: int) -> Tensor:
    """As the reference, for scores of at most fp32."""
    n = first.shape[-1]
    tables = [t.float().contiguous() for t in (first, second)]
    index = torch.empty(*first.shape[:-1], k, dtype=torch.int64)
    native.call(
        "product_key_topk",
        *(t.data_ptr() for t in tables),
        *(index.numel() // k, n, k, torch.get_num_threads()),
        *(index.data_ptr(), None),
    )
    return index
