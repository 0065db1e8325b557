"""Products with one row a slot, some columns at a time: all of [slots, columns] never exists at once.

What a token's slots add up to is summed column by column, so blocks of columns need no sort of their own and change no
result. The price: the rows that are multiplied are read again for every block.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

MAX_BYTES = 64 << 20  # of the buffer; a guess, not measured


def blocks(like: Tensor, n_rows: int, n_columns: int, step: int) -> Iterator[tuple[slice, Tensor]]:
    """The columns in blocks, each with a buffer [n_rows, its columns] in the dtype of ``like``: the same memory again.

    A block has as many columns as ``MAX_BYTES`` hold, a multiple of ``step`` (the columns of a tile), at least that.
    """
    most = MAX_BYTES // max(n_rows * like.element_size() * step, 1)
    width = min(max(most, 1) * step, n_columns)
    buffer = like.new_empty(n_rows * width)
    for begin in range(0, n_columns, width):
        columns = slice(begin, min(begin + width, n_columns))
        size = columns.stop - begin
        yield columns, buffer[: n_rows * size].view(n_rows, size)
