"""ReLU routing: gates relu(logit), void slots where they are 0, and an L1 loss whose weight adapts."""

from __future__ import annotations

import copy
import math
from functools import partial

import oracle
import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn import plot
from sparse_ffn.layers import MixedMoE
from sparse_ffn.routing import ReLURouter, SigmoidRouter

D, E, G, K = 6, 5, 3, 3


def made(k: int = K, dtype: torch.dtype = torch.float64, **options) -> sf.MoE:
    return oracle.randomise(sf.MoE(D, E, G, k, router="relu", dtype=dtype, **{"balance": "none", **options}))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loop(p: dict[str, Tensor], x_TD: Tensor, k: int) -> Tensor:
    rows = []
    for x in x_TD:
        y, logits = torch.zeros_like(p["values"][0, 0]), p["router.weight"] @ x
        for e in oracle.ranked(logits.detach(), k):
            if logits[e] > 0:
                y = y + logits[e] * (torch.relu(p["keys"][e] @ x) @ p["values"][e])
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("k", [K, E])
def test_it_is_a_loop_over_the_experts_of_positive_logit(k: int, on_backend: str) -> None:
    layer, x = made(k), normal(40, D)
    mine = dict(layer.named_parameters())
    theirs = {n: p.detach().clone().requires_grad_() for n, p in mine.items()}
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = layer(leaves[0]), by_loop(theirs, leaves[1], k)
    torch.testing.assert_close(y, expected)
    weight = normal(*y.shape, seed=7)
    actual = torch.autograd.grad((y * weight).sum(), [leaves[0], *mine.values()])
    for a, b in zip(actual, torch.autograd.grad((expected * weight).sum(), [leaves[1], *theirs.values()]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_expert_of_no_positive_logit_is_not_read_and_a_token_may_have_none(backend: str) -> None:
    layer, x = made(E, torch.float32), normal(20, D, dtype=torch.float32).abs()
    layer.router.weight.data = -torch.rand(E, D)
    layer.router.weight.data[2] *= -1
    layer.keys.data[[0, 1, 3, 4]] = math.nan
    with sf.backend(backend):
        assert layer(x).isfinite().all()
        assert layer(x).any()
        layer.router.weight.data[2] *= -1
        assert not layer(x).any()
    assert not layer.router(x).gate_TK.any()
    assert (layer.router(x).index_TK == E).all()
    stats = sf.routing_stats(layer)[""]
    assert (stats["entropy"], stats["busiest"], stats["dead"]) == (0, 0, 0)


def test_statistics_count_what_is_computed() -> None:
    layer, x = made(), normal(30, D)
    mask = torch.rand(30) < 0.7
    layer(x, mask=mask)
    routing = layer.router(x)
    chosen = routing.index_TK[mask].flatten()
    counts = torch.tensor([(chosen == e).sum() for e in range(E)])
    torch.testing.assert_close(sf.routing_stats(layer)[""]["load"], counts / counts.sum())
    with sf.RoutingMeter(layer) as meter:
        layer(x, mask=mask)
    torch.testing.assert_close(meter.stats()[""]["load"], counts / counts.sum())
    assert sf.routing_agreement(layer, copy.deepcopy(layer), x)[""] == 1
    pytest.importorskip("matplotlib")
    assert len(plot.routing_figure(layer).axes) == 3


@pytest.mark.parametrize("name", ["switch", "cv2"])
def test_other_losses_count_no_void_slot(name: str) -> None:
    layer, x = made(balance=name, balance_weight=1.0), normal(30, D)
    layer(x)
    index, gate = (t.detach() for t in layer.router(x)[1:])
    slots = torch.zeros(30, E + 1, dtype=torch.float64)
    if name == "switch":
        f = slots.scatter_add(1, index, torch.ones_like(gate))[:, :E].mean(0)
        expected = E * (f * torch.softmax(x @ layer.router.weight.T, 1).mean(0)).sum()
    else:
        total = gate.sum(1, keepdim=True)
        importance = slots.scatter_add(1, index, gate / torch.where(total > 0, total, 1))[:, :E].sum(0)
        expected = importance.var(correction=0) / importance.mean() ** 2
    torch.testing.assert_close(sf.aux_loss(layer), expected.float())


def test_null_experts_stand_behind_the_others() -> None:
    layer, x = made(null_experts=2, null_kind="constant"), normal(30, D)
    expected = by_loop({n: p[:E] for n, p in layer.named_parameters()}, x, E)
    for t, logits in enumerate(x @ layer.router.weight.T):
        kept = oracle.ranked(logits, K)
        expected[t] = by_loop({n: p[:E] for n, p in layer.named_parameters()}, x[t : t + 1], E)[0]
        for e in set(range(E + 2)) - set(kept):
            if e < E and logits[e] > 0:
                expected[t] -= logits[e] * (torch.relu(layer.keys[e] @ x[t]) @ layer.values[e])
        for e in kept:
            if e >= E and logits[e] > 0:
                expected[t] += logits[e] * layer.constants[e - E]
    torch.testing.assert_close(layer(x), expected)


# ---------------------------------------------------------------------------------------------------- the L1 loss


def test_the_loss_is_the_papers_with_the_weight_that_adapts() -> None:
    layer, x = made(balance="l1", balance_weight=0.5), normal(2, 20, D)
    layer.router.l1.fill_(0.25)
    mask = torch.rand(2, 20) < 0.7
    for over in ("batch", "sequence"):
        layer.balance_over = over
        layer(x, mask=mask)
        losses = []
        for pool in oracle.pools((2, 20), mask, over):
            logits = x.flatten(0, 1)[pool] @ layer.router.weight.T
            f = E / K * (logits > 0).double().mean(0)
            losses.append((f * torch.relu(logits).mean(0)).sum())
        loss = sf.aux_loss(layer)
        torch.testing.assert_close(loss, (0.5 * 0.25 * sum(losses) / len(losses)).float())
    assert loss.grad_fn is not None


def test_its_weight_follows_the_number_of_active_experts() -> None:
    layer, x = made(balance="l1"), normal(20, D)
    active = ((x @ layer.router.weight.T) > 0).double().sum(1).mean().item()
    for wished, factor in ((active - 0.1, 1.2), (active + 0.1, 1 / 1.2), (active, 1.0)):
        layer.router.active = wished
        layer.router.l1.fill_(1e-3)
        layer(x)
        layer(x)
        sf.update_router_bias(layer)
        assert layer.router.l1.item() == pytest.approx(1e-3 * factor)
        assert not layer.router.load.any()
    layer.eval()(x)
    sf.update_router_bias(layer)
    assert layer.router.l1.item() == pytest.approx(1e-3)


def test_its_weight_stays_a_number_that_can_change() -> None:
    """Multiplied by 1.2 for ever it would be infinite, whose product with a weight of 0 is NaN, and at last 0."""
    layer, x = made(balance="l1", balance_weight=0.0), normal(20, D)
    for start, wished, grows in ((3e38, 0.01, True), (1e-44, 8, False), (1e-44, 0.01, True)):
        layer.router.active = wished
        layer.router.l1.fill_(start)
        layer(x)
        sf.update_router_bias(layer)
        before = layer.router.l1.item()
        layer(x)
        (loss := sf.aux_loss(layer)).backward()
        sf.update_router_bias(layer)
        assert loss.isfinite()
        assert layer.router.weight.grad.isfinite().all()
        assert 0 < layer.router.l1.item() < math.inf
        if grows and start < 1:
            assert layer.router.l1.item() > before


@pytest.mark.parametrize("mixed", [False, True])
def test_training_reaches_the_wished_number_of_experts(mixed: bool) -> None:
    torch.manual_seed(0)
    router = partial(ReLURouter, active=2)
    options = {"router": router, "balance": "l1", "balance_weight": 1.0}
    layer = MixedMoE(8, [(4, 4), (4, 8)], 8, **options) if mixed else sf.MoE(8, 8, 6, 8, **options)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.router.l1.fill_(1e-3)
    target = nn.Linear(8, 8)
    used = []
    for _ in range(150):
        x = torch.randn(64, 8)
        x[:, 0] = 2  # on symmetric tokens a logit without a bias is positive half of the time, whatever its weights
        loss = (layer(x) - torch.tanh(target(x)).detach()).square().mean() + sf.aux_loss(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sf.update_router_bias(layer)
        used.append((layer.router(x).index_TK < 8).double().sum(1).mean().item())
    assert used[0] > 2.5
    assert sum(used[-75:]) / 75 == pytest.approx(2, abs=0.3)


def test_the_weight_is_kept_in_fp32_and_in_the_state_dict() -> None:
    layer = made(balance="l1", dtype=torch.bfloat16)
    assert layer.router.l1.dtype == layer.half().router.l1.dtype == torch.float32
    assert layer.state_dict()["router.l1"] == pytest.approx(1e-8, rel=1e-6)
    layer.router.l1.fill_(1.0)
    layer.reset_parameters()
    assert layer.router.l1.item() == pytest.approx(1e-8, rel=1e-6)
    assert "ReLURouter(6, n_experts=5, k=3)" in repr(layer)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"balance = \('l1',\) needs router = 'relu'.*'sigmoid'"):
        sf.MoE(D, E, G, K, balance="l1")
    with pytest.raises(ValueError, match=r'balance = "bias".*take balance = "l1"'):
        sf.MoE(D, E, G, K, router="relu", balance="bias")
    with pytest.raises(ValueError, match="active must be at most n_experts = 5, got 6"):
        ReLURouter(D, E, K, active=6)
    with pytest.raises(ValueError, match="ReLURouter weighs an expert of logit 0 with 0"):
        sf.from_dense(sf.DenseFFN(D, E * G), sf.MoEConfig(router="relu", expert_size=G, k=K))
    with pytest.raises(RuntimeError, match=r"balance=.l1. counts .* torch.func"):
        torch.func.grad(lambda x: made(balance="l1")(x).sum())(normal(4, D))
    assert not SigmoidRouter.voids_zeros


def test_what_the_l1_weight_adapts_to_leaves_padding_out() -> None:
    layer, x = sf.MoE(D, E, G, K, router="relu", balance="l1"), torch.randn(20, D)
    layer(x, mask=torch.arange(20) < 7)
    assert layer.router.load.tolist() == [int((x[:7] @ layer.router.weight.T > 0).sum()), 7]
