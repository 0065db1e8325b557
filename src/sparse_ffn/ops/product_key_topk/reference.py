"""Product-key top-k, the contract: top-k of each half, then of the pairs that can be among the k best."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_ffn.ops.select import stable_topk


def candidate_pairs(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All i and all j of the pairs of positions in the sorted halves that can be among the k largest sums, row by row.

    The pairs (i', j') with i' <= i and j' <= j have sums at least as large and come first among equals; there are
    (i + 1)·(j + 1) of them with (i, j) itself, so more than k rule the pair out. Computed on the device: a copy of the
    host's numbers would wait for it.
    """
    width = min(n, k)
    n_pairs = sum(min(width, k // (i + 1)) for i in range(width))
    lengths = (k // torch.arange(1, width + 1, device=device)).clamp(max=width)
    ends, pair = lengths.cumsum(0), torch.arange(n_pairs, device=device)
    i = torch.searchsorted(ends, pair, right=True)
    return i, pair - (ends - lengths)[i]


def product_key_topk(
    first: Tensor, second: Tensor, k: int, topk: Callable[[Tensor, int], Tensor] = stable_topk
) -> Tensor:
    """Value indices i_first·n + i_second of the k largest sums first[i_first] + second[i_second], largest first.

    Shapes: first and second [..., n], 1 <= k <= n² -> int64 [..., k]. Sums are ranked in fp32 at least. Ties go to the
    lower position in the sorted k x k candidate list, whose rows are the first half's. ``topk`` is how a row's largest
    entries are found. What is missed are sums of infinity and -infinity, NaNs that rank above the infinity selected.
    """
    n = first.shape[-1]
    top_first, top_second = topk(first, min(n, k)), topk(second, min(n, k))
    row, column = candidate_pairs(n, k, first.device)
    pair_first, pair_second = top_first[..., row], top_second[..., column]
    wide = torch.promote_types(first.dtype, torch.float32)
    sums = first.gather(-1, pair_first).to(wide) + second.gather(-1, pair_second).to(wide)
    best = topk(sums, k)
    return pair_first.gather(-1, best) * n + pair_second.gather(-1, best)


def sums(first: Tensor, second: Tensor, index: Tensor) -> Tensor:
    """The sums whose indices are given."""
    n = first.shape[-1]
    return first.gather(-1, index // n) + second.gather(-1, index % n)
