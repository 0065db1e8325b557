"""How long the balance loss of a training forward counts: until a backward pass has freed its graph, or eval()."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix.layers import LAYERS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_ffn as sf

KEEPING = ("SigmaMoE", "SoftmaxMoE", "SwitchMoE", "SBaseMoE", "NoisyTopKMoE", "unweighted")
keeping = pytest.mark.parametrize("name", KEEPING)


def build(name: str, **options: Any) -> sf.MoE:
    if name == "unweighted":  # its output's gradient for the router is zero
        return sf.MoE(8, 9, 4, 3, router="unweighted", **options)
    layer = LAYERS[name](**options)
    assert isinstance(layer, sf.MoE)
    return layer


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (7,)), 8)


@keeping
@pytest.mark.parametrize("part", ["both", "the output's", "its own"])
def test_a_backward_pass_that_frees_the_graph_ends_it(name: str, part: str, on_backend: str) -> None:
    layer = build(name)
    y = layer(x())
    aux = sf.aux_loss(layer) if part != "the output's" else 0
    assert aux != 0 or part == "the output's"
    (aux if part == "its own" else y.square().mean() + aux).backward()
    assert sf.aux_loss(layer) == 0
    assert sf.aux_loss(layer).requires_grad is False
    assert sf.routing_stats(layer)[""]["load"].sum() == pytest.approx(1)  # which are of the last forward
    layer(x())
    assert sf.aux_loss(layer) != 0


@keeping
def test_a_backward_pass_that_retains_the_graph_does_not_end_it(name: str, on_backend: str) -> None:
    layer = build(name)
    y = layer(x())
    before = sf.aux_loss(layer)
    y.square().mean().backward(retain_graph=True)
    assert sf.aux_loss(layer) == sf.aux_loss(layer) == before
    sf.aux_loss(layer).backward(retain_graph=True)
    assert sf.aux_loss(layer) == before
    sf.aux_loss(layer).backward()
    assert sf.aux_loss(layer) == 0


def test_nor_does_one_for_second_derivatives() -> None:
    layer, leaf = build("SigmaMoE"), x().requires_grad_()
    with sf.backend("reference"):
        (slope,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        assert sf.aux_loss(layer) != 0
        (slope.square().sum() + sf.aux_loss(layer)).backward()
    assert sf.aux_loss(layer) == 0


def test_nor_one_that_passes_the_layer_by(on_backend: str) -> None:
    layer, head = build("SigmaMoE"), nn.Linear(8, 8)
    z = head(layer(x()))
    torch.autograd.grad(z.sum(), list(head.parameters()))
    assert sf.aux_loss(layer) != 0
    sf.aux_loss(layer).backward()


def test_it_outlives_the_backward_pass_of_an_earlier_forward(on_backend: str) -> None:
    layer = build("SigmaMoE")
    first, second = layer(x()), layer(x())
    before = sf.aux_loss(layer)
    first.sum().backward()
    assert sf.aux_loss(layer) == before
    (second.sum() + sf.aux_loss(layer)).backward()
    assert sf.aux_loss(layer) == 0


def test_frozen_experts(on_backend: str) -> None:
    layer = build("SigmaMoE").requires_grad_(False)
    layer.router.requires_grad_()
    (layer(x()).sum() + sf.aux_loss(layer)).backward()
    assert sf.aux_loss(layer) == 0


def test_a_frozen_layer(on_backend: str) -> None:
    layer, leaf = build("SigmaMoE").requires_grad_(False), x().requires_grad_()
    (layer(leaf).sum() + sf.aux_loss(layer)).backward()
    assert sf.aux_loss(layer) == 0
    layer(leaf.detach())  # a number without a graph, which no backward pass can meet
    assert sf.aux_loss(layer) == sf.aux_loss(layer) != 0


def test_leaving_training_forgets_it(on_backend: str) -> None:
    model = nn.Sequential(build("SigmaMoE"), build("SwitchMoE"))
    model(torch.randn(7, 8)[:, :8])
    assert sf.aux_loss(model) != 0
    assert sf.aux_loss(model.train()) != 0
    stats = sf.routing_stats(model)
    assert sf.aux_loss(model.eval()) == 0
    assert sf.aux_loss(model.train()) == 0
    assert {name: s["entropy"] for name, s in sf.routing_stats(model).items()} == {
        name: s["entropy"] for name, s in stats.items()
    }


def test_nothing_keeps_it_but_its_layer(on_backend: str) -> None:
    layer = build("SigmaMoE")
    gc.collect()
    gc.disable()
    try:
        layer(x())
        sf.aux_loss(layer)
        kept = weakref.ref(layer._last)
        layer(x())
        assert kept() is None
        (layer(x()).sum() + sf.aux_loss(layer)).backward()
        kept = weakref.ref(layer._last)
        del layer
        assert kept() is None
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------------- checkpointing


@keeping
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_neither_replaces_nor_revives_it(name: str, reentrant: bool, on_backend: str) -> None:
    layer = build(name, aux="inject" if reentrant else "attach")
    y = checkpoint(lambda x: layer(x).tanh(), x().requires_grad_(), use_reentrant=reentrant)
    before, stats = sf.aux_loss(layer), sf.routing_stats(layer)[""]["load"]
    assert (before != 0) != reentrant
    y.sum().backward(retain_graph=True)
    assert sf.aux_loss(layer) == before
    assert torch.equal(sf.routing_stats(layer)[""]["load"], stats)
    (y.sum() + sf.aux_loss(layer)).backward()
    assert sf.aux_loss(layer) == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_recomputing_counts_no_loads(reentrant: bool, noisy: bool, on_backend: str) -> None:
    layer = sf.MoE(8, 9, 4, 3, router="noisy_topk" if noisy else "sigmoid", balance="bias")
    y = checkpoint(lambda x: layer(x).tanh(), x().requires_grad_(), use_reentrant=reentrant)
    y.sum().backward()
    assert layer.router.load.sum() == 7 * 3


# --------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("part", ["both", "its own", "the output's"])
def test_a_compiled_layer(part: str, on_backend: str) -> None:
    torch._dynamo.reset()
    layer = build("SigmaMoE")
    call: Callable[[Tensor], Tensor] = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y = call(x(40))
        aux = sf.aux_loss(layer) if part != "the output's" else 0
        if part == "both":
            y.sum().backward(retain_graph=True)
            assert sf.aux_loss(layer) == aux != 0
        (aux if part == "its own" else y.square().mean() + aux).backward()
        assert sf.aux_loss(layer) == 0
    call(x(40))
    assert sf.aux_loss(layer) != 0


def test_asking_inside_of_a_compiled_function(on_backend: str) -> None:
    torch._dynamo.reset()
    layer = build("SigmaMoE")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(x: Tensor) -> Tensor:
        return layer(x).square().mean() + sf.aux_loss(layer)

    for _ in range(2):
        total(x(40)).backward()
        assert sf.aux_loss(layer) == 0


def test_what_is_done_to_the_loss_is_not_done_to_the_layer() -> None:
    layer = sf.SigmaMoE(8, 5, 3, 2, balance_weight=1.0)
    layer(torch.randn(9, 8))
    loss = sf.aux_loss(layer)
    before = loss.item()
    loss /= 4
    assert sf.aux_loss(layer).item() == before
