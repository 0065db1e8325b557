"""A router with a width of its own: it sees router_input [..., d_router], the experts see x [..., d_model]."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch

import sparse_ffn as sf
from sparse_ffn import routing
from sparse_ffn.convert import config_of
from sparse_ffn.integrations import to_moe_layer
from sparse_ffn.layers import SharedExpertMoE
from sparse_ffn.layers.variants import MoEOptions

D, R = 6, 9
SIZES = {"d_model": D, "n_experts": 5, "expert_size": 3, "k": 2}
ROUTERS = ("sigmoid", "softmax", "softmax_topk", "sinkhorn", "noisy_topk", "unweighted")
VARIANTS = (sf.SigmaMoE, sf.SoftmaxMoE, sf.SwitchMoE, sf.SBaseMoE, sf.NoisyTopKMoE)


def made(d_router: int | None = R, dtype: torch.dtype = torch.float64, **options) -> sf.MoE:
    return oracle.randomise(sf.MoE(**SIZES, d_router=d_router, dtype=dtype, **options))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(layer: sf.MoE, x: torch.Tensor, *, given: bool) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, router_input=x) if given else layer(x)
    ((y * normal(*y.shape, seed=7).to(y)).sum() + sf.aux_loss(layer)).backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize(
    ("router", "training"),  # what noise or Sinkhorn selects in training is no function of a token alone
    [
        *((router, False) for router in ROUTERS),
        *((router, True) for router in ROUTERS if router not in ("noisy_topk", "sinkhorn")),
    ],
)
def test_it_is_the_oracles_mixture(router: str, training: bool, on_backend: str) -> None:
    layer = made(router=router, glu=True, bias=True, balance="none").train(training)
    x, r = normal(7, D), normal(7, R, seed=1).requires_grad_()
    y = layer(x, router_input=r)
    mine = dict(layer.named_parameters())
    theirs = {n: p.detach().clone().requires_grad_() for n, p in mine.items()}
    r_theirs = r.detach().clone().requires_grad_()
    expected, _ = oracle.moe(theirs, x, 2, router=router, router_input=r_theirs)
    torch.testing.assert_close(y, expected)
    weight = normal(7, D, seed=2)
    actual = torch.autograd.grad((y * weight).sum(), [r, *mine.values()])
    wanted = torch.autograd.grad((expected * weight).sum(), [r_theirs, *theirs.values()], allow_unused=True)
    for name, a, b in zip(["router_input", *mine], actual, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, msg=lambda m, n=name: f"{n}: {m}")


def test_its_gradient_reaches_router_input() -> None:
    layer = made(balance="none")
    x, r = normal(4, D).requires_grad_(), normal(4, R, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, r: layer(x, router_input=r), (x, r))
    for aux in ("attach", "inject"):
        layer = made(aux=aux, balance="entropy", balance_weight=1.0)
        layer.values.data.zero_()  # of the balance loss alone
        (layer(x, router_input=r).sum() + sf.aux_loss(layer)).backward()
        assert r.grad.abs().max() > 0
        r.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own", [None, D])
def test_with_the_layers_width_and_x_for_it_all_is_as_without(dtype: torch.dtype, own: int | None) -> None:
    layer, plain, x = made(own, dtype), made(None, dtype), normal(2, 4, D, dtype=dtype)
    assert repr(layer) == repr(plain)
    for actual, expected in zip(gradients(layer, x, given=True), gradients(plain, x, given=False), strict=True):
        assert torch.equal(actual, expected)


def test_it_changes_no_parameters_name_and_only_the_routers_width() -> None:
    for router, extra in (("sigmoid", {}), ("noisy_topk", {"router.noise_weight": [5, R]})):
        layer = made(router=router, glu=True, bias=True, balance="bias", d_out=4)
        shapes = {name: list(t.shape) for name, t in layer.state_dict().items()}
        assert shapes == {
            "out_bias": [4], "keys": [5, 3, D], "gate_keys": [5, 3, D], "key_bias": [5, 3], "values": [5, 3, 4],
            "router.weight": [5, R], "router.bias": [5], **extra,
        }  # fmt: skip


def test_router_input_must_then_be_given_and_have_that_width() -> None:
    layer, x = made(), normal(2, 4, D)
    shared = SharedExpertMoE(layer, sf.DenseFFN(D, 8, dtype=torch.float64))
    for module in (layer, shared):
        sentence = f"router_input of width d_router = {R} must be given: this layer's router does not see x"
        with pytest.raises(ValueError, match=sentence):
            module(x)
        for wrong in (x, normal(2, 4, R + 1), normal(2, 3, R), normal(8, R), normal(R)):
            with pytest.raises(ValueError, match=rf"router_input must have shape \[2, 4, {R}\].*got \["):
                module(x, router_input=wrong)
    assert sf.routing_stats(layer) == {}
    r = normal(2, 4, R)
    torch.testing.assert_close(shared(x, router_input=r), layer(x, router_input=r) + shared.shared(x))


def test_a_router_brings_its_width() -> None:
    router = routing.SinkhornRouter(R, 5, 2, dtype=torch.float64)
    layer = sf.MoE(**SIZES, router=router, dtype=torch.float64)
    assert (layer.d_router, layer.router.d_model, layer.d_model) == (R, R, D)
    assert sf.MoE(**SIZES, router=router, d_router=R, dtype=torch.float64).d_router == R
    with pytest.raises(ValueError, match=rf"router has .* = \({R}, 5, 2\), the layer .*d_router.* = \({D}, 5, 2\)"):
        sf.MoE(**SIZES, router=router, d_router=D)
    made_to_measure = sf.MoE(**SIZES, router=routing.DeepSeekRouter, d_router=R)
    assert list(made_to_measure.router.weight.shape) == [5, R]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_input_may_be_fp32_and_is_not_rounded(dtype: torch.dtype) -> None:
    layer, x, r = made(dtype=dtype), normal(5, D, dtype=dtype), normal(5, R, seed=1, dtype=torch.float32)
    layer(x, router_input=r)
    expected = (r @ layer.router.weight.float().T).topk(2).indices
    assert torch.equal(layer._routed[0], expected)
    fine = 1 + 2.0**-20 * torch.arange(5, dtype=torch.float32)  # one number in 16 bits
    layer.router.weight.data.copy_(torch.eye(5, R))
    layer(x, router_input=torch.nn.functional.pad(fine.expand(5, 5), (0, R - 5)))
    assert layer._routed[0].tolist() == [[4, 3]] * 5
    assert layer(x, router_input=r.to(dtype)).dtype == dtype
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for wrong in (r.double(), r.to(other), r.long()):
        with pytest.raises(TypeError, match="router_input"):
            layer(x, router_input=wrong)
    with pytest.raises(TypeError, match="x has dtype"):
        layer(x.float(), router_input=r)


def test_an_fp64_layer_takes_fp32_too() -> None:
    layer, x, r = made(), normal(5, D), normal(5, R, seed=1, dtype=torch.float32)
    assert torch.equal(layer(x, router_input=r), layer(x, router_input=r.double()))


@pytest.mark.parametrize("cls", VARIANTS)
def test_every_variant_has_it_and_shows_it(cls: type[sf.MoE]) -> None:
    layer = cls(**SIZES, d_router=R)
    assert "d_router" in MoEOptions.__annotations__
    assert f"d_router={R}" in repr(layer)
    assert "d_router" not in repr(cls(**SIZES))
    twice = 2 if cls is sf.NoisyTopKMoE else 1
    assert layer.flops_per_token() - cls(**SIZES).flops_per_token() == twice * 2 * 5 * (R - D)
    x, r = torch.randn(2, 4, D), torch.randn(2, 4, R)
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    twin = copy.deepcopy(layer).eval()
    layer.eval()
    assert torch.equal(layer(x, router_input=r, mask=mask), twin(x, router_input=r, mask=mask))
    assert sf.routing_stats(layer)[""]["load"].sum() == pytest.approx(1)


def test_sequences_and_padding_are_those_of_x() -> None:
    layer = made(balance="entropy", balance_weight=1.0, balance_over="sequence")
    x, r = normal(2, 4, D), normal(2, 4, R, seed=1)
    mask = torch.tensor([[True, True, False, True], [True] * 4])
    layer(x, router_input=r, mask=mask)
    decisions = [layer.router(part[real], None) for part, real in zip(r, mask, strict=True)]
    expected = sum(oracle.balance_loss("entropy", oracle.Routing(*one)) for one in decisions) / 2
    torch.testing.assert_close(sf.aux_loss(layer), expected.float())


def test_what_has_no_place_for_another_width_says_so() -> None:
    with pytest.raises(ValueError, match="no MoEConfig makes a layer with this router"):
        config_of(made())
    with pytest.raises(ValueError, match=f"d_router = {R}"):
        to_moe_layer(made())
    dense = sf.to_dense(sf.MoE(D, 5, 3, 5, router="unweighted", d_router=R).eval())  # all experts, each with weight 1
    assert dense.d_ff == 15
