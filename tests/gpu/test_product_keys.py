"""Product-key top-k out of its kernel: exactly the reference's indices, ties included."""

from __future__ import annotations

from typing import Any

import pytest
import test_large
import torch
from net import TOLERANCE, guarded, traps
from strange import strange
from test_no_wait import NoHostNumbers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_ffn as sf
from sparse_ffn import ops
from sparse_ffn.backends.triton import product_keys
from sparse_ffn.ops.product_key_topk import reference
from sparse_ffn.ops.product_key_topk import triton as product_key_topk

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])


def check_same(first: Tensor, second: Tensor, k: int) -> None:
    with traps():
        actual = product_key_topk.product_key_topk(guarded(first), guarded(second), k)
    assert torch.equal(actual, reference.product_key_topk(first, second, k))


@dtypes
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 9), (20, 1), (20, 5), (33, 16), (7, 40)])
def test_every_size(n: int, k: int, dtype: torch.dtype, device: str) -> None:
    check_same(torch.randn(3, n, device=device).to(dtype), torch.randn(3, n, device=device).to(dtype), k)


@dtypes
@pytest.mark.parametrize("levels", [1, 3])
def test_ties_go_to_the_lower_position(levels: int, dtype: torch.dtype, device: str) -> None:
    first, second = (torch.randint(0, levels, (3, 24), device=device).to(dtype) for _ in range(2))
    check_same(first, second, 11)


def test_zeros_of_both_signs_are_equal_and_infinities_have_their_place(device: str) -> None:
    first = torch.tensor([[-0.0, 0.0, -0.0, 0.0], [-float("inf"), 1, -1, -float("inf")]], device=device)
    second = torch.tensor([[0.0, -0.0, 0.0, -0.0], [2, 1, -3, 5]], device=device)
    check_same(first, second, 3)


@dtypes
@pytest.mark.parametrize(
    ("n", "k"), [(5, 4), *(pytest.param(*p, marks=pytest.mark.exhaustive) for p in ((24, 11), (40, 8)))]
)
def test_nan_ranks_first_and_infinity_next(
    n: int, k: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_keys, "CHUNK", 32)
    check_same(strange(16, n, dtype).to(device), strange(16, n, dtype).to(device), k)


@pytest.mark.parametrize(("n", "k"), [(40, 8), (33, 16)])
def test_rows_in_chunks(n: int, k: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_keys, "CHUNK", 16)
    check_same(torch.randn(2, n, device=device), torch.randint(0, 4, (2, n), device=device).float(), k)


def test_no_kernel_takes_a_top_k_of_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.5 to 3.7 cannot compile one."""
    tops: list[int] = []
    monkeypatch.setattr(product_keys, "launch", lambda *a, **meta: tops.append(meta["TOP"]))
    for k in (1, 2, 8):
        product_key_topk.product_key_topk(torch.randn(2, 20, device=device), torch.randn(2, 20, device=device), k)
    assert tops == [2, 2, 8]


def test_the_largest_k(device: str) -> None:
    check_same(torch.randn(1, 1500, device=device), torch.randn(1, 1500, device=device), 64)


def test_beyond_the_kernel_torch_sorts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_keys.fits(2048, 64)
    assert not product_keys.fits(2048, 65)
    assert not product_keys.fits(1 << 15, 8)
    monkeypatch.setattr(product_keys, "launch", None)
    check_same(torch.randn(2, 70, device=device), torch.randn(2, 70, device=device), 65)


def test_op_of_strided_scores_has_gradients(device: str) -> None:
    tables = torch.randn(3, 2, 40, 2, device=device, requires_grad=True)
    grads = []
    for name in ("reference", "triton"):
        with sf.backend(name):
            score, index = ops.product_key_topk(tables.transpose(2, 3), 6)
        grads.append((index, *torch.autograd.grad(score.square().sum(), tables)))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(*(g[1] for g in grads))  # sums in another order


@dtypes
@pytest.mark.parametrize("k", [1, 6, 40])
def test_gradients_are_exact_and_in_order(k: int, dtype: torch.dtype, device: str) -> None:
    """A sub-key gets the fp32 sum of the gradients of all pairs that have it; whole numbers leave no error."""
    n = 7
    index = torch.rand(3, 2, n * n, device=device).topk(k).indices
    grad = torch.randint(-3, 4, index.shape, device=device).to(dtype)
    for stride in ((4 * n, 2 * n, n, 1), (n, 3 * n, 6 * n, 1)):  # heads of a token, or tokens of a head, side by side
        with traps():
            actual = product_key_topk.backward(guarded(grad), guarded(index), (3, 2, 2, n), stride)
        assert actual.stride() == stride
        expected = torch.zeros(3, 2, 2, n, dtype=torch.float64, device=device)
        expected[:, :, 0].scatter_add_(-1, index // n, grad.double())
        expected[:, :, 1].scatter_add_(-1, index % n, grad.double())
        assert torch.equal(actual.double(), expected)


def test_gradients_of_two_runs_are_bit_equal(device: str) -> None:
    index, grad = torch.randint(0, 49, (3, 2, 40), device=device), torch.randn(3, 2, 40, device=device)
    first, second = (product_key_topk.backward(grad, index, (3, 2, 2, 7), (28, 14, 7, 1)) for _ in range(2))
    assert torch.equal(first, second)


def test_it_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(product_keys, "launch", lambda kernel, grid, *a, **meta: launched.append(grid))
    with FakeTensorMode() as mode, NoHostNumbers():
        tables = mode.from_tensor(torch.empty(2, 5, 40))
        assert product_key_topk.product_key_topk(tables, tables, 65).shape == (2, 5, 65)  # torch sorts
        index = product_key_topk.product_key_topk(tables, tables, 7)
        assert index.shape == (2, 5, 7)
        grad = mode.from_tensor(torch.empty(2, 5, 7))
        assert product_key_topk.backward(grad, index, (2, 5, 2, 40), (400, 80, 40, 1)).shape == (2, 5, 2, 40)
    assert launched == [10, 20]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this memory would be real")
def test_rows_far_apart() -> None:
    first, second = torch.randn(3, 20).half(), torch.randn(3, 20).half()
    out = torch.empty(3, 5, dtype=torch.int64)
    product_keys.product_keys(test_large.spread(first), test_large.spread(second), 5, out)
    assert torch.equal(out, reference.product_key_topk(first, second, 5))
