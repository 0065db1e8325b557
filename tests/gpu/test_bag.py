"""The weighted bag out of the Triton kernels against float64, and the segments that its gradient is summed in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import test_large
import torch
from net import Case, check, check_frozen, fp32_first, guarded, random, traps
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_ffn as sf
from sparse_ffn import ops
from sparse_ffn.backends.triton import bag, config, segments
from sparse_ffn.backends.triton.launch import cdiv
from sparse_ffn.ops.weighted_bag import triton as weighted_bag

BAGS: dict[str, Callable[[], tuple[int, Tensor]]] = {  # rows of the table, index
    "random": lambda: (11, torch.randint(0, 11, (7, 5))),
    "one bag": lambda: (40, torch.tensor([[39, 0, 7]])),
    "no bag": lambda: (5, torch.empty(0, 3, dtype=torch.int64)),
    "one hot row": lambda: (5, torch.full((9, 2), 3)),
    "a row twice in a bag": lambda: (4, torch.tensor([[1, 1], [3, 1], [0, 0]])),
    "one slot a bag": lambda: (6, torch.tensor([[5], [2], [5]])),
    "segments that are just full": lambda: (4, torch.repeat_interleave(torch.tensor([0, 2, 3]), 8).view(6, 4)),
    "one row": lambda: (1, torch.zeros(3, 3, dtype=torch.int64)),
}


def bag_case(name: str, dtype: torch.dtype = torch.float32, width: int = 33, train: bool = True) -> Case:
    R, index = BAGS[name]()
    tensors = {"values": random(R, width), "index": index, "weight": random(*index.shape)}
    return Case(ops.weighted_bag, tensors, dtype, {}, ("values", "weight") if train else ())


@pytest.fixture(autouse=True)
def small_bags(monkeypatch: pytest.MonkeyPatch) -> None:
    small = config.Bag(rows=4, columns=16, cap=8)
    monkeypatch.setattr(bag, "BAG", small)
    monkeypatch.setattr(config, "BAG", small)


@fp32_first
@pytest.mark.parametrize("name", BAGS)
def test_weighted_bag(name: str, dtype: torch.dtype, device: str) -> None:
    check(bag_case(name, dtype), device)


@fp32_first
@pytest.mark.parametrize("name", BAGS)
def test_a_frozen_table_gets_no_gradient(name: str, dtype: torch.dtype, device: str) -> None:
    check_frozen(bag_case(name, dtype), device, exact=False)


@pytest.mark.parametrize("width", [1, 16, 17])
def test_any_width(width: int, device: str) -> None:
    check(bag_case("random", width=width), device)


def test_strided_arguments_and_the_gradient_of_a_sum(device: str) -> None:
    case = bag_case("random")
    values, index, weight = case.tensors.values()
    case.tensors["values"] = values.new_zeros(11, 50)[:, :33].copy_(values)
    case.tensors["index"] = index.t().contiguous().t()
    case.tensors["weight"] = weight.new_zeros(7, 10)[:, ::2].copy_(weight)
    case.sum_gradient = True
    check(case, device)
    case.tensors["values"] = values.t().contiguous().t()  # no unit stride inside the rows: copied
    check(case, device)


def test_weights_keep_their_own_dtype(device: str) -> None:
    values, index = random(5, 20).to(device).half().requires_grad_(), torch.tensor([[0, 4]], device=device)
    weight = torch.tensor([[0.1, 0.2]], device=device, requires_grad=True)
    with sf.backend("triton"):
        out = ops.weighted_bag(values, index, weight)
        dvalues, dweight = torch.autograd.grad(out.sum(), (values, weight))
    assert (out.dtype, dvalues.dtype, dweight.dtype) == (torch.float16, torch.float16, torch.float32)


@fp32_first
@pytest.mark.parametrize("name", BAGS)
def test_sparse_gradient_holds_the_rows_read(name: str, dtype: torch.dtype, device: str) -> None:
    case = bag_case(name, dtype)
    values, index, weight = (
        t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in case.tensors.values()
    )
    grad = random(index.shape[0], values.shape[1]).to(device, dtype)
    dvalues, dweight = weighted_bag.backward(grad, values, index, weight)
    with traps():
        named, drows, dweight_too = weighted_bag.backward_rows(grad, guarded(values), guarded(index), guarded(weight))
    assert torch.equal(named, index.unique())
    assert torch.equal(drows, dvalues[named])
    assert torch.equal(dweight, dweight_too)
    table = values.requires_grad_()
    with sf.backend("triton"):
        ops.weighted_bag(table, index, weight, sparse_grad=True).backward(grad)
    assert table.grad is not None
    assert table.grad.is_sparse
    assert torch.equal(table.grad.to_dense(), dvalues)


def test_rows_that_no_bag_reads_get_exactly_zero(device: str) -> None:
    dvalues = check(bag_case("one hot row", torch.bfloat16), device)["dvalues"]
    assert (dvalues[[0, 1, 2, 4]] == 0).all()
    assert (dvalues[3] != 0).any()


def test_two_runs_are_bit_equal(device: str) -> None:
    case = bag_case("one hot row", torch.bfloat16)
    first, second = check(case, device), check(case, device)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("others", [(-1, 4, 10**6), (2**32 + 1, -(2**32), 2**63 - 1)])
def test_indices_outside_of_the_table_touch_nothing(others: tuple[int, ...], device: str) -> None:
    """Not those either that 32 bits would hold as rows of it."""
    values, weight = guarded(random(4, 20).to(device).float()), torch.ones(1, 4, device=device)
    index = torch.tensor([[2, *others]], device=device)
    with traps():
        assert torch.equal(weighted_bag.forward(values, index, weight)[0], values[2])
        dvalues, dweight = weighted_bag.backward(values[:1], values, index, weight)
        of_frozen = weighted_bag.backward(values[:1], values, index, weight, False).weight
    assert (dweight[0, 1:] == 0).all()
    assert (of_frozen[0, 1:] == 0).all()
    assert torch.equal(dvalues, torch.stack([values[0] * (r == 2) for r in range(4)]))


@pytest.mark.parametrize("name", BAGS)
@pytest.mark.parametrize("cap", [1, 3, 8])
def test_segments_cover_every_slot_once(name: str, cap: int, device: str) -> None:
    R, index = BAGS[name]()
    s = segments.every_row(index.to(device), R, cap)
    seen = [0] * index.numel()
    parts: list[int] = []
    several = []
    for i, r in enumerate(s.row.tolist()):
        if r == R:
            continue
        begin, end = s.begins[r].item(), s.ends[r].item()
        nth = i - s.first[r].item()
        mine = range(begin + nth * cap, min(end, begin + (nth + 1) * cap))
        assert len(mine) > 0 or begin == end
        for p in mine:
            assert index.flatten()[s.order[p]] == r
            seen[s.order[p]] += 1
        if end - begin > cap:
            parts.append(s.part[r].item() + nth)
            several += [r] if nth == 0 else []
    assert seen == [1] * index.numel()
    assert parts == list(range(len(parts)))
    assert len(parts) <= s.n_parts
    assert s.hot.tolist() == several + [R] * (s.hot.shape[0] - len(several))


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 2"):
        segments.every_row(torch.empty(1, dtype=torch.int64).expand(1 << 30), 2, 8)


def test_weighted_bag_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()
    monkeypatch.setattr(bag, "launch", lambda kernel, grid, *a, **meta: launched.add(kernel.fn.__name__))
    t = [x.float() if x.is_floating_point() else x for x in bag_case("random").tensors.values()]
    with FakeTensorMode() as mode:
        values, index, weight = (mode.from_tensor(x) for x in t)
        out = weighted_bag.forward(values, index, weight)
        dvalues, dweight = weighted_bag.backward(out, values, index, weight)
        assert launched == {"bag_kernel", "bag_gradient_kernel", "hot_rows_kernel"}
        launched.clear()
        weighted_bag.backward(out, values, index, weight, False)
    assert launched == {"dot_products_kernel"}
    assert dvalues is not None
    assert dvalues.shape == values.shape
    assert dweight.shape == weight.shape


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this memory would be real")
def test_offsets_past_two_billion() -> None:
    """See test_large: rows of the table and of the gradient far apart, then outputs that begin far away."""
    values, grad = random(3, 20).half(), random(3, 20).half()
    far, far_grad = test_large.spread(values), test_large.spread(grad)
    index, weight = torch.tensor([[2, 0], [1, 1], [0, 2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = torch.empty(3, 20, dtype=torch.float16)
    bag.bag(far, index, weight, out)
    test_large.close(out[2], 5 * values[0].double() + 6 * values[2].double())
    dots = bag.bag_gradient(segments.every_row(index, 3, 8), far_grad, weight, out, far)
    test_large.close(out[2], grad[0].double() + 6 * grad[2].double())
    assert dots is not None
    for found in (dots, bag.dot_products(far_grad, far, index)):
        torch.testing.assert_close(found[2, 1].double(), grad[2].double() @ values[2].double(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this memory would be real")
def test_results_past_two_billion(monkeypatch: pytest.MonkeyPatch) -> None:
    """17 rows of which the last begins past 2^31: of each grid only the last program."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    R, width = 17, test_large.WIDE
    number = TensorHandle(np.array([R * cdiv(width, 16) - 1], np.int32), tl.int32)
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", lambda self, axis: number)
    monkeypatch.setattr(bag, "launch", lambda kernel, grid, *a, **meta: kernel[(1,)](*a, **meta) if grid else None)
    row, out = torch.empty(1, width, dtype=torch.float16), torch.empty(R, width, dtype=torch.float16)
    row[0, -16:] = random(16).half()
    ones = torch.ones(R, 1)
    bag.bag(row, torch.zeros(R, 1, dtype=torch.int64), ones, out)
    assert torch.equal(out[16, -16:], row[0, -16:])
    out[16, -16:] = 0
    bag.bag_gradient(segments.every_row(torch.tensor([[16]]), R, 8), row, ones[:1], out)
    assert torch.equal(out[16, -16:], row[0, -16:])

    parts, total = out, torch.empty(R, width, dtype=torch.float16)
    hot, begins, ends, part = (torch.full((R,), n, dtype=torch.int32) for n in (16, 0, 8, 16))
    bag.hot_rows_kernel[(1,)](parts, total, hot, begins, ends, part, R, width, CAP=8, ROWS=8, COLUMNS=16)
    assert torch.equal(total[16, -16:], row[0, -16:])
