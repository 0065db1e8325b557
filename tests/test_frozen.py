"""Frozen experts, as under adapters: what trains gets the same gradients, and nothing is computed for the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_ffn as sf
from sparse_ffn.backends import cpu
from sparse_ffn.ops.cvmm import op as cvmm
from sparse_ffn.ops.expert_ffn import op as expert_ffn
from sparse_ffn.ops.routed_ffn import cpu as routed_ffn

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from net import check_frozen, cvmm_case, expert_case

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
def test_nothing_as_large_as_a_frozen_matrix_is_made(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, keys, weight, gate = torch.randn(2, 64), torch.randn(6, 32, 64), torch.randn(6, 64, 64), torch.rand(2, 2)
    index = torch.tensor([[0, 3], [5, 3]])
    for op, module in (("expert_ffn", expert_ffn), ("cvmm", cvmm)):
        made = watched(module.implementation(backend), monkeypatch)
        for trains in (False, True):
            leaf = x.clone().requires_grad_()
            experts = [t.clone().requires_grad_(trains) for t in (keys, keys, keys, weight)]
            with sf.backend(backend):
                if op == "cvmm":
                    y = sf.functional.cvmm(leaf, experts[3], index[:, 0])
                else:
                    y = sf.functional.expert_ffn(leaf, *experts[:2], index, gate, gate_keys=experts[2])
                y.sum().backward()
            assert (made.most >= keys.numel()) == trains


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
