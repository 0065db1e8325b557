"""Null experts: rows of the router without hidden units. A slot of theirs adds nothing, gate · x or gate · a constant.

The oracle is a loop over tokens in float64, and layers without null experts where those are the same.
"""

from __future__ import annotations

import copy
import math

import oracle
import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import plot
from sparse_ffn.integrations import to_moe_layer
from sparse_ffn.layers import SharedExpertMoE
from sparse_ffn.layers.variants import MoEOptions

D, E, G, N, K = 6, 5, 3, 3, 4
SIZES = {"d_model": D, "n_experts": E, "expert_size": G, "k": K}
KINDS = ("zero", "identity", "constant")
ROUTERS = ("sigmoid", "softmax", "softmax_topk", "unweighted", "noisy_topk", "sinkhorn")
VARIANTS = (sf.SigmaMoE, sf.SoftmaxMoE, sf.SwitchMoE, sf.SBaseMoE, sf.NoisyTopKMoE)


def made(kind: str = "zero", dtype: torch.dtype = torch.float64, n: int = N, **options) -> sf.MoE:
    return oracle.randomise(sf.MoE(**{**SIZES, **options}, null_experts=n, null_kind=kind, dtype=dtype))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loop(p: dict[str, Tensor], x_TD: Tensor, k: int, router: str, kind: str) -> Tensor:
    """The sum over each token's slots, one at a time."""
    routing = oracle.route(router, x_TD @ p["router.weight"].T, k)
    rows = []
    for x, chosen, gates in zip(x_TD, routing.index_TK, routing.gate_TK, strict=True):
        y = torch.zeros_like(p["values"][0, 0])
        for e, gate in zip(chosen, gates, strict=True):
            if e < E:
                y = y + gate * (torch.relu(p["keys"][e] @ x) @ p["values"][e])
            elif kind != "zero":
                y = y + gate * (x if kind == "identity" else p["constants"][e - E])
        rows.append(y)
    return torch.stack(rows)


def gradients(y: Tensor, of: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad((y * normal(*y.shape, seed=7).to(y)).sum(), of, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, found, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["sigmoid", "softmax", "softmax_topk", "unweighted"])
def test_it_is_a_loop_over_tokens_and_slots(kind: str, router: str, on_backend: str) -> None:
    layer, x = made(kind, router=router), normal(11, D)
    mine = dict(layer.named_parameters())
    theirs = {n: p.detach().clone().requires_grad_() for n, p in mine.items()}
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = layer(leaves[0]), by_loop(theirs, leaves[1], K, router, kind)
    torch.testing.assert_close(y, expected)
    actual = gradients(y, [leaves[0], *mine.values()])
    for name, a, b in zip(["x", *mine], actual, gradients(expected, [leaves[1], *theirs.values()]), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(layer.eval()(x), expected.detach())


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_the_fused_op_computes_it_too(
    dtype: torch.dtype, kind: str, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sf.MoE, "_route", lambda *_: pytest.fail("unfused"))
    layer, x = made(kind, dtype, router=router, balance="switch"), normal(70, D, dtype=dtype)
    wide, wide_x = copy.deepcopy(layer).double(), x.double()
    with torch.no_grad(), sf.backend("reference"):
        chosen = wide.router(wide_x).index_TK
    results = []
    for one, given in ((layer, x), (wide, wide_x)):
        monkeypatch.undo() if one is wide else None
        leaf = given.clone().requires_grad_()
        y = one(leaf)
        found = gradients(y, [leaf, *one.parameters()])
        with torch.no_grad():
            results.append([y.detach(), one.eval()(given), sf.routing_stats(one)[""]["load"], *found])
    same = (layer._routed[0].sort(1).values == chosen.sort(1).values).all()
    assert same or dtype == torch.bfloat16
    for actual, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.double() / scale, expected.double() / scale, rtol=0, atol=TOLERANCE[dtype])


def never(layer: sf.MoE, experts: slice) -> sf.MoE:
    """The layer, with logits of -inf for these experts on tokens whose first coordinate is 1."""
    layer.router.weight.data[experts] = 0
    layer.router.weight.data[experts, 0] = -math.inf
    return layer


def tokens(n: int = 9) -> Tensor:
    x = normal(n, D)
    x[:, 0] = 1
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["sigmoid", "softmax", "softmax_topk", "unweighted"])
def test_null_experts_that_no_token_selects_change_nothing(kind: str, router: str) -> None:
    layer = never(made(kind, router=router), slice(E, None))
    plain = sf.MoE(**SIZES, router=router, dtype=torch.float64)
    plain.load_state_dict(
        {n: t[:E] if n == "router.weight" else t for n, t in layer.state_dict().items()}, strict=False
    )
    torch.testing.assert_close(layer(tokens()), plain(tokens()))


@pytest.mark.parametrize("kind", ["identity", "constant"])
def test_a_functional_call_with_fewer_experts_knows_which_are_null(kind: str, on_backend: str) -> None:
    small, layer, x = made(kind, n_experts=E - 2).eval(), made(kind).eval(), normal(7, D)
    y = torch.func.functional_call(layer, dict(small.named_parameters()), (x,))
    torch.testing.assert_close(y, small(x))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_token_of_null_experts_alone_reads_no_unit(backend: str) -> None:
    x = tokens().float()
    with sf.backend(backend):
        for kind in KINDS:
            layer = never(made(kind, torch.float32, k=2), slice(0, E)).eval()
            layer.keys.data.fill_(math.nan)
            layer.values.data.fill_(math.nan)
            index, gate = layer.router(x).index_TK - E, layer.router(x).gate_TK
            assert (index >= 0).all()
            expected = torch.zeros_like(x)
            if kind == "identity":
                expected = gate.sum(1, keepdim=True) * x
            if kind == "constant":
                expected = sf.functional.weighted_bag(layer.constants, index, gate)
            torch.testing.assert_close(layer(x), expected)
            stats = sf.routing_stats(layer)[""]
            assert not stats.pop("load").any()
            assert stats == {"entropy": 0.0, "busiest": 0.0, "dead": 0.0, "null": 1.0}


def test_the_statistics_are_of_the_others_and_null_is_the_rest() -> None:
    layer, x = made(), normal(2, 30, D)
    mask = torch.rand(2, 30) < 0.7
    layer(x, mask=mask)
    chosen = layer.router(x.flatten(0, 1)).index_TK[mask.flatten()].flatten().tolist()
    stats = sf.routing_stats(layer)[""]
    assert stats["null"] == pytest.approx(sum(e >= E for e in chosen) / len(chosen))
    load = torch.tensor([chosen.count(e) for e in range(E)]) / sum(e < E for e in chosen)
    torch.testing.assert_close(stats["load"], load)
    assert "null" not in sf.routing_stats(torch.nn.Sequential(sf.SigmaMoE(**SIZES)))
    pytest.importorskip("matplotlib")
    assert len(plot.routing_figure(layer).axes) == 3


# ------------------------------------------------------------------------------------------------------- balance


def balanced(logits: Tensor, name: str, share: float | None = None, k: int = 2) -> float:
    """The loss of a layer whose router says these logits [T, 4], the last of an expert that is null."""
    layer = sf.MoE(
        4, 3, 2, k, router="softmax", null_experts=1, null_share=share, balance=name, balance_weight=1.0,
        dtype=torch.float64,
    )  # fmt: skip
    layer.router.weight.data = torch.eye(4, dtype=torch.float64)
    layer(logits)
    return sf.aux_loss(layer).item()


@pytest.mark.parametrize("share", [None, 0.1, 0.6])
def test_losses_have_their_least_and_known_values_at_the_wished_shares(share: float | None) -> None:
    rho = 0.25 if share is None else share
    target = torch.tensor([(1 - rho) / 3] * 3 + [rho], dtype=torch.float64)
    at_target = target.log().expand(50, 4)
    assert balanced(at_target, "entropy", share) == pytest.approx(-math.log(4), abs=1e-6)
    assert balanced(at_target, "switch", share) == pytest.approx(2, abs=1e-6)  # the sum of f, whatever it is
    all_null, all_first = (torch.full((5, 4), -40.0).index_fill(1, torch.tensor([e]), 0).double() for e in (3, 0))
    for logits, t in ((all_null, rho), (all_first, (1 - rho) / 3)):
        assert balanced(logits, "entropy", share) == pytest.approx(-math.log(4 * t), abs=1e-6)
        assert balanced(logits, "switch", share, k=1) == pytest.approx(1 / t, abs=1e-4)
    for _ in range(20):
        assert balanced(at_target + 0.1 * normal(4, seed=_), "entropy", share) > -math.log(4)


@pytest.mark.parametrize("name", ["entropy", "switch", "cv2", "z"])
def test_the_share_of_all_rows_is_the_default_and_leaves_the_formulas_alone(name: str) -> None:
    layer, x = made(router="softmax", balance=name, balance_weight=1.0), normal(30, D)
    layer(x)
    routing = oracle.route("softmax", x @ layer.router.weight.detach().T, K)
    if name == "cv2":
        share = torch.zeros(30, E + N, dtype=torch.float64)
        gates = routing.gate_TK / routing.gate_TK.sum(1, keepdim=True)
        importance = share.scatter_add(1, torch.tensor(routing.index_TK), gates)[:, :E].sum(0)
        expected = importance.var(correction=0) / importance.mean() ** 2
    else:
        expected = oracle.balance_loss(name, routing)
    assert sf.aux_loss(layer).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["entropy", "switch"])
def test_the_fused_and_the_unfused_path_balance_alike(name: str) -> None:
    x = normal(2, 20, D, dtype=torch.float32)
    losses = []
    for given in ({}, {"router_input": x}):
        layer = made(dtype=torch.float32, router="softmax", balance=name, balance_weight=1.0, null_share=0.5)
        layer(x, **given)
        loss = sf.aux_loss(layer)
        losses.append([loss.detach(), *torch.autograd.grad(loss, layer.router.weight)])
    for actual, expected in zip(*losses, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_wished_share_is_reached_by_training_and_by_the_bias() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    layer = sf.MoE(8, 6, 4, 4, router="softmax", null_experts=2, null_share=0.6, balance="entropy", balance_weight=1.0)
    optimizer = torch.optim.Adam(layer.router.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        layer(x)
        sf.aux_loss(layer).backward()
        optimizer.step()
    mean = torch.softmax(x @ layer.router.weight.T, 1).mean(0)
    torch.testing.assert_close(mean, torch.tensor([0.4 / 6] * 6 + [0.3] * 2), rtol=0.1, atol=0)
    biased = sf.MoE(8, 6, 4, 4, null_experts=2, null_share=0.375, balance="bias")
    for _ in range(300):
        biased(x)
        sf.update_router_bias(biased, 0.01)
    stats = sf.routing_stats(biased)[""]
    assert stats["null"] == pytest.approx(0.375, abs=0.02)
    assert stats["load"].max() < 1.15 / 6
    assert not biased.router.bias[6:].any()


# ----------------------------------------------------------------------------------------------- the layer as such


@pytest.mark.parametrize("cls", VARIANTS)
def test_every_variant_has_them_and_shows_them(cls: type[sf.MoE]) -> None:
    assert {"null_experts", "null_kind", "null_share"} <= MoEOptions.__annotations__.keys()
    layer = cls(**SIZES, null_experts=N, null_kind="constant", null_share=0.2, balance="entropy")
    assert "null_experts=3, null_kind='constant', null_share=0.2" in repr(layer)
    assert "null" not in repr(cls(**SIZES))
    assert list(layer.router.weight.shape) == [E + N, D]
    assert not layer.constants.any()
    x = torch.randn(2, 4, D)
    (layer(x).square().sum() + sf.aux_loss(layer)).backward()
    assert all(p.grad is not None for p in layer.parameters())
    twin = cls(**SIZES, null_experts=N, null_kind="constant")
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.eval()(x), layer.eval()(x))


def test_sizes_and_costs_are_those_of_the_most_units() -> None:
    layer = sf.SigmaMoE(**SIZES, null_experts=N, null_kind="identity")
    assert (layer.n_experts, layer.router.n_experts, layer.d_ff, layer.active_fraction) == (E, E + N, E * G, K / E)
    assert layer.flops_per_token() == sf.SigmaMoE(**SIZES).flops_per_token() + 2 * N * D
    layer.k = E + N  # null ones count
    assert layer.active_fraction == 1
    assert layer.flops_per_token() == sf.SigmaMoE(**{**SIZES, "k": E}, null_experts=N).flops_per_token()
    assert sf.MoE(**{**SIZES, "n_experts": 1, "k": 2}, null_experts=1).k == 2
    assert list(sf.SigmaMoE(**SIZES, null_experts=N, null_kind="constant", d_out=2).constants.shape) == [N, 2]


def test_constants_get_gradients_where_none_is_selected() -> None:
    layer = never(made("constant"), slice(E, None))
    layer(tokens()).sum().backward()
    assert torch.equal(layer.constants.grad, torch.zeros(N, D, dtype=torch.float64))


def test_they_stand_beside_a_shared_expert_and_behind_another_width() -> None:
    layer = made("identity", d_router=9, aux="inject")
    x, r = normal(2, 3, D), normal(2, 3, 9, seed=1)
    both = SharedExpertMoE(layer, sf.DenseFFN(D, 8, dtype=torch.float64))
    torch.testing.assert_close(both(x, router_input=r), layer(x, router_input=r) + both.shared(x))
    both(x, router_input=r).sum().backward()
    assert layer.router.weight.grad[E:].any()


def test_autocast_takes_them() -> None:
    for kind in KINDS:
        layer, x = made(kind, torch.float32), normal(9, D, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


def test_what_they_cannot_be_is_said() -> None:
    layer = made()
    with pytest.raises(ValueError, match=r"k must be at least 1 and at most n_experts \+ null_experts = 8, got 9"):
        layer.k = 9
    with pytest.raises(ValueError, match="k must be at least 1 and at most n_experts \\+ null_experts = 8, got 9"):
        sf.MoE(D, E, G, 9, null_experts=N)
    with pytest.raises(ValueError, match="null_kind = 'identity' adds x, so d_out = 4 must be d_model = 6"):
        made("identity", d_out=4)
    with pytest.raises(ValueError, match=r"null_share = 0\.5 needs null experts"):
        sf.MoE(**SIZES, null_share=0.5)
    for balance in ("none", "z", "cv2"):  # which do not know of shares
        with pytest.raises(ValueError, match=r"null_share = 0\.5 needs one of 'entropy', 'switch', 'bias' as balance"):
            sf.MoE(**SIZES, null_experts=1, null_share=0.5, balance=balance)
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="null_share"):
            sf.MoE(**SIZES, null_experts=1, null_share=share)
    layer = made("constant")
    layer.constants = torch.nn.Parameter(torch.zeros(N + 1, D, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"constants must have shape \[3, 6\], got \[4, 6\]"):
        layer(normal(2, D))
    layer = made()
    layer.router.weight = torch.nn.Parameter(layer.router.weight[:E].detach())
    with pytest.raises(ValueError, match=r"router.weight must have shape \[8, 6\], got \[5, 6\]"):
        layer(normal(2, D))
    for dense in (to_moe_layer, sf.to_dense):
        with pytest.raises(ValueError, match=r"null experts.*null_experts = 3"):
            dense(made(k=E + N))
