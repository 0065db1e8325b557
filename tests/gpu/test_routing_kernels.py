"""The sort, the plan and its tiles against torch, and the host code of both ops without a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from net import ROUTINGS, check, cvmm_case, expert_case, guarded, traps
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_ffn.backends.triton import bag, combine, config, decode, grouped, hidden, outer, routing
from sparse_ffn.ops import Units
from sparse_ffn.ops.cvmm import triton as cvmm
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.expert_ffn import triton as expert_ffn

INDICES: dict[str, Callable[[], tuple[int, torch.Tensor]]] = {
    **ROUTINGS,
    "many experts": lambda: (100, torch.randint(0, 100, (200, 2))),  # and blocks for several steps of a scan
    "two of many": lambda: (70, torch.randint(0, 2, (90, 1)) * 69),
    "1 of 16": lambda: (16, torch.tensor([[15]])),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("blocks", ["small", "real"])
def test_sort_is_the_stable_sort(name: str, blocks: str, device: str, request: pytest.FixtureRequest) -> None:
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    E, index = INDICES[name]()
    flat = index.flatten()
    with traps():
        plan = routing.sort_slots(guarded(flat.to(device)), E, 1, 16, inverse=False)
    check_sorted(plan, flat, E)


def test_every_thread_of_a_scan_has_its_own_number(small_blocks: None) -> None:
    """It works in place: a thread that held a copy of another's number could read it too late."""
    threads = 4 * 64  # of a program by default, on AMD's cards; NVIDIA's have half
    for sort in (config.SORT, routing.SORT):
        assert sort.scan * sort.columns >= threads


def check_sorted(plan: routing.Plan, flat: torch.Tensor, E: int) -> None:
    assert torch.equal(plan.order.long().cpu(), flat.sort(stable=True).indices)
    counts = torch.bincount(flat, minlength=E)[:E]
    assert torch.equal(plan.offsets.long().cpu(), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


@pytest.mark.parametrize("E", [4097, 100_000])
def test_more_experts_than_a_program_can_count_are_sorted_by_torch(
    E: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = without_launches(monkeypatch)
    index = torch.randint(0, E, (200, 2))
    plan = routing.sort_slots(index.to(device), E, 2, 16, inverse=True)
    assert launched == {"plan_kernel"}
    assert (plan.order.dtype, plan.offsets.dtype) == (torch.int32, torch.int32)
    check_sorted(plan, index.flatten(), E)


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("block_m", [16, 128])
def test_tiles_cover_every_position_once(name: str, block_m: int, device: str) -> None:
    E, index = INDICES[name]()
    k = index.shape[1]
    with traps():
        plan = routing.sort_slots(index.to(device), E, k, block_m, inverse=True)
        again = routing.plan(plan.order, plan.offsets, k, block_m, inverse=True)
    assert torch.equal(plan.rows.cpu(), plan.order.cpu() // k)
    assert all(map(torch.equal, plan.tensors[:4], again.tensors))
    n_live = int(plan.tiles[0]) if plan.n_tiles else 0
    assert n_live <= plan.n_tiles
    tiles = plan.tiles[1 : 2 * n_live + 1].tolist()
    assert tiles == again.tiles[1 : 2 * n_live + 1].tolist()
    bounds, position = plan.offsets.tolist(), plan.order.long().cpu().argsort()
    assert torch.equal(plan.inverse.long().cpu(), position.masked_fill(position >= bounds[-1], -1))
    seen = torch.zeros(plan.order.shape[0], dtype=torch.int64)
    for e, row in zip(tiles[::2], tiles[1::2], strict=True):
        assert bounds[e] <= row < bounds[e + 1]
        seen[row : min(row + block_m, bounds[e + 1])] += 1
    assert torch.equal(seen, (torch.arange(len(seen)) < bounds[-1]).long())  # void slots are in no tile


@pytest.mark.parametrize("most", [4, 5], ids=["torch", "kernel"])
def test_slots_of_unknown_experts_come_last(
    most: int, device: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nothing checks the indices; one out of range must not write outside of its tensors."""
    monkeypatch.setattr(routing, "SORT", replace(routing.SORT, experts=most))
    index = torch.tensor([3, -1, 0, 5, 9, 0, 3] * 5, device=device)
    with traps():
        plan = routing.sort_slots(index, 5, 1, 16, inverse=True)
    known = [i for e in range(5) for i, x in enumerate(index.tolist()) if x == e]
    assert plan.order.tolist() == known + [i for i in range(35) if i not in known]
    assert plan.offsets[-1] == len(known)
    assert [i for i, p in enumerate(plan.inverse.tolist()) if p < 0] == plan.order.tolist()[len(known) :]


def test_too_many_slots_are_refused() -> None:
    index = torch.empty(1, dtype=torch.int64).expand(1 << 30)
    with pytest.raises(ValueError, match="fewer than 2"):
        routing.sort_slots(index, 2, 1, 16, inverse=False)
    x, one_unit = torch.zeros(1, 4).expand(1 << 30, 4), Units(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), None, None)
    with pytest.raises(ValueError, match="fewer than 2"):
        expert_ffn.inference(x, one_unit, index.unsqueeze(1), torch.ones(1, 1).expand(1 << 30, 1), None, "relu")


def test_a_layer_of_many_experts_meets_the_reference(
    device: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "SORT", replace(routing.SORT, experts=4))
    check(expert_case("random", form="everything", activation="silu"), device)


@pytest.mark.parametrize("size", [20, 1], ids=["", "experts of one unit"])
@pytest.mark.parametrize("form", ["plain", "biased", "everything"])
def test_expert_ffn_never_waits_for_the_device(form: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FakeTensorMode a number that only the device knows cannot be read: .item() and its kin raise."""
    launched = without_launches(monkeypatch)
    case = expert_case(form=form, sizes=(24, size, 33))
    t = {n: x.float() if x.is_floating_point() else x for n, x in case.tensors.items()}
    with FakeTensorMode() as mode:
        t = {n: mode.from_tensor(x) for n, x in t.items()}
        experts = Units(t["keys"], t["values"], t.get("gate_keys"), t.get("key_bias"))
        x, gate, dropout_mask = t["x"], t["gate"], t.get("dropout_mask")
        call = (x, experts, t["index"], gate, dropout_mask, "relu")
        out, saved = expert_ffn.forward(*call)
        assert out.shape == expert_ffn.inference(*call).shape == (23, 33)
        gradients = expert_ffn.backward(out, x, experts, gate, dropout_mask, saved, True, "relu")
        assert gradients.experts.keys.shape == t["keys"].shape
    names = {"count", "scan", "place", "plan", "up", "rows", "combine", "hidden_gradient", "outer"}
    in_tables = size == 1 and form != "everything"
    if in_tables:
        names = {"dot_products", "bag", "bag_gradient", "hot_rows"}
    assert launched - {"sum_rows_kernel"} == {f"{name}_kernel" for name in names}
    launched.clear()
    with mode:
        gradients = expert_ffn.backward(out, x, experts, gate, dropout_mask, saved, False, "relu")
    assert gradients.experts is None
    names = {"dot_products", "bag"} if in_tables else {"plan", "hidden_gradient", "rows", "combine"}
    assert launched == {f"{name}_kernel" for name in names}


def test_cvmm_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = without_launches(monkeypatch)
    case = cvmm_case(form="gather, scatter, reduction")
    t = {n: x.float() if x.is_floating_point() else x for n, x in case.tensors.items()}
    with FakeTensorMode() as mode:
        t = {n: mode.from_tensor(x) for n, x in t.items()}
        slots = Slots(t["expert"], t["gather"], t["scatter"], t["reduction"])
        out = cvmm.forward(t["x"], t["weight"], slots, 7)
        assert out.shape == (7, 33)
        cvmm.backward(out, t["x"], t["weight"], slots, True)
    assert {"rows_kernel", "outer_kernel", "segments_kernel"} <= launched
    launched.clear()
    with mode:
        assert cvmm.backward(out, t["x"], t["weight"], slots, False).weight is None
    assert "rows_kernel" in launched
    assert "outer_kernel" not in launched


def without_launches(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that would have been launched."""
    names: set[str] = set()

    def launch(kernel: Any, grid: int, *arguments: Any, **meta: Any) -> None:
        assert isinstance(grid, int)
        names.add(kernel.fn.__name__)

    for module in (routing, grouped, hidden, outer, combine, decode, bag):
        monkeypatch.setattr(module, "launch", launch)
    return names
