"""The schedule of the grouped products, and which of their operands are read by tensor descriptors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from net import check, cvmm_case, expert_case
from torch import Tensor

from sparse_ffn.backends.triton import config, operands, routing, schedule
from sparse_ffn.backends.triton.tile import Tile

CPU, WIDE = torch.device("cpu"), Tile.parse("128x256x64/8/3")


@triton.jit
def visits_kernel(tiles, offsets, seen, N, BLOCK_N: tl.constexpr):
    """Counts each block of each tile that a program comes to."""
    work = schedule.n_blocks_at_work(tiles, N, BLOCK_N)
    for at in range(tl.program_id(0), work, tl.num_programs(0)):
        _, _, p, ok, block = schedule.place(at, tiles, offsets, N, 16, BLOCK_N)
        to = seen + block * 200 + p
        tl.store(to, tl.load(to, mask=ok, other=0) + 1, mask=ok)


@pytest.mark.parametrize("programs", [1, 7, 50])
@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 1, 0), (1, 150, 33)], ids=["no row", "one tile", "many tiles"])
def test_every_block_of_every_row_is_visited_once(counts: tuple[int, ...], programs: int, device: str) -> None:
    """Few programs and many, groups of tiles that are full and one that is not, void slots behind."""
    experts = torch.repeat_interleave(torch.arange(4), torch.tensor([*counts, 3])).to(device)
    plan = routing.sort_slots(experts, 3, 1, 16, inverse=False)
    seen = torch.zeros(3, 200, dtype=torch.int32, device=device)
    visits_kernel[(programs,)](plan.tiles, plan.offsets, seen, 40, BLOCK_N=16)
    expected = (torch.arange(200) < sum(counts)).int().expand(3, -1)
    assert torch.equal(seen.cpu(), expected)


def test_the_grid_depends_on_sizes_only(device: str) -> None:
    """What the routing says is on the device: a captured graph has the same grid for any routing."""
    like, tile = torch.empty(0, dtype=torch.bfloat16), Tile.parse("128x128x64/8/3")

    def grid(index: Tensor, n_columns: int, tile: Tile) -> tuple[int, bool]:
        plan = routing.sort_slots(index.to(device), 4, 1, 128, inverse=False)
        return schedule.grid(plan, like, n_columns, tile)

    with config.fixed(architecture="sm_90"):
        for index in (torch.zeros(256, dtype=torch.int64), torch.arange(256) % 4, torch.full((256,), 4)):
            assert grid(index, 1024, tile) == (6 * 8, False)
            assert grid(index, 1024 * 8, tile) == (2 * 108, False)  # two on each processor
            assert grid(index, 1024 * 8, WIDE) == (108, True)
        assert grid(torch.zeros(0, dtype=torch.int64), 1024, tile) == (0, False)


def test_how_many_programs_a_processor_has_room_for() -> None:
    for text, accumulators, shared, expected in (
        ("128x128x64/8/3", 1, 227, 2),  # 128 registers a thread
        ("128x128x64/8/4", 1, 227, 1),  # 128 KiB of operands
        ("128x64x64/8/3", 2, 227, 2),
        ("128x256x64/8/3", 1, 227, 1),
        ("16x64x64/4/4", 1, 227, 5),
        ("128x128x32/8/4", 1, 64, 1),
    ):
        assert schedule.at_once(Tile.parse(text), 2, shared << 10, accumulators) == expected, text


def test_a_thread_has_the_registers_that_leave_room_for_all_programs_of_the_grid() -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    with config.fixed(architecture="sm_90"):
        for text, expected in (("128x64x64/8/3", 128), ("64x64x64/4/4", 168), ("128x256x64/8/3", 255)):
            assert schedule.registers(Tile.parse(text), like) == expected


def test_a_tile_for_one_program_only_where_sums_are_long() -> None:
    with config.fixed(architecture="sm_90"):
        for depth, alone, expected in (
            (config.DEEP - 1, True, 128), (config.DEEP, True, 256), (config.DEEP, False, 128)
        ):  # fmt: skip
            assert config.tile(CPU, "one", "half", 1024, depth, 128, alone=alone).n == expected
        assert config.tile(CPU, "one", "half", 128, config.DEEP, 128, alone=True).n == 128


def test_what_lies_as_a_block_is_described() -> None:
    x, tile = torch.empty(4, 32, 48, dtype=torch.bfloat16), Tile(16, 16, 16, 4, 2)
    with config.fixed(architecture="sm_90"):
        assert [operands.matrix(tile, b)[2] for b in (x, x.mT, x[:, :, 16:32])] == ["k n", "n k", "k n"]
        unaligned = torch.empty(4 * 32 * 48 + 1, dtype=torch.bfloat16)[1:].view(4, 32, 48)
        for other in (x.float(), unaligned, x[:, :, :40].contiguous(), x[:1].expand(4, -1, -1), x[..., ::2]):
            assert operands.matrix(tile, other)[2] == ""
        assert operands.rows((16, 16), x[0], None)[1]
        assert not operands.rows((16, 16), x[0], x[0].float())[1]
    with config.fixed(architecture="sm_80"):
        assert operands.matrix(tile, x)[2] == ""


@pytest.mark.parametrize("form", ["plain", "everything"])
def test_products_of_what_is_described(
    form: str, device: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks over the ends of experts, of rows, and of columns."""
    blocks = set()
    descriptor = operands._descriptor

    def spy(x: Tensor, *block: int) -> Any:
        blocks.add(len(block))
        return descriptor(x, *block)

    monkeypatch.setattr(operands, "_descriptor", spy)
    with config.fixed(Tile(16, 64, 16, 4, 2), architecture="sm_90"):
        check(expert_case("ragged", torch.bfloat16, form=form, activation="gelu", sizes=(32, 48, 48)), device)
        check(cvmm_case("ragged", torch.bfloat16, form="reduction, transposed", sizes=(32, 48)), device)
    assert blocks == {2, 3}


@pytest.mark.parametrize("empty", ["tokens", "experts", "units", "inputs"])
def test_nothing_is_not_described(empty: str, device: str) -> None:
    """A descriptor has no size of 0: a process that gets no tokens trains all the same."""
    case = expert_case("no token" if empty == "tokens" else "random", torch.bfloat16, sizes=(32, 48, 64))
    cuts = {"experts": {"keys": 0, "values": 0}, "units": {"keys": 1, "values": 1}, "inputs": {"x": 1, "keys": 2}}
    for name, dim in cuts.get(empty, {}).items():
        case.tensors[name] = case.tensors[name].narrow(dim, 0, 0)
    if empty == "experts":  # all slots are void
        case.tensors["index"] = torch.zeros_like(case.tensors["index"])
    with config.fixed(architecture="sm_90"):
        check(case, device)
