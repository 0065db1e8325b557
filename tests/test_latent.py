"""LatentMoE: a mixture between two projections; its router sees the layer's input."""

from __future__ import annotations

import copy
import math

import oracle
import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.layers import LatentMoE, SharedExpertMoE

D, L, E, G, K = 8, 5, 6, 3, 2


def made(d_latent: int = L, dtype: torch.dtype = torch.float64, **options) -> LatentMoE:
    return oracle.randomise(LatentMoE(D, d_latent, E, G, K, dtype=dtype, **options))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_it_is_the_oracles_mixture_between_two_projections(biased: bool, given: bool, on_backend: str) -> None:
    layer = made(router="softmax", glu=True, balance="none", d_out=7, projection_bias=biased)
    x, r = normal(11, D), normal(11, D, seed=1)
    mine = dict(layer.named_parameters())
    theirs = {n: p.detach().clone().requires_grad_() for n, p in mine.items()}
    leaves, inputs = [x.clone().requires_grad_() for _ in range(2)], {"router_input": r} if given else {}
    y = layer(leaves[0], **inputs)
    latent = leaves[1] @ theirs["down.weight"].T + (theirs["down.bias"] if biased else 0)
    moe = {n.removeprefix("moe."): p for n, p in theirs.items() if n.startswith("moe.")}
    inner, _ = oracle.moe(moe, latent, K, router="softmax", router_input=r if given else leaves[1])
    expected = inner @ theirs["up.weight"].T + (theirs["up.bias"] if biased else 0)
    torch.testing.assert_close(y, expected)
    weight = normal(11, 7, seed=2)
    actual = torch.autograd.grad((y * weight).sum(), [leaves[0], *mine.values()])
    wanted = torch.autograd.grad((expected * weight).sum(), [leaves[1], *theirs.values()], allow_unused=True)
    for name, a, b in zip(["x", *mine], actual, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, msg=lambda m, n=name: f"{n}: {m}")


def test_with_identity_projections_it_is_the_mixture() -> None:
    layer = made(D, balance="entropy", balance_weight=1.0)
    nn.init.eye_(layer.down.weight)
    nn.init.eye_(layer.up.weight)
    x = normal(2, 9, D)
    mask = torch.rand(2, 9) < 0.7
    torch.testing.assert_close(layer(x, mask=mask), layer.moe(x, mask=mask))
    layer(x, mask=mask)
    loss = sf.aux_loss(layer)
    layer.moe(x, mask=mask)
    torch.testing.assert_close(loss, sf.aux_loss(layer))


def test_it_is_found_by_what_a_training_loop_calls() -> None:
    layer = made(balance="bias", null_experts=2, null_kind="identity")
    model = nn.Sequential(layer)
    model(normal(30, D))
    assert list(sf.routing_stats(model)) == ["0.moe"]
    sf.update_router_bias(model)
    assert layer.moe.router.bias[:E].any()
    assert not sf.sparsify_(model, sf.SigmaMoEConfig(k=2)).unknown
    assert model[0] is layer  # no FFN to replace, and nothing that looks like one


def test_sizes_costs_and_initialisation() -> None:
    layer = LatentMoE(64, 16, E, 40, K, d_out=32, projection_bias=True, init_scale=0.5)
    assert {n: list(p.shape) for n, p in layer.named_parameters()} == {
        "moe.keys": [E, 40, 16], "moe.values": [E, 40, 16], "moe.router.weight": [E, 64],
        "down.weight": [16, 64], "down.bias": [16], "up.weight": [32, 16], "up.bias": [32],
    }  # fmt: skip
    assert layer.flops_per_token() == 2 * (64 * 16 + E * 64 + K * 40 * 2 * 16 + 16 * 32)
    assert (layer.d_ff, layer.active_fraction, layer.k) == (240, K / E, K)
    assert layer.n_parameters == sum(p.numel() for p in layer.parameters())
    assert repr(layer).startswith("LatentMoE(\n  64, d_latent=16, d_out=32\n")
    torch.nn.init.ones_(layer.up.bias)
    layer.reset_parameters()
    assert not layer.up.bias.any()
    for projection, width in ((layer.down, 64), (layer.up, 16)):
        assert projection.weight.std().item() == pytest.approx(1 / math.sqrt(width), rel=0.15)
    layer.k = 3
    assert layer.moe.k == layer.moe.router.k == 3


def test_beside_a_shared_expert() -> None:
    layer, x = made(), normal(2, 3, D)
    both = SharedExpertMoE(layer, sf.DenseFFN(D, 10, dtype=torch.float64), gated=True)
    gate = torch.sigmoid(both.gate(x.to(both.gate.weight.dtype)))
    torch.testing.assert_close(both(x), layer(x) + gate * both.shared(x))
    assert both.active_fraction == (K * G + 10) / (E * G + 10)
    assert both.flops_per_token() == layer.flops_per_token() + both.shared.flops_per_token() + 2 * D
    both.k = 3
    assert layer.k == 3
    with pytest.raises(ValueError, match="shared has"):
        SharedExpertMoE(made(d_out=4), sf.DenseFFN(D, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_copies_and_16_bits(dtype: torch.dtype) -> None:
    layer, x = made(dtype=dtype), normal(5, D, dtype=dtype)
    expected = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_a_wrong_call_computes_nothing() -> None:
    layer = made()
    layer.down.register_forward_hook(lambda *_: pytest.fail("computed"))
    for x, options, error, message in (
        (normal(3, L), {}, ValueError, r"x must have shape \[..., d_model = 8\], got \[3, 5\]"),
        (normal(3, D).float(), {}, TypeError, "x has dtype torch.float32"),
        (normal(3, D), {"mask": torch.ones(3)}, TypeError, "mask must be bool"),
        (normal(3, D), {"router_input": normal(3, L)}, ValueError, r"router_input must have shape \[3, 8\]"),
    ):
        with pytest.raises(error, match=message):
            layer(x, **options)
    with pytest.raises(TypeError, match="LatentMoE has no argument 'd_router'") as raised:
        LatentMoE(D, L, E, G, K, d_router=4)
    assert str(raised.value).count("d_router") == 1
    with pytest.raises(TypeError, match=r"LatentMoE has no argument 'gluu' \(did you mean 'glu'\?\)"):
        LatentMoE(D, L, E, G, K, gluu=True)
