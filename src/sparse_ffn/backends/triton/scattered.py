"""Products of gathered rows, and their sums over the rows that they are scattered to, in the order of the slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.backends.triton import columns, combine


def sources(index: Tensor | None, order: Tensor) -> Tensor:
    """The row that each position reads: int32 [S]."""
    return order if index is None else index.index_select(0, order).to(torch.int32)


def sums(
    like: Tensor,
    product: Callable[[slice, Tensor], None],
    target: Tensor | None,
    S: int,
    n: int,
    width: int,
    depth: int,
    step: int,
) -> Tensor:
    """out[target[s]] += y[s] into n rows; ``product`` writes columns of y [S, width]. No target: y itself.

    ``depth`` is how many numbers of a row are multiplied, ``step`` the columns of a tile.
    """
    if target is None:
        out = like.new_empty(S, width)
        product(slice(0, width), out)
        return out
    members, offsets = sort_by_expert(target, n)
    out = like.new_empty(n, width)
    for part, y in columns.blocks(like, S, width, columns.width(like, S, width, depth, step)):
        product(part, y)
        combine.add_segments(y, members, offsets, out[:, part])
    return out
