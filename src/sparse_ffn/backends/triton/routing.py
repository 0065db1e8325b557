"""The slots sorted by expert on the device (stable, no atomics), and the table of row tiles; no host wait.

S slots (token t's j-th choice is slot t·K + j), E experts. A position is a place in the sorted order. Void slots, whose
expert is outside [0, E), lie behind all others, from position offsets[E] on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.backends.triton.config import SORT
from sparse_ffn.backends.triton.launch import OF_TOKENS, cdiv, launch, power_of_two


@dataclass(frozen=True)
class Plan:
    """What a grouped product needs to know of the routing, all int32 on the device.

    ``rows[p]`` is the token at position p, ``inverse[slot]`` the position of a slot, -1 if it is void (empty if not
    asked for). ``tiles[0]`` tiles hold a row: tile i is the expert ``tiles[2i + 1]`` and its ``block_m`` rows from
    position ``tiles[2i + 2]`` on, cut off where the expert ends. What is behind them is not written.
    """

    order: Tensor
    offsets: Tensor
    rows: Tensor
    inverse: Tensor
    tiles: Tensor
    block_m: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, as kernels take it."""
        return self.order, self.offsets, self.rows, self.inverse, self.tiles

    @property
    def n_tiles(self) -> int:
        """An upper bound that needs no look at the device."""
        return self.tiles.shape[0] // 2


@triton.jit
def experts_of(index, slot, S, E):
    """The experts of slots; E where it is none, whatever 64 bits stand there."""
    expert = tl.load(index + slot, mask=slot < S, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)


@triton.jit(do_not_specialize=OF_TOKENS)
def count_kernel(index, counts, S, E, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """counts[b, e]: how often block b of the slots names expert e."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = experts_of(index, slot, S, E)
    # Triton 3.5's interpreter counts in 64 bits and calls them 32: a store would write past them
    seen = tl.histogram(expert, BINS, mask=expert < E).to(tl.int64).to(tl.int32)
    bins = tl.arange(0, BINS)
    tl.store(counts + block.to(tl.int64) * E + bins, seen, mask=bins < E)


@triton.jit(do_not_specialize=OF_TOKENS)
def scan_kernel(counts, totals, n_blocks, E, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Each column of counts to its exclusive prefix sum, in place; its whole sum to totals."""
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    carry = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, n_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        at = counts + block.to(tl.int64)[:, None] * E + expert[None, :]
        mask = (block < n_blocks)[:, None] & (expert < E)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, carry[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        carry += tl.sum(count, 0)
    tl.store(totals + expert, carry, mask=expert < E)


@triton.jit
def store_tiles(
    program, totals, offsets, tiles, E,
    COUNTED: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Some of the tiles, out of the experts' numbers of slots or, if not COUNTED, offsets; their number once."""
    tile = program * TILES + tl.arange(0, TILES)
    expert = tl.zeros([TILES], tl.int32)  # experts that end at or before the tile: its own one's number
    first = tl.zeros([TILES], tl.int32)  # how many tiles they have
    begin = tl.zeros([TILES], tl.int32)  # and how many slots
    carry = 0
    for start in range(0, E, PART):
        e = start + tl.arange(0, PART)
        if COUNTED:
            length = tl.load(totals + e, mask=e < E, other=0)
        else:
            length = tl.load(offsets + e + 1, mask=e < E, other=0) - tl.load(offsets + e, mask=e < E, other=0)
        count = (length + BLOCK_M - 1) // BLOCK_M
        passed = ((carry + tl.cumsum(count, 0))[None, :] <= tile[:, None]) & (e < E)[None, :]
        expert += tl.sum(passed.to(tl.int32), 1)
        first += tl.sum(tl.where(passed, count[None, :], 0), 1)
        begin += tl.sum(tl.where(passed, length[None, :], 0), 1)
        carry += tl.sum(count, 0)
    busy = tile < carry
    tl.store(tiles + 2 * tile + 1, expert, mask=busy)
    tl.store(tiles + 2 * tile + 2, begin + (tile - first) * BLOCK_M, mask=busy)
    if program == 0:
        tl.store(tiles, carry)


@triton.jit(do_not_specialize=OF_TOKENS)
def place_kernel(
    index, counts, totals, order, offsets, rows, inverse, tiles, S, E, K, n_blocks,
    BLOCK_M: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, BINS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """order[position] = slot: the expert's begin + its slots in blocks before + its slots before in this block.

    Void slots are counted as what the experts' slots leave over: no column of counts is theirs. The programs behind
    those of the slots' blocks make the tiles.
    """
    block = tl.program_id(0)
    if block >= n_blocks:
        store_tiles(block - n_blocks, totals, offsets, tiles, E, True, BLOCK_M, TILES, PART)
        return
    bins = tl.arange(0, BINS)
    total = tl.load(totals + bins, mask=bins < E, other=0)
    end = tl.cumsum(total, 0)
    n_live = tl.sum(total, 0)
    if block == 0:
        tl.store(offsets + bins, end - total, mask=bins < E)
        tl.store(offsets + E, n_live)

    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = experts_of(index, slot, S, E)
    known = expert < E
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, BLOCK, PART):  # in parts: all pairs of a block at once would not fit into registers
        before = block * BLOCK + start + tl.arange(0, PART)
        rival = experts_of(index, before, S, E)
        same = (expert[:, None] == rival[None, :]) & (before[None, :] < slot[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    row = counts + block.to(tl.int64) * E
    n_void = block * BLOCK - tl.sum(tl.load(row + bins, mask=bins < E, other=0), 0)  # in blocks before
    earlier = tl.where(known, tl.load(row + expert, mask=known, other=0), n_void)
    begin = tl.where(known, tl.gather(end - total, tl.where(known, expert, 0), 0), n_live)
    position = begin + earlier + rank
    tl.store(order + position, slot, mask=slot < S)
    tl.store(rows + position, slot // K, mask=slot < S)
    if INVERSE:
        tl.store(inverse + slot, tl.where(known, position, -1), mask=slot < S)


@triton.jit(do_not_specialize=OF_TOKENS)
def plan_kernel(
    order, offsets, rows, inverse, tiles, S, E, K, n_tiles,
    BLOCK_M: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The tokens and the inverse of a block of positions, and the experts and rows of a block of tiles."""
    program = tl.program_id(0)
    position = program * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(order + position, mask=position < S, other=0)
    tl.store(rows + position, slot // K, mask=position < S)
    if INVERSE:
        tl.store(inverse + slot, tl.where(position < tl.load(offsets + E), position, -1), mask=position < S)

    if program * TILES < n_tiles:
        store_tiles(program, None, offsets, tiles, E, False, BLOCK_M, TILES, PART)


def check_slots(index: Tensor) -> int:
    """How many slots there are; positions have 32 bits.

    Raises:
        ValueError: 2**30 or more.
    """
    S = index.numel()
    if S >= 1 << 30:
        raise ValueError(f"one call takes fewer than 2**30 slots (tokens times k), got {S}")
    return S


def sort_slots(index: Tensor, n_experts: int, k: int, block_m: int, *, inverse: bool) -> Plan:
    """Sort the slots of int64 [S], ``k`` of them a token, by expert, stably; those outside [0, E) come last.

    A counting sort; beyond ``SORT.experts`` torch sorts.
    """
    S = check_slots(index)
    if S == 0:
        order, offsets = (index.new_zeros(n, dtype=torch.int32) for n in (0, n_experts + 1))
        return plan(order, offsets, k, block_m, inverse=inverse)
    if n_experts > SORT.experts:
        order, offsets = sort_by_expert(index.flatten().clamp(-1, n_experts).to(torch.int32), n_experts)
        return plan(order, offsets, k, block_m, inverse=inverse)
    index = index.contiguous()
    order, offsets = (index.new_empty(n, dtype=torch.int32) for n in (S, n_experts + 1))
    made = _unmade(order, offsets, block_m, inverse)
    n_blocks, bins = cdiv(S, SORT.block), max(power_of_two(n_experts), 16)
    counts = index.new_empty(n_blocks, n_experts, dtype=torch.int32)
    totals = index.new_empty(n_experts, dtype=torch.int32)
    launch(count_kernel, n_blocks, index, counts, S, n_experts, BLOCK=SORT.block, BINS=bins)
    launch(
        scan_kernel, cdiv(n_experts, SORT.columns), counts, totals, n_blocks, n_experts,
        BLOCK=SORT.scan, COLUMNS=SORT.columns,
    )  # fmt: skip
    launch(
        place_kernel, n_blocks + cdiv(made.n_tiles, SORT.tiles), index, counts, totals, *made.tensors,
        S, n_experts, k, n_blocks,
        BLOCK_M=block_m, INVERSE=inverse, BLOCK=SORT.block, PART=SORT.part, BINS=bins, TILES=SORT.tiles,
    )  # fmt: skip
    return made


def plan(order: Tensor, offsets: Tensor, k: int, block_m: int, *, inverse: bool) -> Plan:
    """The plan for slots that are in order already, ``k`` of them a token: what a forward pass kept."""
    S, E, made = order.shape[0], offsets.shape[0] - 1, _unmade(order, offsets, block_m, inverse)
    n_tiles = made.n_tiles if SORT.experts >= E else 0  # of the kernel, each of whose programs passes all experts
    launch(
        plan_kernel, max(cdiv(S, SORT.positions), cdiv(n_tiles, SORT.tiles)), *made.tensors, S, E, k, n_tiles,
        BLOCK_M=block_m, INVERSE=inverse, BLOCK=SORT.positions, TILES=SORT.tiles, PART=SORT.part,
    )  # fmt: skip
    if SORT.experts < E:
        _find_tiles(made)
    return made


def _find_tiles(made: Plan) -> None:
    """What ``store_tiles`` does, by torch."""
    count = (made.offsets.diff() + (made.block_m - 1)) // made.block_m
    last = count.cumsum(0, dtype=torch.int32)
    tile = torch.arange(made.n_tiles, dtype=torch.int32, device=last.device)
    expert = torch.searchsorted(last, tile, right=True).clamp_max_(len(count) - 1)
    row = made.offsets[expert] + (tile - (last - count)[expert]) * made.block_m
    made.tiles[0] = last[-1]
    made.tiles[1:] = torch.stack((expert, row), 1).flatten()


def _unmade(order: Tensor, offsets: Tensor, block_m: int, inverse: bool) -> Plan:
    """A plan of tensors that nothing has written yet."""
    S, E = order.shape[0], offsets.shape[0] - 1
    n_tiles = S // block_m + min(E, S)
    rows, inverted = order.new_empty(S), order.new_empty(S if inverse else 0)
    return Plan(order, offsets, rows, inverted, order.new_empty(2 * n_tiles + 1), block_m)
