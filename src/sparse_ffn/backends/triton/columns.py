"""Products with one row a slot, some columns at a time where that keeps the rows in the cache for the kernel after.

What a token's slots add up to is summed column by column, so blocks of columns need no sort of their own and change no
result. The price: what is multiplied is read again for every block, and each block takes launches of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_ffn.backends.triton.launch import cdiv

STEP = 128  # columns of a wide tile
SHARE = 2 / 3  # of the second-level cache that a block may fill; a guess, not measured
DEEP = 256  # numbers of a row that is multiplied from which on the arithmetic hides what it writes: an H100's ridge
MAX_BYTES = 512 << 20  # of a block that need not stay in the cache: memory that the rest of the model then lacks


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Of a device's second-level cache; an A100's where there is none to ask."""
    return 40 << 20 if device.type != "cuda" else torch.cuda.get_device_properties(device).L2_cache_size


def width(like: Tensor, n_rows: int, n_columns: int, depth: int, step: int) -> int:
    """Of the blocks that ``fitting`` chooses for a tensor's device and dtype."""
    return fitting(cache_bytes(like.device), like.element_size(), n_rows, n_columns, depth, step)


def fitting(cache: int, itemsize: int, n_rows: int, n_columns: int, depth: int, step: int) -> int:
    """The columns of a block for a cache of so many bytes: a multiple of ``step``, or all of them.

    Whole, a product [n_rows, n_columns] is written to memory and read from there. Blocks that fit into the cache save
    both, but read the rows that are multiplied, of ``depth`` numbers, again. They are taken where at least half of what
    they save is left; not for deep rows, where the product takes as long as its arithmetic.
    """
    column = max(n_rows * itemsize, 1)
    most = MAX_BYTES // column
    near = int(cache * SHARE) // column // step * step
    if depth < DEEP and 0 < near < n_columns and (cdiv(n_columns, near) - 1) * depth <= n_columns:
        most = min(most, near)
    n_blocks = cdiv(n_columns, max(most // step, 1) * step)
    return min(cdiv(cdiv(n_columns, max(n_blocks, 1)), step) * step, n_columns)


def blocks(like: Tensor, n_rows: int, n_columns: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """The columns in blocks, each with a buffer [n_rows, its columns] in the dtype of ``like``, all in one memory."""
    buffer = like.new_empty(n_rows * width)
    for begin in range(0, n_columns, max(width, 1)):
        columns = slice(begin, min(begin + width, n_columns))
        size = columns.stop - begin
        yield columns, buffer[: n_rows * size].view(n_rows, size)
