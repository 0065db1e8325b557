"""LowRankMoE, and compress_experts_, which makes one of a mixture: a base and residuals of low rank.

The oracles are a loop over tokens and slots in float64, and ``MoE`` where the rank is full.
"""

from __future__ import annotations

import copy
import itertools
import sys

import oracle
import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.compress import compress_experts_
from sparse_ffn.compress.residual import barycenter
from sparse_ffn.convert import LowRankMoEConfig, config_of
from sparse_ffn.layers import LatentMoE, LowRankMoE, SharedExpertMoE

D, E, G, K, R = 6, 4, 5, 3, 2


def made(dtype: torch.dtype = torch.float64, **options) -> LowRankMoE:
    return oracle.randomise(LowRankMoE(D, E, G, K, R, dtype=dtype, **{"router": "sigmoid", **options}))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def full(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the ``MoE`` that computes the same."""
    found = {n: t for n, t in p.items() if n in ("router.weight", "key_bias", "out_bias", "constants")}
    found["keys"] = p["keys"] + p["key_up"] @ p["key_down"]
    found["values"] = p["values"] + p["value_down"] @ p["value_up"]
    if "gate_keys" in p:
        found["gate_keys"] = p["gate_keys"] + p["gate_up"] @ p["gate_down"]
    return found


@pytest.mark.parametrize("options", [{}, {"glu": True, "bias": True, "d_out": 4}])
def test_it_is_the_oracles_mixture_of_base_and_residuals(options: dict, on_backend: str) -> None:
    layer, x = made(activation="silu", **options), normal(11, D)
    mine = dict(layer.named_parameters())
    theirs = {n: p.detach().clone().requires_grad_() for n, p in mine.items()}
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, (expected, _) = layer(leaves[0]), oracle.moe(full(theirs), leaves[1], K, activation="silu")
    torch.testing.assert_close(y, expected)
    weight = normal(*y.shape, seed=7)
    actual = torch.autograd.grad((y * weight).sum(), [leaves[0], *mine.values()])
    wanted = torch.autograd.grad((expected * weight).sum(), [leaves[1], *theirs.values()])
    for name, a, b in zip(["x", *mine], actual, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_void_slots_add_nothing_of_the_base_either() -> None:
    layer, x = made(null_experts=3, null_kind="identity", bias=True), normal(20, D)
    plain = sf.MoE(D, E, G, K, null_experts=3, null_kind="identity", bias=True, dtype=torch.float64)
    plain.load_state_dict(full(layer.state_dict()))
    torch.testing.assert_close(layer(x), plain(x))
    assert (layer.router(x).index_TK >= E).any()


def test_a_token_without_an_expert_may_hold_anything() -> None:
    """Its units of the base are not multiplied with 0, which NaN outlives."""
    layer = made(null_experts=2, null_kind="zero", d_router=1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.cat([torch.ones(E, 1), -torch.ones(2, 1)]))
    layer.k, x, seen = 1, normal(4, D), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).double()
    x[seen[:, 0] < 0] = torch.nan
    y = layer(x, router_input=seen)
    assert not y[seen[:, 0] < 0].any()
    assert y[seen[:, 0] > 0].isfinite().all()
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_a_training_loop_finds_it() -> None:
    layer = made(balance=("entropy", "bias"), balance_weight=(1.0, 1.0))
    layer(normal(30, D))
    assert sf.aux_loss(layer).requires_grad
    assert sf.routing_stats(layer)[""]["load"].shape == (E,)
    sf.update_router_bias(layer)


def test_sizes_costs_and_initialisation() -> None:
    layer = LowRankMoE(64, E, 80, K, 8, glu=True, bias=True, init_scale=0.5, d_out=32)
    assert {n: list(p.shape) for n, p in layer.named_parameters()} == {
        "out_bias": [32], "keys": [80, 64], "key_down": [E, 8, 64], "key_up": [E, 80, 8],
        "gate_keys": [80, 64], "gate_down": [E, 8, 64], "gate_up": [E, 80, 8], "key_bias": [E, 80],
        "values": [80, 32], "value_down": [E, 80, 8], "value_up": [E, 8, 32], "router.weight": [E, 64],
    }  # fmt: skip
    assert layer.flops_per_token() == 2 * E * 64 + 2 * 80 * (2 * 64 + 32) + 2 * K * 8 * (3 * 80 + 2 * 64 + 32)
    assert made().flops_per_token() == 2 * E * D + 2 * G * 2 * D + 2 * K * R * (2 * G + 2 * D)
    assert (layer.d_ff, layer.active_fraction) == (E * 80, K / E)
    for name, width in {"keys": 64, "key_down": 64, "gate_down": 64, "values": 80, "value_down": 80}.items():
        assert getattr(layer, name).std().item() == pytest.approx(0.5 / width**0.5, rel=0.1)
    for name in ("key_up", "gate_up", "value_up", "key_bias", "out_bias"):
        assert not getattr(layer, name).any()
    assert repr(layer).startswith(
        f"LowRankMoE(\n  64, n_experts={E}, expert_size=80, rank=8, k={K}, glu=True, bias=True"
    )


# ------------------------------------------------------------------------------------------------- from a dense FFN


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid"])
def test_from_a_dense_ffn_it_starts_as_the_ffn(glu: bool, router: str) -> None:
    ffn = oracle.randomise(sf.DenseFFN(D, 16, glu=glu, activation="silu", dtype=torch.float64))
    layer = sf.from_dense(ffn, LowRankMoEConfig(n_experts=E, rank=R, k=2, router=router))
    assert isinstance(layer, LowRankMoE)
    x = normal(20, D)
    if router == "sigmoid":  # its gates sum to 1 where it is undecided
        layer.router.weight.data.zero_()
    torch.testing.assert_close(layer(x), ffn(x))
    (layer(x).square().sum() + sf.aux_loss(layer)).backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.key_up.grad.any()
    again = config_of(layer)
    assert (again.n_experts, again.rank, again.k, again.router) == (E, R, 2, router)
    with pytest.raises(ValueError, match="no dense FFN computes what this LowRankMoE does"):
        sf.to_dense(layer)


def test_its_config_has_sizes_of_its_own() -> None:
    layer = sf.from_dense(sf.DenseFFN(D, 48), LowRankMoEConfig())
    assert (layer.n_experts, layer.expert_size, layer.rank, layer.k) == (8, 48, 3, 2)
    with pytest.raises(ValueError, match="expert_size = 8 must be d_ff = 48"):
        sf.from_dense(sf.DenseFFN(D, 48), LowRankMoEConfig(expert_size=8))


# ---------------------------------------------------------------------------------------------------- compression


def experts(**options) -> sf.MoE:
    return oracle.randomise(sf.MoE(D, E, G, K, dtype=torch.float64, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"glu": True, "bias": True, "d_out": 4, "router": "softmax", "null_experts": 1, "null_kind": "constant"}],
)
def test_at_full_rank_nothing_is_lost(options: dict) -> None:
    model, x = nn.Sequential(experts(**options)), normal(30, D)
    model[0].key_bias is not None and nn.init.normal_(model[0].key_bias)
    before = model(x)
    state = torch.get_rng_state()
    report = compress_experts_(model, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model[0], LowRankMoE)
    torch.testing.assert_close(model(x), before)
    assert max(report.layers[0].errors.values()) < 1e-12
    assert "0: " not in str(report)
    assert "relative error" in str(report)
    assert report.layers[0].parameters[1] == model[0].n_parameters


def test_a_smaller_rank_is_the_best_approximation_of_that_rank() -> None:
    model, whole = nn.Sequential(experts()), nn.Sequential(experts())
    errors = compress_experts_(model, R).layers[0].errors
    compress_experts_(whole, 5)
    own, exact = (full(dict(each[0].named_parameters())) for each in (model, whole))
    for stack in ("keys", "values"):
        lost = torch.linalg.svdvals(exact[stack] - getattr(whole[0], stack))[:, R:].square().sum()
        torch.testing.assert_close((exact[stack] - own[stack]).square().sum(), lost)
        assert errors[stack] == pytest.approx((lost.sqrt() / exact[stack].norm()).item())


@pytest.mark.parametrize("scipy", [True, False])
def test_permuted_copies_of_one_expert_have_no_residual(scipy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if scipy:
        pytest.importorskip("scipy")
    else:
        monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    rows = normal(1, 12, 9)
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(e)) for e in range(4)])
    shuffled = rows.expand(4, 12, 9).gather(1, order.unsqueeze(2).expand(4, 12, 9))
    _, spread = barycenter(shuffled, 8)
    assert spread[-1] < 1e-20
    rows = normal(5, 12, 9, seed=3)
    _, spread = barycenter(rows, 8)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(spread))
    assert spread[0] < (rows - rows.mean(0)).square().sum().item() / 5


def test_the_base_does_not_depend_on_the_order_of_the_units() -> None:
    pytest.importorskip("scipy")
    rows, bases = normal(4, 10, 7), []
    for seed in (None, 1):
        if seed is not None:
            orders = [torch.randperm(10, generator=torch.Generator().manual_seed(seed + e)) for e in range(4)]
            rows = torch.stack([own[order] for own, order in zip(rows, orders, strict=True)])
        order, _ = barycenter(rows, 20)
        base = rows.gather(1, order.unsqueeze(2).expand_as(rows)).mean(0)
        bases.append(base[base[:, 0].argsort()])
    torch.testing.assert_close(*bases)


def test_it_stands_where_the_mixture_stood() -> None:
    x = normal(9, D)
    shared = SharedExpertMoE(experts(balance="bias"), sf.DenseFFN(D, 8, dtype=torch.float64))
    latent = oracle.randomise(LatentMoE(D, D, E, G, K, dtype=torch.float64))
    tied = experts()
    model = nn.Sequential(shared, latent, tied, nn.ModuleDict({"again": tied}), tied).eval()
    expected = model[2](model[1](model[0](x)))
    assert len(compress_experts_(model, 5).layers) == 3
    assert isinstance(latent.moe, LowRankMoE)
    assert model[2] is model[3]["again"] is model[4]
    torch.testing.assert_close(model[2](model[1](model[0](x))), expected)
    assert not model[2].training
    assert list(sf.routing_stats(model)) == ["0.routed", "1.moe", "2"]


@pytest.mark.parametrize("frozen", ["keys", "gate_keys", "values", "key_bias", "out_bias"])
def test_what_is_made_of_a_frozen_parameter_is_frozen(frozen: str) -> None:
    model = nn.Sequential(sf.SigmaMoE(8, 4, 6, 2, glu=True, bias=True))
    model[0].get_parameter(frozen).requires_grad_(False)
    compress_experts_(model, 3)
    prefix = {"keys": "key_", "gate_keys": "gate_", "values": "value_"}.get(frozen)
    of_frozen = {frozen, *((f"{prefix}up", f"{prefix}down") if prefix else ())}
    assert {name for name, p in model[0].named_parameters() if not p.requires_grad} == of_frozen


def test_what_cannot_be_compressed_is_said_and_stays() -> None:
    model = nn.Sequential(experts(), sf.MoE(D, E, 2, K, dtype=torch.float64))
    before = list(model)
    with pytest.raises(ValueError, match="rank must be at least 1 and at most that of the experts of 1 = 2, got 3"):
        compress_experts_(model, 3)
    assert list(model) == before
    for broken, words in (({"device": "meta"}, r"1\.keys is on meta: load"), ({}, "1: key_bias is not finite")):
        model = nn.Sequential(experts(bias=True), sf.MoE(D, E, G, K, bias=True, **broken))
        nn.init.constant_(model[1].key_bias, torch.nan)
        before = list(model)
        with pytest.raises(ValueError, match=words):
            compress_experts_(model, 2)
        assert list(model) == before
    with pytest.raises(ValueError, match="model is itself a MoE"):
        compress_experts_(experts(), 2)
    with pytest.raises(ValueError, match="holds no MoE"):
        compress_experts_(nn.Sequential(nn.Linear(2, 2)), 2)
    stored = nn.Sequential(sf.MoE(8, E, 8, K))
    sf.quantize_experts_(stored, sf.ExpertQuantization(bits=8))
    with pytest.raises(ValueError, match="dequantize_experts_"):
        compress_experts_(stored, 2)


@pytest.mark.parametrize("glu", [False, True])
def test_what_equal_experts_do_not_need_learns_all_the_same(glu: bool) -> None:
    """Two factors that are 0 would give each other no gradient: one of each pair starts as in a new layer."""
    layer = sf.MoE(D, E, G, K, glu=glu, dtype=torch.float64)
    with torch.no_grad():
        for stack in layer._units():
            if stack is not None:
                stack.copy_(stack[:1].expand_as(stack).clone())
        layer.keys[1] += 0.1 * torch.outer(torch.randn(G), torch.randn(D))  # of rank 1
    model, x = nn.Sequential(layer), normal(40, D)
    expected = layer(x)
    compress_experts_(model, R)
    small = model[0]
    torch.testing.assert_close(small(x), expected)
    small(x).square().sum().backward()
    moving = ["key", "value", *(["gate"] if glu else [])]
    for name in moving:
        assert getattr(small, f"{name}_up").grad.abs().amax((1, 2)).min() > 1e-6, name
        assert getattr(small, f"{name}_down").isfinite().all()


def test_what_a_low_rank_layer_would_not_do_is_refused() -> None:
    class Doubled(sf.SigmaMoE):
        def forward(self, x: Tensor, **options: Tensor) -> Tensor:
            return 2 * super().forward(x, **options)

    wrapped = sf.SigmaMoE(D, E, G, K)
    wrapped.router = nn.Sequential(wrapped.router)
    for layer, message in (
        (Doubled(D, E, G, K), "model's layer 0 is a Doubled, whose own forward would be lost"),
        (wrapped, "the router of 0 is a Sequential: compress before it is wrapped"),
    ):
        model = nn.Sequential(layer)
        with pytest.raises(ValueError, match=message):
            compress_experts_(model, R)
        assert model[0] is layer


def test_masked_and_parametrised_experts_are_refused() -> None:
    """Their stacks are computed, and may be a step old."""
    for change in (
        lambda layer: nn.utils.parametrizations.weight_norm(layer, "values"),
        lambda layer: nn.utils.prune.random_unstructured(layer, "keys", 0.5),
        lambda layer: nn.utils.prune.random_unstructured(layer, "out_bias", 0.5),
    ):
        model = nn.Sequential(sf.MoE(D, E, G, K, bias=True))
        change(model[0])
        with pytest.raises(ValueError, match=r"is no plain parameter, but masked, parametrised or sharded"):
            compress_experts_(model, R)
        assert type(model[0]).__name__ != "LowRankMoE"


def test_autocast_does_not_reach_the_assignment() -> None:
    plain = nn.Sequential(sf.MoE(D, E, G, K))
    cast = copy.deepcopy(plain)
    compress_experts_(plain, R)
    with torch.autocast("cpu", torch.bfloat16):
        compress_experts_(cast, R)
    for ours, theirs in zip(cast.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
