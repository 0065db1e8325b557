"""The ops and their functional API: backends agree with the reference, opcheck holds, bad arguments are refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import flat
import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from conftest import BACKENDS
from sparse_ffn import functional, ops
from sparse_ffn.backends import cpu
from sparse_ffn.ops.activations import ACTIVATIONS, SMOOTH
from sparse_ffn.ops.product_key_topk.reference import candidate_pairs
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.ops.topk_ffn import cpu as topk_ffn

E, G, D, O = 5, 7, 6, 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "fp16", "bf16"])

ROUTINGS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: torch.rand(23, E).topk(3).indices,
    "one token": lambda: torch.tensor([[4, 0]]),
    "no token": lambda: torch.empty(0, 3, dtype=torch.int64),
    "all on one expert": lambda: torch.full((9, 1), 3),
    "an expert named twice": lambda: torch.tensor([[1, 1], [1, 2], [0, 0]]),
    "empty experts first": lambda: torch.full((6, 2), 4) - torch.tensor([[0, 1]]),
    "k = E": lambda: torch.arange(E).repeat(4, 1),
    "void slots": lambda: torch.tensor([[E, 1], [2, E], [E, E], [3, 0]]),
}
routings = pytest.mark.parametrize("routing", ROUTINGS)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def with_gradients(call: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    y = call(**tensors)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    wanted = {n: t for n, t in tensors.items() if t.requires_grad}
    grads = torch.autograd.grad(y, wanted.values(), grad)
    return {"output": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_meets_reference(call: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Output and all gradients on every other backend against the reference in float64 on the same numbers."""
    wide = {
        n: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for n, t in tensors.items()
    }
    with sf.backend("reference"):
        expected = with_gradients(call, wide)
    for backend in ("torch",) if dtype == torch.float64 or cpu.PROBLEM else ("torch", "cpu"):
        with sf.backend(backend):
            actual = with_gradients(call, tensors)
        for name, tensor in actual.items():
            assert tensor.dtype == (tensors[name].dtype if name != "output" else dtype)
            scale = max(expected[name].abs().max().item() if expected[name].numel() else 0.0, 1.0)
            torch.testing.assert_close(
                tensor.double(),
                expected[name],
                rtol=0,
                atol=TOLERANCE[dtype] * scale,
                msg=lambda m, n=name, b=backend: f"{b}, {n}: {m}",
            )


@dtypes
@routings
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_expert_ffn_meets_its_reference(
    activation: str, form: str, routing: str, dtype: torch.dtype, poisoned: None
) -> None:
    index = ROUTINGS[routing]()
    tokens, slots = index.shape
    tensors = {
        "x": leaf(tokens, D, dtype=dtype),
        "keys": leaf(E, G, D, dtype=dtype),
        "values": leaf(E, G, O, dtype=dtype),
        "index": index,
        "gate": torch.rand(tokens, slots, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_(),
    }
    if form == "everything":
        tensors |= {
            "gate_keys": leaf(E, G, D, dtype=dtype),
            "key_bias": leaf(E, G, dtype=dtype),
            "dropout_mask": (torch.rand(tokens, slots, G) > 0.3).to(dtype) / 0.7,
        }
    assert_meets_reference(lambda **t: flat.expert_ffn(**t, activation=activation), tensors, dtype)


@dtypes
@routings
@pytest.mark.parametrize("form", ["plain", "gather", "gather, scatter, reduction"])
def test_cvmm_meets_its_reference(form: str, routing: str, dtype: torch.dtype, poisoned: None) -> None:
    expert = ROUTINGS[routing]().flatten()
    slots = expert.numel()
    rows = 4 if "gather" in form else slots
    tensors: dict[str, Any] = {
        "x": leaf(rows, D, dtype=dtype),
        "weight": leaf(E, D, O, dtype=dtype),
        "expert": expert,
    }
    options: dict[str, Any] = {}
    if "gather" in form:
        tensors["gather"] = torch.randint(0, rows, (slots,))
    if "scatter" in form:
        tensors |= {
            "scatter": torch.randint(0, 6, (slots,)),
            "reduction": torch.rand(slots, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_(),
        }
        options["n_out"] = 7  # a row that no slot names is zero
    assert_meets_reference(lambda **t: ops.cvmm(**t, **options), tensors, dtype)


def test_cvmm_takes_transposed_and_expanded_weights_without_a_copy(on_backend: str) -> None:
    x, keys, expert = torch.randn(9, D), torch.randn(E, G, D), torch.randint(0, E, (9,))
    expected = torch.stack([keys[e] @ row for row, e in zip(x, expert, strict=True)])
    torch.testing.assert_close(functional.cvmm(x, keys.transpose(1, 2), expert), expected)
    shared = keys[:1].expand(E, -1, -1).transpose(1, 2)
    torch.testing.assert_close(functional.cvmm(x, shared, expert), x @ keys[0].t())


@pytest.mark.parametrize("full", [False, True], ids=["plain", "gather, scatter, reduction"])
def test_cvmm_lays_out_the_gradient_of_a_transposed_weight_as_the_weight(full: bool) -> None:
    leaves = {"x": leaf(9, D, dtype=torch.float32), "matrices": leaf(E, O, D, dtype=torch.float32)}
    indices = {"gather": torch.randint(0, 9, (9,)), "scatter": torch.randint(0, 6, (9,))} if full else {}
    reduction = {"reduction": leaf(9, dtype=torch.float32)} if full else {}
    tensors = {**leaves, "expert": torch.randint(0, E, (9,)), **indices, **reduction}
    options: dict[str, Any] = {"n_out": 7} if full else {}
    assert_meets_reference(lambda matrices, **t: ops.cvmm(weight=matrices.mT, **t, **options), tensors, torch.float32)

    rest = [tensors.get(name) for name in ("expert", "gather", "scatter", "reduction")]
    x, weight, grad = leaves["x"].detach(), leaves["matrices"].detach().mT, torch.randn(options.get("n_out", 9), O)
    for backend in ("torch",) if cpu.PROBLEM else ("torch", "cpu"):
        _, dweight, _ = torch.ops.sparse_ffn.cvmm_backward(grad, x, weight, *rest, True, backend)
        assert dweight.stride() == weight.stride()


@dtypes
@pytest.mark.parametrize(
    "scatter", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 1, 0, 2, 7, 3, 5, 4, 6], [8, 1, 0, 2, 7, 3, 5, 4, 4]]
)
@pytest.mark.parametrize("slots", [9, 0])
def test_cvmm_of_few_rows_and_transposed_weights(
    slots: int, scatter: list[int], dtype: torch.dtype, poisoned: None
) -> None:
    tensors = {
        "x": leaf(4, D, dtype=dtype),
        "matrices": leaf(E, O, D, dtype=dtype),
        "expert": torch.randint(0, E, (slots,)),
        "gather": torch.randint(0, 4, (slots,)),
        "scatter": torch.tensor(scatter[:slots], dtype=torch.int64),
        "reduction": leaf(slots, dtype=torch.promote_types(dtype, torch.float32)),
    }
    assert_meets_reference(lambda matrices, **t: ops.cvmm(weight=matrices.mT, **t, n_out=slots), tensors, dtype)


WIDE = 40_000
"""So wide that the packed weights of 50 units are several of the core's blocks of columns."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_large_experts_are_multiplied_in_blocks(dtype: torch.dtype, poisoned: None) -> None:
    """One that is packed, one whose few rows are not, and one without a token."""
    index = torch.tensor([0] * 20 + [1] * 3).unsqueeze(1)
    tensors = {
        "x": leaf(23, WIDE, dtype=dtype),
        "keys": leaf(3, 50, WIDE, dtype=dtype),
        "values": leaf(3, 50, WIDE, dtype=dtype),
        "index": index,
        "gate": torch.rand(23, 1).requires_grad_(),
        "gate_keys": leaf(3, 50, WIDE, dtype=dtype),
        "key_bias": leaf(3, 50, dtype=dtype),
        "dropout_mask": (torch.rand(23, 1, 50) > 0.3).to(dtype) / 0.7,
    }
    with torch.no_grad():  # products of about one
        for name in ("keys", "values", "gate_keys"):
            tensors[name] /= WIDE**0.5
    assert_meets_reference(lambda **t: flat.expert_ffn(**t, activation="relu"), tensors, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slots", [3, 30])
def test_large_matrices_are_multiplied_in_blocks(slots: int, transposed: bool, poisoned: None) -> None:
    """The gradient of the reduction weights is a sum over the columns of all blocks."""
    shape = (2, 50, WIDE) if transposed else (2, WIDE, 50)
    tensors = {
        "x": leaf(slots, WIDE, dtype=torch.float32),
        "matrices": leaf(*shape, dtype=torch.float32),
        "expert": torch.arange(slots) % 2,
        "scatter": torch.arange(slots),
        "reduction": leaf(slots, dtype=torch.float32),
    }
    with torch.no_grad():
        tensors["matrices"] /= WIDE**0.5

    def wide(matrices: Tensor, **t: Any) -> Tensor:
        return ops.cvmm(weight=matrices.mT if transposed else matrices, **t, n_out=slots)

    def narrow(matrices: Tensor, x: Tensor, **t: Any) -> Tensor:
        return ops.cvmm(x[:, :50], matrices if transposed else matrices.mT, **t, n_out=slots)

    assert_meets_reference(wide, tensors, torch.float32)
    assert_meets_reference(narrow, tensors, torch.float32)


def test_a_gate_of_fp16_gets_its_gradient_where_that_of_its_row_would_overflow(on_backend: str) -> None:
    """Rows of 1e-4, whose gradients are 3e5: fp16 ends at 65504."""
    x, values = torch.full((2, 2), 1e-4), torch.full((1, 2, 3), 1e5)
    expert, gate = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.float16).requires_grad_()
    by_cvmm = functional.cvmm(x, values, expert[:, 0], reduction_weight=gate[:, 0])
    by_experts = functional.expert_ffn(x, torch.eye(2).unsqueeze(0), values, expert, gate)
    for y in (by_cvmm, by_experts):
        (dgate,) = torch.autograd.grad(y.sum(), gate)
        torch.testing.assert_close(dgate, torch.full_like(gate, 60))


SMALL_GATES = pytest.mark.parametrize("size", [1.0, 1e3], ids=["small products", "large products"])


def small_gates(size: float) -> tuple[Tensor, ...]:
    """Tokens, experts, their gates, a gradient, all for fp16 but the gates; and the gradient of the values."""
    gate = torch.full((80, 1), 1e-5 if size == 1.0 else 3e4)
    x, weight = 1e-2 * size * torch.randn(80, 32), torch.randn(2, 32, 40).half().requires_grad_()
    half, grad = x.half(), (500 / size**2 * torch.randn(80, 40)).half()
    wanted = torch.stack([gate[0, 0] * half[e::2].double().T @ grad[e::2].double() for e in range(2)])
    return half, weight, gate, grad, wanted


@SMALL_GATES
def test_small_gates_keep_the_digits_of_a_scaled_loss_in_fp16(size: float, on_backend: str) -> None:
    """h times a gate may lie beyond fp16's range, below or above, where the gradient of the values does not."""
    half, weight, gate, grad, wanted = small_gates(size)
    y = functional.cvmm(half, weight, torch.arange(80).remainder(2), reduction_weight=gate.flatten())
    (found,) = torch.autograd.grad(y, weight, grad)
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


@SMALL_GATES
@pytest.mark.parametrize("backend", BACKENDS[1:])  # the reference weighs h in the dtype of x
def test_so_do_those_of_experts(size: float, backend: str) -> None:
    half, weight, gate, grad, wanted = small_gates(size)
    index, keys = torch.arange(80).remainder(2).unsqueeze(1), torch.eye(32).half().expand(2, 32, 32)
    with sf.backend(backend):
        y = functional.expert_ffn(half, keys, weight, index, gate, activation="identity")
        (found,) = torch.autograd.grad(y, weight, grad)
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(("dtype", "bags"), [(torch.bfloat16, 4096), (torch.float16, 8192)])
def test_a_row_that_many_bags_read_has_the_sum_of_their_gradients(
    dtype: torch.dtype, bags: int, sparse_grad: bool, on_backend: str
) -> None:
    """Added one by one in 16 bits it would end at 256 or 2048."""
    values = torch.zeros(300, 4, dtype=dtype, requires_grad=True)
    index = torch.cat([torch.zeros(bags, 1, dtype=torch.int64), torch.arange(300).unsqueeze(1)])
    y = functional.weighted_bag(values, index, torch.ones(len(index), 1), sparse_grad=sparse_grad)
    (found,) = torch.autograd.grad(y, values, torch.ones_like(y))
    found = found.to_dense()
    assert found[0].tolist() == pytest.approx([bags + 1] * 4, rel=0.01)
    assert (found[1:] == 1).all()


def test_a_sparse_gradient_that_nobody_asks_for_asks_for_nothing() -> None:
    layer, x = sf.ProductKeyMemory(8, 5, 7, sparse_grad=True).eval(), torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(one) for one in x]))
        program = torch.export.export(layer, (x[0],), dynamic_shapes={"x": {0: torch.export.Dim("tokens")}})
        torch.testing.assert_close(program.module()(x[1][:2]), layer(x[1][:2]))


def test_two_cvmms_make_the_sigma_moe_of_the_paper(on_backend: str) -> None:
    """Up: gathered by token; down: scattered by token with the gates as reduction weights (appendix B.1)."""
    layer, x = sf.SigmaMoE(D, E, G, 2), torch.randn(11, D)
    _, index, gate = layer.router(x)
    token = torch.arange(11).repeat_interleave(2)
    h = functional.cvmm(x, layer.keys.transpose(1, 2), index.flatten(), gather_index=token).relu()
    y = functional.cvmm(
        h, layer.values, index.flatten(), scatter_index=token, reduction_weight=gate.flatten(), n_out=11
    )
    torch.testing.assert_close(y, layer(x))


@dtypes
@pytest.mark.parametrize(("table", "bags", "width"), [(9, 6, 3), (300, 6, 3), (300, 1, 1), (9, 0, 3)])
def test_weighted_bag_meets_its_reference(
    table: int, bags: int, width: int, dtype: torch.dtype, poisoned: None
) -> None:
    tensors = {
        "values": leaf(table, O, dtype=dtype),
        "index": torch.randint(0, min(table, 5), (bags, width)),  # few rows: many repeats, in a bag too
        "weight": torch.randn(bags, width, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_(),
    }
    assert_meets_reference(ops.weighted_bag, tensors, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bags", "columns"), [(1, 64), (1, 200), (3, 130), (40, 150)])
def test_weighted_bag_of_wide_rows_meets_its_reference(bags: int, columns: int, dtype: torch.dtype) -> None:
    tensors = {  # a few threads share a row, and one pass over the table takes all columns
        "values": leaf(30, columns, dtype=dtype),
        "index": torch.randint(0, 20, (bags, 9)),
        "weight": torch.randn(bags, 9).requires_grad_(),
    }
    assert_meets_reference(ops.weighted_bag, tensors, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_bag_of_a_large_table_whose_rows_are_read_often_meets_its_reference(dtype: torch.dtype) -> None:
    tensors = {  # the core sorts slots by row, 1024 bags or more at a time; a block of columns has a ragged end
        "values": leaf(2050, 1037, dtype=dtype),
        "index": torch.randint(0, 2050, (1400, 9)),
        "weight": torch.randn(1400, 9).requires_grad_(),
    }
    assert_meets_reference(ops.weighted_bag, tensors, dtype)


def test_sparse_gradient_of_the_bag_is_the_dense_one_on_the_rows_read(on_backend: str) -> None:
    values, index = torch.randn(300, O, requires_grad=True), torch.randint(0, 40, (6, 3))
    weight = torch.randn(6, 3, requires_grad=True)
    dense = torch.autograd.grad(ops.weighted_bag(values, index, weight).square().sum(), (values, weight))
    sparse = torch.autograd.grad(
        ops.weighted_bag(values, index, weight, sparse_grad=True).square().sum(), (values, weight)
    )
    assert sparse[0].is_sparse
    assert sparse[0].is_coalesced()
    assert sparse[0]._nnz() == index.unique().numel()
    torch.testing.assert_close(sparse[0].to_dense(), dense[0])
    torch.testing.assert_close(sparse[1], dense[1])
    table = values.detach().requires_grad_()
    ops.weighted_bag(table, index, weight, sparse_grad=True).square().sum().backward()
    assert torch.equal(table.grad._indices()[0], index.unique())  # each once and in order, though not marked so


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_weighted_bag_reads_strided_indices_and_weights(sparse_grad: bool, on_backend: str) -> None:
    """One row a bag is where the flattened index of a table this large stays a strided view."""
    index, weight = torch.randint(0, 300, (6, 2)), torch.randn(6, 2)
    index[:, 1] = 2**40
    values = torch.randn(300, O, requires_grad=True)
    out = ops.weighted_bag(values, index[:, :1], weight[:, :1], sparse_grad=sparse_grad)
    torch.testing.assert_close(out, values[index[:, 0]] * weight[:, :1])
    (dvalues,) = torch.autograd.grad(out.sum(), values)
    torch.testing.assert_close(dvalues.to_dense().sum(), O * weight[:, 0].sum())


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_rows_of_width_zero_are_rows(sparse_grad: bool, on_backend: str) -> None:
    values, index = torch.randn(300, 0, requires_grad=True), torch.randint(0, 300, (6, 2))
    weight = torch.randn(6, 2, requires_grad=True)
    out = ops.weighted_bag(values, index, weight, sparse_grad=sparse_grad)
    assert out.shape == (6, 0)
    dvalues, dweight = torch.autograd.grad(out.sum(), (values, weight))
    assert dvalues.shape == values.shape
    assert torch.equal(dweight, torch.zeros(6, 2))
    x, keys, value, bias = torch.randn(6, 0), torch.randn(E, G, 0), torch.ones(E, G, O), torch.ones(E, G)
    y = flat.expert_ffn(x, keys, value, index % E, weight)
    assert torch.equal(y, torch.zeros(6, O))
    for gate in (weight, weight.detach()):  # a GLU is one although its keys have no memory: what gates is 0
        y = flat.expert_ffn(x, keys, value, index % E, gate, gate_keys=keys, key_bias=bias)
        assert torch.equal(y, torch.zeros(6, O))


@dtypes
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "units", "k"), [(7, 11, 3), (1, 11, 1), (0, 11, 3), (5, 200, 2), (5, 11, 11)])
def test_topk_ffn_meets_its_reference(
    tokens: int, units: int, k: int, activation: str, form: str, dtype: torch.dtype, poisoned: None
) -> None:
    # small whole numbers and exact activations keep the ranking the same in every precision
    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape).to(dtype).requires_grad_()

    tensors = {"x": whole(tokens, D), "keys": whole(units, D), "values": leaf(units, O, dtype=dtype)}
    options: dict[str, Any] = {"k": k, "activation": activation}
    if form == "everything":
        tensors |= {
            "gate_keys": whole(units, D),
            "key_bias": whole(units),
            "dropout_mask": torch.randint(0, 2, (tokens, units)).to(dtype) * 2,
        }
    if activation in SMOOTH and dtype in (torch.float16, torch.bfloat16) and k < units:
        tensors = {n: t.detach().float().requires_grad_(t.requires_grad) for n, t in tensors.items()}
        dtype = torch.float32  # rounded activations make ties that float64 does not have: compare where it can be
    assert_meets_reference(lambda **t: flat.topk_ffn(**t, **options), tensors, dtype)


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize(("forward", "back"), [(False, False), (False, True), (True, False)])
def test_topk_ffn_in_the_core_is_the_same_gathered_or_dense(
    forward: bool, back: bool, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    monkeypatch.setattr(topk_ffn, "gathers", lambda *sizes: forward)
    monkeypatch.setattr(topk_ffn, "gathers_back", lambda *sizes: back)
    for (tokens, units, k), activation in itertools.product(
        [(7, 11, 3), (1, 32, 32), (0, 11, 3), (5, 200, 70)], ["relu", "silu", "identity"]
    ):
        test_topk_ffn_meets_its_reference(tokens, units, k, activation, form, dtype, None)


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
def test_the_core_predicts_that_few_rows_are_gathered_and_many_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    for rate in topk_ffn.PRODUCTS.values():
        monkeypatch.setattr(topk_ffn, "_rate", lambda dtype, rate=rate: rate)
        for tokens, gathers in itertools.product((1, 32, 2048), (topk_ffn.gathers, topk_ffn.gathers_back)):
            chosen = [gathers(tokens, 4096, k, 1024, torch.float32) for k in range(1, 4097, 15)]
            assert chosen == sorted(chosen, reverse=True)  # from some k on dense
            assert not chosen[-1] or tokens == 1  # which reads no row twice
        assert topk_ffn.gathers(2048, 4096, 100, 1024, torch.float32)
        assert topk_ffn.gathers(1, 4096, 2048, 1024, torch.float32)  # the rows come from memory in any case


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 1), (3, 4), (3, 9), (7, 5), (40, 32), (5, 25), (40, 700)])
@pytest.mark.parametrize("scores", ["distinct", "tied", "all equal"])
def test_product_key_topk_is_the_top_k_of_all_sums(n: int, k: int, scores: str, on_backend: str) -> None:
    first, second = torch.randn(6, 2, n), torch.randn(6, 2, n)
    if scores == "tied":
        first, second = first.round(), second.round()
    if scores == "all equal":
        first, second = torch.zeros_like(first), torch.zeros_like(second)
    best, index = functional.product_key_topk(first, second, k)
    every = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)
    assert torch.equal(best, every.sort(dim=-1, descending=True).values[..., :k])
    assert torch.equal(every.gather(-1, index), best)
    assert all(len(set(row)) == k for row in index.flatten(0, 1).tolist())


def test_product_keys_of_more_sub_keys_than_a_kernel_counts(on_backend: str) -> None:
    first, second = (torch.randn(2, 40_000, requires_grad=True) for _ in range(2))
    best, index = functional.product_key_topk(first, second, 4)
    assert torch.equal(first.gather(-1, index // 40_000) + second.gather(-1, index % 40_000), best)
    tops = [t.detach().topk(4).values for t in (first, second)]
    every = (tops[0].unsqueeze(-1) + tops[1].unsqueeze(-2)).flatten(-2)
    assert torch.equal(best, every.topk(4).values)
    best.sum().backward()
    assert first.grad is not None
    assert first.grad.sum() == 8
    assert torch.equal(first.grad, torch.zeros_like(first).scatter_add_(-1, index // 40_000, torch.ones_like(best)))


def test_product_keys_of_either_16_bit_dtype_under_autocast_of_the_other(on_backend: str) -> None:
    """Autocast casts what is multiplied, and refuses to stack the dtype that it does not cast to."""
    for dtype, other in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        scores = torch.randn(2, 3, 5).to(dtype)
        with torch.autocast("cpu", other):
            best, index = functional.product_key_topk(*scores, 4)
            with pytest.raises(TypeError, match="second has dtype"):
                functional.product_key_topk(scores[0], scores[1].to(other), 4)
        expected = functional.product_key_topk(*scores, 4)
        assert torch.equal(best, expected[0])
        assert torch.equal(index, expected[1])


def test_product_keys_are_exported_for_any_number_of_rows(on_backend: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            return functional.product_key_topk(first, second, 3)

    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(Module(), (torch.randn(6, 5), torch.randn(6, 5)), dynamic_shapes=(rows, rows))
    scores = torch.randn(2, 9, 5)
    torch.testing.assert_close(program.module()(*scores), functional.product_key_topk(*scores, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scores_may_lie_anywhere(dtype: torch.dtype, on_backend: str) -> None:
    """In another order, between gaps, or with other numbers between those of a row, as members of a vmap do."""
    scores = torch.randn(4, 3, 2, 5).to(dtype)
    grad = torch.randn(4, 3, 6).to(dtype)
    by_halves = scores.movedim(2, 0).contiguous().movedim(0, 2)
    by_columns = scores.movedim(3, 0).contiguous().movedim(0, 3)
    gaps, mixed = torch.zeros(4, 3, 2, 7, dtype=dtype)[..., :5], torch.zeros(4, 3, 2, 5, 2, dtype=dtype)[..., 0]
    expected = None
    for table in (scores, by_halves, by_columns, gaps.copy_(scores), mixed.copy_(scores)):
        best, _ = ops.product_key_topk(table.requires_grad_(), 6)
        (found,) = torch.autograd.grad(best, table, grad)
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
        assert found.stride() == table.stride() or on_backend == "reference"


@pytest.mark.parametrize("k", [1, 2, 5, 32])
def test_only_pairs_that_can_win_are_summed(k: int) -> None:
    pairs = list(zip(*(p.tolist() for p in candidate_pairs(1000, k, torch.device("cpu"))), strict=True))
    assert pairs == [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
    if k == 32:
        assert len(pairs) == 119


@dtypes
@pytest.mark.parametrize("n", [1, 5, 129])
def test_stable_topk_is_the_stable_sort(n: int, dtype: torch.dtype) -> None:
    scores = torch.randn(50, n).to(dtype)
    scores[:20] = scores[:20].round()
    scores[20:30] = torch.where(torch.rand(10, n) < 0.5, -torch.inf, scores[20:30])
    scores[30] = 0
    scores[31] = -0.0
    scores[31, ::2] = 0.0
    scores[32] = -torch.inf
    scores[33] = scores[33] * 1e-30
    for k in {1, n // 2 + 1, n}:
        assert torch.equal(stable_topk(scores, k), scores.sort(dim=-1, descending=True, stable=True).indices[:, :k])


@pytest.mark.parametrize("backend", ["torch"] if cpu.PROBLEM else ["torch", "cpu"])
def test_opcheck_holds_for_every_op(backend: str) -> None:
    library = torch.ops.sparse_ffn
    index = torch.rand(6, E).topk(2).indices
    x, keys, values = torch.randn(6, D), torch.randn(E, G, D), torch.randn(E, G, O)
    gate, bias, scale = torch.rand(6, 2), torch.randn(E, G), torch.rand(6, 2, G)
    slot = torch.arange(6)

    def grad(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.clone().requires_grad_() for t in tensors)

    for gate_keys, key_bias, dropout_mask in ((None, None, None), (keys.flip(0), bias, scale)):
        xg, kg, vg, gg, ug, bg = grad(x, keys, values, gate, gate_keys, key_bias)
        call = (xg, kg, vg, ug, bg, index, gg, dropout_mask, "gelu", backend)
        torch.library.opcheck(library.expert_ffn.default, call)
        plain = (x, keys, values, gate_keys, key_bias, index, gate, dropout_mask, "gelu", backend)
        torch.library.opcheck(library.expert_ffn_inference.default, plain)
        saved = [t.detach() for t in library.expert_ffn(*call)[1:]]
        operands = (torch.randn(6, O), x, keys, values, gate_keys, key_bias, gate, dropout_mask, *saved)
        torch.library.opcheck(library.expert_ffn_backward.default, (*operands, True, "gelu", backend))

        first_keys, first_values = keys[0], values[0]
        units = tuple(None if t is None else t[0] for t in (gate_keys, key_bias))
        dropped = None if dropout_mask is None else torch.rand(6, G)
        xg, kg, vg, ug, bg = grad(x, first_keys, first_values, *units)
        for rank_by in ("hidden",) if ug is None else ("hidden", "gate"):
            call = (xg, kg, vg, ug, bg, 3, dropped, "silu", True, rank_by, backend)
            torch.library.opcheck(library.topk_ffn.default, call)
            saved = [t.detach() for t in library.topk_ffn(*call)[1:]]
            back = (torch.randn(6, O), x, first_keys, first_values, *units, dropped, *saved)
            torch.library.opcheck(library.topk_ffn_backward.default, (*back, True, "silu", backend))

    table = torch.randn(9, O)
    vg, gg = grad(table, gate)
    torch.library.opcheck(library.weighted_bag.default, (vg, index, gg, backend))
    torch.library.opcheck(library.weighted_bag_backward.default, (torch.randn(6, O), table, index, gate, True, backend))
    for gather, scatter, reduction in ((None, None, None), (slot.flip(0), slot // 2, torch.rand(6))):
        xg, wg, rg = grad(x, keys.transpose(1, 2), reduction)
        call = (xg, wg, index[:, 0], gather, scatter, rg, 6, backend)
        torch.library.opcheck(library.cvmm.default, call)
        back = (torch.randn(6, G), x, keys.transpose(1, 2), index[:, 0], gather, scatter, reduction, True, backend)
        torch.library.opcheck(library.cvmm_backward.default, back)
    scores = torch.randn(2, 3, 4, 5).permute(2, 1, 0, 3).detach().requires_grad_()
    torch.library.opcheck(library.product_key_topk.default, (scores, 6, backend))
    _, picked = functional.product_key_topk(scores[:, :, 0], scores[:, :, 1], 6)
    picked = picked.reshape(4, 3, 6)
    torch.library.opcheck(
        library.product_key_topk_backward.default,
        (torch.randn(4, 3, 6), picked, scores.shape, scores.stride(), backend),
    )


SLOTS = torch.arange(20)
BACKWARD: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "cvmm": (lambda x, w, gate: functional.cvmm(x, w, SLOTS % E, reduction_weight=gate), ((20, D), (E, D, O), (20,))),
    "expert_ffn": (
        lambda x, keys, values, gate: functional.expert_ffn(x, keys, values, SLOTS.view(10, 2) % E, gate),
        ((10, D), (E, G, D), (E, G, O), (10, 2)),
    ),
    "topk_ffn": (lambda x, keys, values: functional.topk_ffn(x, keys, values, 3), ((10, D), (G, D), (G, O))),
    "topk_ffn, dense": (
        lambda x, keys, values: functional.topk_ffn(x, keys, values, 250),
        ((40, 16), (300, 16), (300, 16)),
    ),
    "weighted_bag": (lambda v, w: functional.weighted_bag(v, SLOTS.view(10, 2), w), ((20, O), (10, 2))),
    "weighted_bag, sparse": (
        lambda v, w: functional.weighted_bag(v, SLOTS.view(10, 2), w, sparse_grad=True),
        ((20, O), (10, 2)),
    ),
}


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("rows", [9, 200], ids=["small", "large"])
def test_bags_are_rounded_once_under_autocast(rows: int, sparse_grad: bool, on_backend: str) -> None:
    """To the last bit what they are without it, and so are the gradients for that of the rounded ones."""
    values, weight = leaf(rows, O, dtype=torch.float32), leaf(4, 3, dtype=torch.float32)
    index = torch.randint(rows, (4, 3))
    expected = functional.weighted_bag(values, index, weight, sparse_grad=sparse_grad)
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.weighted_bag(values, index, weight, sparse_grad=sparse_grad)
    assert torch.equal(found, expected.bfloat16())
    grad = torch.randn_like(found)
    grads = (torch.autograd.grad(y, (values, weight), grad.to(y.dtype)) for y in (found, expected))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a.to_dense(), b.to_dense())


@pytest.mark.parametrize("backend", ["torch"] if cpu.PROBLEM else ["torch", "cpu"])
@pytest.mark.parametrize("name", BACKWARD)
def test_a_backward_pass_inside_of_autocast_is_that_of_its_forward_pass(name: str, backend: str) -> None:
    op, shapes = BACKWARD[name]
    tensors = [leaf(*shape, dtype=torch.float32) for shape in shapes]
    with sf.backend(backend):
        y = op(*tensors)
        grad = torch.randn_like(y)
        expected = torch.autograd.grad(y, tensors, grad, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(y, tensors, grad)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.to_dense(), b.to_dense())


def arguments(name: str) -> dict[str, Any]:
    index = torch.zeros(3, 2, dtype=torch.int64)
    return {
        "cvmm": {"x": torch.randn(3, D), "weight": torch.randn(E, D, O), "expert_index": index[:, 0]},
        "expert_ffn": {
            "x": torch.randn(3, D),
            "keys": torch.randn(E, G, D),
            "values": torch.randn(E, G, O),
            "index": index,
            "gate": torch.rand(3, 2),
        },
        "weighted_bag": {"values": torch.randn(9, O), "index": index, "weight": torch.rand(3, 2)},
        "product_key_topk": {"first": torch.randn(3, 4), "second": torch.randn(3, 4), "k": 2},
        "topk_ffn": {"x": torch.randn(3, D), "keys": torch.randn(G, D), "values": torch.randn(G, O), "k": 2},
    }[name]


@pytest.mark.parametrize("name", ["cvmm", "expert_ffn", "weighted_bag", "product_key_topk", "topk_ffn"])
def test_functional_accepts_good_arguments(name: str, on_backend: str) -> None:
    y = getattr(functional, name)(**arguments(name))
    assert (y[0] if isinstance(y, tuple) else y).isfinite().all()


three = torch.zeros(3, dtype=torch.int64)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("cvmm", {"x": torch.zeros(3, D, dtype=torch.int64)}, TypeError, "x must be a floating tensor, got int64"),
    ("cvmm", {"x": torch.zeros(D)}, ValueError, "x must have 2 dimensions"),
    ("cvmm", {"weight": torch.zeros(E, D + 1, O)}, ValueError, "weight must have shape"),
    ("cvmm", {"weight": torch.zeros(E, D, O).double()}, TypeError, "weight has dtype torch.float64"),
    ("cvmm", {"expert_index": three.int()}, TypeError, "expert_index must be int64, got int32"),
    ("cvmm", {"expert_index": three + E + 1}, IndexError, r"expert_index must be in \[0, 5\]"),
    ("cvmm", {"expert_index": three - 1}, IndexError, "got values from -1 to -1"),
    ("cvmm", {"expert_index": three[:2]}, ValueError, "without gather_index"),
    ("cvmm", {"gather_index": three + 3}, IndexError, r"gather_index must be in \[0, 3\)"),
    ("cvmm", {"scatter_index": three}, ValueError, "n_out must be given"),
    ("cvmm", {"scatter_index": three + 2, "n_out": 2}, IndexError, r"scatter_index must be in \[0, 2\)"),
    ("cvmm", {"n_out": 4}, ValueError, "n_out must be the number of slots"),
    ("cvmm", {"n_out": 3.0}, TypeError, "n_out must be an int, got 3.0"),
    ("cvmm", {"n_out": True}, TypeError, "n_out must be an int, got True"),
    ("cvmm", {"n_out": -1, "scatter_index": three}, ValueError, "n_out must be at least 0, got -1"),
    ("cvmm", {"reduction_weight": torch.zeros(4)}, ValueError, "reduction_weight must have shape"),
    ("expert_ffn", {"keys": torch.zeros(E, G, D + 1)}, ValueError, "keys must have shape"),
    ("expert_ffn", {"values": torch.zeros(E, G + 1, O)}, ValueError, "values must have shape"),
    ("expert_ffn", {"gate_keys": torch.zeros(E, G, D + 1)}, ValueError, "gate_keys must have shape"),
    ("expert_ffn", {"key_bias": torch.zeros(E, G + 1)}, ValueError, "key_bias must have shape"),
    ("expert_ffn", {"index": torch.full((3, 2), E + 1)}, IndexError, r"index must be in \[0, 5\]"),
    ("expert_ffn", {"index": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, "index must have shape"),
    ("expert_ffn", {"gate": torch.zeros(3, 1)}, ValueError, "gate must have shape"),
    ("expert_ffn", {"activation": "tanh"}, ValueError, "activation must be one of 'relu'"),
    ("weighted_bag", {"index": torch.full((3, 2), 9)}, IndexError, r"index must be in \[0, 9\)"),
    ("weighted_bag", {"index": torch.zeros(3, 2)}, TypeError, "index must be int64, got float32"),
    ("weighted_bag", {"weight": torch.zeros(3, 4)}, ValueError, "index must have shape"),
    (
        "cvmm",
        {"x": torch.zeros(3, D).to(torch.float8_e5m2)},
        TypeError,
        "x must be float64, float32, bfloat16 or float16",
    ),
    ("product_key_topk", {"second": torch.zeros(3, 4).half()}, TypeError, "second has dtype torch.float16, first has"),
    ("product_key_topk", {"second": torch.zeros(3, 5)}, ValueError, "must have one shape"),
    ("product_key_topk", {"k": 17}, ValueError, "k must be at least 1 and at most n² = 16, got 17"),
    ("topk_ffn", {"k": 0}, ValueError, "k must be at least 1 and at most d_ff = 7, got 0"),
    ("topk_ffn", {"k": 2.0}, TypeError, "k must be an int"),
    ("topk_ffn", {"values": torch.zeros(G + 1, O)}, ValueError, "values must have shape"),
    ("topk_ffn", {"keys": torch.zeros(G, D).half()}, TypeError, "keys has dtype torch.float16"),
]


@pytest.mark.parametrize(("name", "change", "error", "words"), BAD)
def test_functional_refuses_bad_arguments(
    name: str, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        getattr(functional, name)(**(arguments(name) | change))


INDICES = {  # every index argument: what else a call with it takes, its range, and the first index out of it
    ("cvmm", "expert_index"): ({}, f"[0, {E}]", E + 1),
    ("cvmm", "gather_index"): ({}, "[0, 3)", 3),
    ("cvmm", "scatter_index"): ({"n_out": 4}, "[0, 4)", 4),
    ("expert_ffn", "index"): ({}, f"[0, {E}]", E + 1),
    ("weighted_bag", "index"): ({}, "[0, 9)", 9),
}


@pytest.mark.parametrize(("name", "argument"), INDICES)
@pytest.mark.parametrize("bad", ["limit", -1, 2**32, -(2**63), 2**63 - 1])
def test_indices_out_of_range_are_refused_by_name_on_every_backend(
    name: str, argument: str, bad: int | str, on_backend: str
) -> None:
    """2**32 would be index 0 in 32 bits."""
    options, allowed, limit = INDICES[name, argument]
    good = arguments(name) | options
    index = good.get(argument, torch.zeros(3, dtype=torch.int64)).clone()
    getattr(functional, name)(**good | {argument: index})
    index[-1] = limit if bad == "limit" else bad
    with pytest.raises(IndexError, match=f"^{argument} must be in {re.escape(allowed)}, got values from"):
        getattr(functional, name)(**good | {argument: index})


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_bag_of_an_index_out_of_range_is_refused_with_a_sparse_gradient_too(
    sparse_grad: bool, on_backend: str
) -> None:
    good = arguments("weighted_bag")
    with pytest.raises(IndexError, match=r"^index must be in"):
        functional.weighted_bag(good["values"], good["index"] + 9, good["weight"], sparse_grad=sparse_grad)


@pytest.mark.parametrize("glu", [False, True])
def test_a_relu_expert_ffn_keeps_its_hidden_units_its_gates_and_the_order_for_backward(
    glu: bool, on_backend: str
) -> None:
    """At most T·k·G + 4·T·k elements beside x and the parameters; a GLU keeps both of its halves."""
    tokens, k = 200, 3
    x, keys, values, gate_keys = (
        torch.randn(*shape, requires_grad=True) for shape in ((tokens, D), (E, G, D), (E, G, O), (E, G, D))
    )
    index, gate = torch.rand(tokens, E).topk(k).indices, torch.rand(tokens, k, requires_grad=True)
    given = {t.untyped_storage().data_ptr() for t in (x, keys, values, gate_keys)}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        functional.expert_ffn(x, keys, values, index, gate, gate_keys=gate_keys if glu else None)
    elements = sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values())
    if on_backend != "reference":  # which computes every expert for every token
        assert elements <= tokens * k * (G * (1 + glu) + 4)


def test_fp64_mixes_with_no_other_dtype_under_autocast_either() -> None:
    x, units = torch.randn(3, 4), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for x_, units_ in ((x, units.double()), (x.double(), units)):
            with pytest.raises(TypeError, match=r"keys has dtype torch\.float"):
                functional.topk_ffn(x_, units_, units_, 2)
        assert functional.topk_ffn(x, units, units, 2).dtype == torch.bfloat16
