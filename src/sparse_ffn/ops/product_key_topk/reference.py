"""Product-key top-k, the contract: top-k of each half, then of the pairs that can win."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_ffn.ops.select import stable_topk


def candidate_pairs(n: int, k: int) -> list[tuple[int, int]]:
    """Pairs (i, j) of positions in the two sorted halves that can be among the k largest sums, row by row.

    The pairs (i', j') with i' <= i and j' <= j have sums at least as large and come first among equals; there are
    (i + 1)·(j + 1) of them with (i, j) itself, so more than k rule the pair out.
    """
    width = min(n, k)
    return [(i, j) for i in range(width) for j in range(min(width, k // (i + 1)))]


def product_key_topk(
    first: Tensor, second: Tensor, k: int, topk: Callable[[Tensor, int], Tensor] = stable_topk
) -> Tensor:
    """Value indices i_first·n + i_second of the k largest sums first[i_first] + second[i_second], largest first.

    Shapes: first and second [..., n], 1 <= k <= n² -> int64 [..., k]. Ties go to the lower position in the sorted
    k x k candidate list, whose rows are the first half's. ``topk`` is how
    a row's largest entries are found.
    """
    n = first.shape[-1]
    top_first, top_second = topk(first, min(n, k)), topk(second, min(n, k))
    row, column = torch.tensor(candidate_pairs(n, k), device=first.device).unbind(1)
    pair_first, pair_second = top_first[..., row], top_second[..., column]
    sums = first.gather(-1, pair_first) + second.gather(-1, pair_second)
    best = topk(sums, k)
    return pair_first.gather(-1, best) * n + pair_second.gather(-1, best)


def sums(first: Tensor, second: Tensor, index: Tensor) -> Tensor:
    """The sums that value indices stand for."""
    n = first.shape[-1]
    return first.gather(-1, index // n) + second.gather(-1, index % n)
