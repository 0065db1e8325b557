"""Sizes beyond 32 bits: the core computes offsets in 64, shown on virtual memory of which few pages are touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import functional, ops
from sparse_ffn.backends import cpu

pytestmark = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
LIMIT = 2**31  # elements; the tensors below hold more


def most_resident() -> int:
    """Bytes of memory that this process has occupied at most since its peak was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.fixture(autouse=True)
def _on_the_core_in_little_memory() -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = most_resident()
    with sf.backend("cpu"):
        yield
    assert most_resident() - before < 2**29


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=3e-2, atol=3e-2 * expected.abs().max().item())


def test_bag_reads_and_differentiates_rows_far_into_its_table() -> None:
    table, width = 2**20, 2100
    values = torch.empty(table, width, dtype=torch.bfloat16)
    assert values.numel() > LIMIT
    rows = torch.tensor([table - 1, 0, LIMIT // width + 1, table - 2])
    few = torch.randn(4, width, dtype=torch.bfloat16)
    values[rows] = few
    index = torch.tensor([[0, 1, 2], [3, 3, 0]])
    weight, upstream = torch.randn(2, 3), torch.randn(2, width, dtype=torch.bfloat16)

    def gradients(values: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        values, w = values.requires_grad_(), weight.clone().requires_grad_()
        out = functional.weighted_bag(values, index, w, sparse_grad=True)
        return out.detach(), *torch.autograd.grad(out, (values, w), upstream)

    out, dvalues, dweight = gradients(values, rows[index])
    with sf.backend("reference"):
        expected, dfew, expected_dweight = gradients(few, index)
    assert_close(out, expected)
    assert_close(dweight, expected_dweight)
    assert dvalues.indices().flatten().tolist() == sorted(rows.tolist())
    assert_close(dvalues.values(), dfew.to_dense()[rows.argsort()])


@pytest.mark.parametrize("tokens", [3, 40], ids=["decode", "packed"])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_expert_ffn_reads_the_last_of_many_experts(side: str, tokens: int) -> None:
    experts, size, width = 2100, 1024, 1024
    large, small = (torch.empty(experts, size, n, dtype=torch.bfloat16) for n in (width, 8))
    assert large.numel() > LIMIT
    used = torch.tensor([0, experts - 1])
    for tensor in (large, small):
        tensor[used] = torch.randn(2, size, tensor.shape[2], dtype=torch.bfloat16)
    keys, values = (large, small) if side == "keys" else (small, large)
    x = torch.randn(tokens, keys.shape[2], dtype=torch.bfloat16) / 32
    index, gate = torch.rand(tokens, 2).topk(2).indices, torch.rand(tokens, 2)
    y = functional.expert_ffn(x, keys, values, used[index], gate)
    with sf.backend("reference"):
        expected = functional.expert_ffn(x.double(), keys[used].double(), values[used].double(), index, gate)
    assert_close(y, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_cvmm_reads_the_last_of_many_matrices(transposed: bool) -> None:
    experts, side = 2100, 1024
    weight = torch.empty(experts, side, side, dtype=torch.bfloat16)
    assert weight.numel() > LIMIT
    used = torch.tensor([0, experts - 1])
    weight[used] = torch.randn(2, side, side, dtype=torch.bfloat16)
    few = weight[used]
    if transposed:
        weight, few = weight.transpose(1, 2), few.transpose(1, 2)
    x, expert = torch.randn(40, side, dtype=torch.bfloat16), torch.randint(0, 2, (40,))
    with sf.backend("reference"):
        expected = functional.cvmm(x.double(), few.double(), expert)
    assert_close(functional.cvmm(x, weight, used[expert]), expected)


def far_apart(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of random numbers whose addresses differ by more than 2**31 elements in all."""
    stride = LIMIT // (rows - 1) + 8
    return torch.empty(stride * rows, dtype=dtype).as_strided((rows, width), (stride, 1)).normal_()


def test_expert_ffn_and_its_gradients_take_rows_far_apart() -> None:
    x, keys, values = far_apart(5, 24), torch.randn(3, 16, 24).bfloat16(), torch.randn(3, 16, 20).bfloat16()
    index, gate = torch.rand(5, 3).topk(2).indices, torch.rand(5, 2)

    def results(x: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, keys, values, gate)]
        y = functional.expert_ffn(leaves[0], leaves[1], leaves[2], index, leaves[3])
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    far, near = results(x), results(x.contiguous())
    assert x.stride(0) * 4 > LIMIT
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def test_cvmm_and_its_gradients_take_rows_far_apart() -> None:
    x, weight = far_apart(5, 24), torch.randn(3, 24, 20).bfloat16()
    expert, gather = torch.tensor([2, 0, 1, 0, 2, 2]), torch.tensor([4, 0, 4, 1, 2, 3])

    def results(x: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = functional.cvmm(*leaves, expert, gather_index=gather)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    assert all(torch.equal(a, b) for a, b in zip(results(x), results(x.contiguous()), strict=True))


def test_selection_takes_rows_far_apart() -> None:
    scores, index = far_apart(6, 40, torch.float32).view(1, 3, 2, 40), torch.empty(1, 3, 5, dtype=torch.int64)
    cpu.call("product_key_topk", (scores, index, None))
    first, second = scores.contiguous().unbind(2)
    sums = (first.unsqueeze(3) + second.unsqueeze(2)).flatten(2)
    assert torch.equal(index, sums.topk(5).indices)


def test_wide_products_take_rows_and_batches_far_apart() -> None:
    layer = sf.ProductKeyMemory(24, 8, 4, n_heads=2, dtype=torch.bfloat16)
    x = far_apart(5, 24)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.contiguous()))
    batches, w = far_apart(4, 16).view(2, 2, 16), torch.randn(2, 6, 16).bfloat16()
    assert torch.equal(ops.wide_product(batches, w), ops.wide_product(batches.contiguous(), w))
    step = LIMIT + 1
    apart = torch.empty(step + 99, dtype=torch.bfloat16).as_strided((2, 2, 16), (step, 32, 1))
    with pytest.raises(ValueError, match=f"steps between the first and the last row of x, got {step + 32}$"):
        cpu.call("wide_product_forward", (apart, w, torch.empty(2, 2, 6), None), 0)
