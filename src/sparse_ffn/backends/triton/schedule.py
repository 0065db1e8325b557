"""The one schedule of all grouped products: a fixed number of programs that walk the plan's tiles, block by block.

The number of tiles that hold a row is known on the device only, so the grid depends on sizes alone, and a CUDA graph
stays right when the routing changes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton import config
from sparse_ffn.backends.triton.config import Tile
from sparse_ffn.backends.triton.launch import cdiv
from sparse_ffn.backends.triton.routing import Plan

REGISTERS = 1 << 16  # of a processor


@triton.jit
def n_blocks_at_work(tiles, N, BLOCK_N: tl.constexpr):
    """What a kernel has to walk: blocks of columns of the tiles that hold a row."""
    return tl.load(tiles) * tl.cdiv(N, BLOCK_N)


@triton.jit
def place(at, tiles, offsets, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr = 8):
    """The ``at``-th block: its expert, first position, positions, which of them are the expert's, and its number.

    GROUP tiles at a time, their blocks one after the other: the rows of a few tiles and the columns of a few blocks are
    in use at once, so both come from the cache.
    """
    n_blocks = tl.cdiv(N, BLOCK_N)
    first_tile = at // (GROUP * n_blocks) * GROUP
    height = tl.minimum(tl.load(tiles) - first_tile, GROUP)
    inside = at % (GROUP * n_blocks)
    tile = first_tile + inside % height
    expert = tl.load(tiles + 2 * tile + 1)
    first = tl.load(tiles + 2 * tile + 2)
    p = first + tl.arange(0, BLOCK_M)
    return expert, first, p, p < tl.load(offsets + expert + 1), inside // height


def at_once(tile: Tile, size: int, shared: int, accumulators: int = 1) -> int:
    """Programs that a processor has room for, with ``shared`` bytes and operands of ``size`` bytes a number.

    A thread needs registers for its part of the accumulators and about 64 more.
    """
    threads = 32 * tile.warps
    registers = accumulators * tile.m * tile.n // threads + 64
    operands = tile.stages * (tile.m + accumulators * tile.n) * tile.k * size
    return max(1, min(REGISTERS // (threads * registers), shared // operands))


def registers(tile: Tile, like: Tensor) -> int:
    """The most registers of a thread that leave room for all programs that ``grid`` counts on."""
    fit = at_once(tile, like.element_size(), config.shared_memory(like.device))
    return min(REGISTERS // (32 * tile.warps * fit) // 8 * 8, 255)


def grid(plan: Plan, like: Tensor, n_columns: int, tile: Tile, accumulators: int = 1) -> tuple[int, bool]:
    """Programs of a kernel, as many as run at once or one a block if these are fewer; whether its loops are fused.

    Two programs on a processor hide each other's stores. One alone has to load its next tile meanwhile, for which the
    compiler fuses the loop over tiles with the one inside, and keeps memory for what is stored apart from the operands.
    Where operands are addressed by pointers, registers are too few for that.
    """
    fit = at_once(tile, like.element_size(), config.shared_memory(like.device), accumulators)
    most = plan.n_tiles * cdiv(n_columns, tile.n)
    fused = fit == 1 and config.has_descriptors(like.device)
    return min(most, fit * config.n_processors(like.device)), fused
