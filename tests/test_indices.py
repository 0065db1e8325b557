"""Indices out of range are refused however an op is called: eager, compiled, exported, transformed, or by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn import functional
from sparse_ffn.backends import cpu

BACKENDS = ("reference", "torch", *(() if cpu.PROBLEM else ("cpu",)))
S, N, E, R = 6, 7, 3, 5


@dataclass
class Call:
    """A function of the stateless API with arguments that are right, and where the range of each index ends."""

    function: Callable[..., Tensor]
    arguments: dict[str, Tensor]
    limits: dict[str, str]

    def wrong(self, name: str, value: int) -> dict[str, Tensor]:
        index = self.arguments[name].clone()
        index.view(-1)[1] = value
        return {**self.arguments, name: index}


def made() -> dict[str, Call]:
    index, gate = torch.arange(8).view(4, 2) % E, torch.rand(4, 2)
    slots = torch.arange(S)
    return {
        "cvmm": Call(
            partial(functional.cvmm, n_out=R),
            {
                "x": torch.randn(N, 4),
                "weight": torch.randn(E, 4, 5),
                "expert_index": slots % E,
                "gather_index": slots % N,
                "scatter_index": slots % R,
                "reduction_weight": torch.rand(S),
            },
            {"expert_index": f"{E}]", "gather_index": f"{N})", "scatter_index": f"{R})"},
        ),
        "expert_ffn": Call(
            functional.expert_ffn,
            {
                "x": torch.randn(4, 5),
                "keys": torch.randn(E, 3, 5),
                "values": torch.randn(E, 3, 6),
                "index": index,
                "gate": gate,
            },
            {"index": f"{E}]"},
        ),
        "weighted_bag": Call(
            functional.weighted_bag, {"values": torch.randn(E, 6), "index": index, "weight": gate}, {"index": f"{E})"}
        ),
    }


def named(name: str, limit: str, value: int) -> str:
    edge = f"from {value} to" if value < 0 else f"to {value}$"
    # (?m): torch 2.9 adds lines that say where in a graph of aot_eager it was
    return rf"(?m)\A{name} must be in {re.escape('[0, ' + limit)}, got values .*{edge}"


def values(limit: str) -> tuple[int, ...]:
    first = int(limit[:-1]) + limit.endswith("]")
    return -(2**63), -1, first, 2**31, 2**32, 2**32 + 1, 2**63 - 1


every_call = pytest.mark.parametrize("name", made())
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def check(call: Call, run: Callable[..., Any]) -> None:
    right = run(**call.arguments)
    for name, limit in call.limits.items():
        for value in values(limit):
            with pytest.raises(IndexError, match=named(name, limit, value)):
                run(**call.wrong(name, value))
    assert torch.equal(run(**call.arguments), right)


@every_backend
@every_call
@pytest.mark.parametrize("grad", [True, False])
def test_eager(name: str, backend: str, grad: bool) -> None:
    call = made()[name]
    for tensor in call.arguments.values():
        tensor.requires_grad_(grad and tensor.is_floating_point())
    with sf.backend(backend):
        check(call, call.function)


@every_backend
@every_call
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiled(name: str, backend: str, compiler: str) -> None:
    torch._dynamo.reset()
    call = made()[name]
    with sf.backend(backend):
        check(call, torch.compile(call.function, fullgraph=True, backend=compiler))


@every_backend
@every_call
def test_compiled_for_training(name: str, backend: str) -> None:
    torch._dynamo.reset()
    call = made()[name]
    for tensor in call.arguments.values():
        tensor.requires_grad_(tensor.is_floating_point())
    with sf.backend(backend):
        check(call, torch.compile(call.function, fullgraph=True, backend="aot_eager"))


@every_backend
@every_call
def test_exported(name: str, backend: str) -> None:
    call = made()[name]

    class Wrapper(nn.Module):
        def forward(self, **arguments: Tensor) -> Tensor:
            return call.function(**arguments)

    with sf.backend(backend):
        program = torch.export.export(Wrapper(), (), call.arguments)
    check(call, program.module())


@every_backend
@every_call
def test_under_vmap_and_grad(name: str, backend: str) -> None:
    """The index differs from member to member."""
    call = made()[name]
    weight = next(n for n, t in call.arguments.items() if t.is_floating_point())

    def slopes(**arguments: Tensor) -> Tensor:
        def loss(x: Tensor, rest: dict[str, Tensor]) -> Tensor:
            return call.function(**{**rest, weight: x}).square().sum()

        stacked = {n: torch.stack((call.arguments[n], t)) for n, t in arguments.items()}
        return torch.func.vmap(torch.func.grad(loss))(stacked[weight], stacked)

    with sf.backend(backend):
        check(call, slopes)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])  # torch's own ops may refuse it
@every_call
def test_under_vmap_and_grad_with_no_member(name: str, backend: str) -> None:
    call = made()[name]
    weight = next(n for n, t in call.arguments.items() if t.is_floating_point())

    def loss(x: Tensor, rest: dict[str, Tensor]) -> Tensor:
        return call.function(**{**rest, weight: x}).square().sum()

    nobody = {n: t.expand(0, *t.shape) for n, t in call.arguments.items()}
    with sf.backend(backend):
        assert torch.func.vmap(torch.func.grad(loss))(nobody[weight], nobody).shape == nobody[weight].shape


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])  # it has no ops of its own
def test_ops_by_their_name_and_their_backward_ops(backend: str) -> None:
    ops = torch.ops.sparse_ffn
    table, index, weight = torch.randn(5, 4), torch.tensor([[0, 4], [2, 2**32]]), torch.rand(2, 2)
    grad, expert, matrices = torch.randn(2, 4), torch.tensor([0, 4]), torch.randn(3, 4, 4)
    sums, pairs, strides = weight.unsqueeze(1), index.unsqueeze(1), (6, 6, 3, 1)
    for call, name in (
        (lambda: ops.weighted_bag(table, index, weight, backend), "index"),
        (lambda: ops.weighted_bag_backward(grad, table, index, weight, True, backend), "index"),
        (lambda: ops.product_key_topk_backward(sums, pairs, (2, 1, 2, 3), strides, backend), "index"),
        (lambda: ops.cvmm(grad, matrices, expert, None, None, None, 2, backend), "expert_index"),
        (lambda: ops.cvmm_backward(grad, grad, matrices, expert, None, None, None, True, backend), "expert_index"),
    ):
        with pytest.raises(IndexError, match=rf"{name} must be in \[0, "):
            call()


@every_backend
def test_a_sparse_gradient_reads_nothing_through_a_wrong_index(backend: str) -> None:
    values = torch.randn(5, 4, requires_grad=True)
    with sf.backend(backend), pytest.raises(IndexError, match=r"index must be in \[0, 5\)"):
        functional.weighted_bag(values, torch.tensor([[5]]), torch.ones(1, 1), sparse_grad=True)


@every_backend
def test_a_router_that_selects_experts_that_are_not_there(backend: str) -> None:
    class Lost(sf.routing.SigmoidRouter):
        def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Any:
            routing = super().forward(x_TD, mask_T)
            return routing._replace(index_TK=routing.index_TK + 2)

    layer = sf.MoE(8, 4, 4, 3, router=Lost)
    for train in (True, False):
        with sf.backend(backend), pytest.raises(IndexError, match=r"index must be in \[0, 4\]"):
            layer.train(train)(torch.randn(5, 8))
