"""Frozen experts, as under adapters: what trains gets the same gradients, and nothing is computed for the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_ffn as sf
from sparse_ffn import ops
from sparse_ffn.backends import cpu
from sparse_ffn.ops.cvmm import op as cvmm
from sparse_ffn.ops.expert_ffn import op as expert_ffn
from sparse_ffn.ops.routed_ffn import cpu as routed_ffn
from sparse_ffn.ops.topk_ffn import op as topk_ffn
from sparse_ffn.ops.weighted_bag import op as weighted_bag
from sparse_ffn.ops.wide_product import cpu as wide_product

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from net import Case, Gradients, check_frozen, cvmm_case, expert_case, random

backends = pytest.mark.parametrize("backend", ["torch"] if cpu.PROBLEM else ["torch", "cpu"])


class Allocated(TorchDispatchMode):
    """The most numbers in a tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given]
        self.most = max(self.most, *(t.numel() for t in made), 0)
        return result


def watched(module: Any, monkeypatch: pytest.MonkeyPatch) -> Allocated:
    """What a backend's backward pass makes from now on."""
    allocated, backward = Allocated(), module.backward

    def inside(*arguments: Any) -> Any:
        with allocated:
            return backward(*arguments)

    monkeypatch.setattr(module, "backward", inside)
    return allocated


@backends
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_gradients_are_the_same_but_for_the_experts(form: str, backend: str) -> None:
    check_frozen(expert_case("random", form=form), backend=backend)
    check_frozen(
        cvmm_case("random", form="gather" if form == "plain" else "gather, scatter, reduction"), backend=backend
    )


@backends
@pytest.mark.parametrize("sparse", [True, False], ids=["gathered", "dense"])
@pytest.mark.parametrize("index", [torch.randint(0, 11, (7, 5)), torch.full((9, 2), 3), torch.empty(0, 3).long()])
def test_a_frozen_table_gets_no_gradient(
    index: Tensor, sparse: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weighted_bag.implementation("torch"), "_dense", lambda *tensors: not sparse)
    tensors = {"values": random(11, 33), "index": index, "weight": random(*index.shape)}
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(ops.weighted_bag, tensors, dtype, {}, ("values", "weight"))
        check_frozen(case, backend=backend, exact=backend == "torch")


@backends
@pytest.mark.parametrize("sparse", [True, False], ids=["gathered", "dense"])
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_frozen_units_get_no_gradients(form: str, sparse: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted_bag.implementation("torch"), "_dense", lambda *tensors: not sparse)
    monkeypatch.setattr(topk_ffn.implementation("cpu"), "gathers_back", lambda *sizes: sparse)
    x, keys, values, bias = (torch.randn(shape) for shape in ((7, 10), (37, 10), (37, 19), (37,)))
    more = {"gate_keys": keys.flip(0), "key_bias": bias} if form == "everything" else {}

    def gradients(trains: bool) -> tuple[Tensor, list[int]]:
        leaf, *matrices = (t.clone().requires_grad_(trains) for t in (x, keys, values, *more.values()))
        named = dict(zip(more, matrices[2:], strict=True))
        with sf.backend(backend), Gradients() as made:
            y = sf.functional.topk_ffn(leaf.requires_grad_(), *matrices[:2], 6, **named, activation="silu")
            (dx,) = torch.autograd.grad(y, leaf, y.detach().cos())
        return dx, made.sizes

    dx, sizes = gradients(trains=False)
    assert sum(sizes) == x.numel()
    torch.testing.assert_close(dx, gradients(trains=True)[0])


CALLS: dict[str, tuple[Any, tuple[int, ...], Callable[..., Tensor]]] = {  # the op, the shape of a frozen matrix
    "cvmm": (cvmm, (6, 32, 64), lambda x, keys, slots, gate: sf.functional.cvmm(x, keys.mT, slots[:, 0])),
    "expert_ffn": (
        *(expert_ffn, (6, 32, 64)),
        lambda x, keys, slots, gate: sf.functional.expert_ffn(x, keys, keys, slots, gate, gate_keys=keys),
    ),
    "weighted_bag": (
        *(weighted_bag, (192, 64)),
        lambda x, table, slots, gate: sf.functional.weighted_bag(table, slots, gate),
    ),
    "topk_ffn": (
        *(topk_ffn, (192, 64)),
        lambda x, keys, slots, gate: sf.functional.topk_ffn(x, keys, keys, 3, gate_keys=keys),
    ),
}


@backends
@pytest.mark.parametrize("name", CALLS)
def test_nothing_as_large_as_a_frozen_matrix_is_made(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, shape, call = CALLS[name]
    made = watched(op.implementation(backend), monkeypatch)
    x, gate = torch.randn(2, 64).requires_grad_(), torch.rand(2, 2).requires_grad_()
    matrix, slots = torch.randn(shape), torch.tensor([[0, 3], [5, 3]])
    for trains in (False, True):
        with sf.backend(backend):
            call(x, matrix.requires_grad_(trains), slots, gate).sum().backward()
        assert made.most > 0
        assert (made.most >= matrix.numel()) == trains


@backends
def test_a_frozen_table_has_no_sparse_gradient_either(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = watched(weighted_bag.implementation(backend), monkeypatch)
    table, index, weight = torch.randn(192, 64), torch.tensor([[0, 3], [5, 3]]), torch.rand(2, 2).requires_grad_()
    with sf.backend(backend):
        sf.functional.weighted_bag(table, index, weight, sparse_grad=True).sum().backward()
    assert 0 < made.most < 3 * 64  # of the rows read
    torch.testing.assert_close(weight.grad, table[index].sum(-1))


@backends
@pytest.mark.parametrize("how", ["eager", "transformed", pytest.param("compiled", marks=pytest.mark.exhaustive)])
def test_a_layer_with_frozen_experts_trains_its_router(how: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = sf.SigmaMoE(16, 8, 32, 2, glu=True, activation="silu"), torch.randn(6, 16)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"router.weight": weight}, (x,)).square().sum()

    def gradient() -> Tensor:
        weight = layer.router.weight
        with sf.backend("auto" if backend == "cpu" else backend):
            if how == "transformed":
                return torch.func.grad(loss)(weight.detach(), x)
            call = torch.compile(loss, backend="aot_eager") if how == "compiled" else loss
            return torch.autograd.grad(call(weight, x), weight)[0]

    expected = gradient()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith("router"))
    made = watched(routed_ffn if backend == "cpu" else expert_ffn.implementation("torch"), monkeypatch)
    torch._dynamo.reset()
    assert torch.equal(gradient(), expected)
    assert 0 < made.most < layer.keys.numel()


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
@pytest.mark.parametrize("options", [{}, {"query_dim": 16}, {"query_dim": 16, "query_norm": None}], ids=str)
def test_a_frozen_memory_computes_no_gradient_of_its_keys(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = sf.ProductKeyMemory(8, 5, 3, n_heads=2, **options), torch.randn(40, 8, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    y = layer.requires_grad_(False)(x)
    monkeypatch.setattr(wide_product.cvmm, "weight_gradient", None)  # to call it is an error
    (found,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(found, expected)
