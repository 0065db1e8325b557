"""MixedMoE: banks of experts of unequal size behind one router.

The oracles are a loop over tokens and slots in float64, ``MoE`` where the sizes are equal, and ``MoE`` with zero rows
where they are not.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.layers import MixedMoE

D, K = 6, 3
SIZES = [(3, 2), (2, 5), (1, 4)]
E, F = 6, 20


def made(sizes: list[tuple[int, int]] = SIZES, dtype: torch.dtype = torch.float64, **options) -> MixedMoE:
    return oracle.randomise(MixedMoE(D, sizes, K, dtype=dtype, **options))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loop(layer: MixedMoE, p: dict[str, Tensor], x_TD: Tensor, activation: str) -> Tensor:
    """The sum over each token's slots, one at a time; sigmoid gates, null experts add nothing."""
    of = [(b, i) for b, (experts, _) in enumerate(layer.sizes) for i in range(experts)]
    routing = oracle.route("sigmoid", x_TD @ p["router.weight"].T, layer.k)
    rows = []
    for x, chosen, gates in zip(x_TD, routing.index_TK, routing.gate_TK, strict=True):
        y = p["out_bias"] if "out_bias" in p else torch.zeros(layer.d_out, dtype=x.dtype)
        for e, gate in zip(chosen, gates, strict=True):
            if e >= len(of):
                continue
            b, i = of[e]
            own = {name: p[f"banks.{b}.{name}"][i] for name in ("keys", "values")}
            extra = [p[f"banks.{b}.{n}"][i] if f"banks.{b}.{n}" in p else None for n in ("key_bias", "gate_keys")]
            y = y + gate * (oracle.hidden_units(x, own["keys"], *extra, activation) @ own["values"])
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"glu": True, "bias": True, "d_out": 4, "null_experts": 2}])
def test_it_is_a_loop_over_tokens_and_slots(options: dict, on_backend: str) -> None:
    layer, x = made(activation="silu", **options), normal(11, D)
    mine = dict(layer.named_parameters())
    theirs = {n: p.detach().clone().requires_grad_() for n, p in mine.items()}
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = layer(leaves[0]), by_loop(layer, theirs, leaves[1], "silu")
    torch.testing.assert_close(y, expected)
    weight = normal(*y.shape, seed=7)
    actual = torch.autograd.grad((y * weight).sum(), [leaves[0], *mine.values()])
    wanted = torch.autograd.grad((expected * weight).sum(), [leaves[1], *theirs.values()], allow_unused=True)
    for name, a, b in zip(["x", *mine], actual, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, msg=lambda m, n=name: f"{n}: {m}")


def test_one_bank_is_moe_to_the_bit_and_equal_banks_are_it_to_rounding() -> None:
    x = normal(40, D, dtype=torch.float32)
    plain = oracle.randomise(sf.MoE(D, E, 4, K))
    for sizes in ([(E, 4)], [(2, 4), (4, 4)]):
        layer = MixedMoE(D, sizes, K)
        parts = {n: getattr(plain, n).split([experts for experts, _ in sizes]) for n in ("keys", "values")}
        state = {f"banks.{b}.{n}": t for n, each in parts.items() for b, t in enumerate(each)}
        layer.load_state_dict({**state, "router.weight": plain.router.weight})
        expected = plain(x, router_input=x.clone())  # not in one op with its router
        assert torch.equal(layer(x), expected) or len(sizes) > 1
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(sf.aux_loss(layer), sf.aux_loss(plain))


def test_it_is_moe_with_rows_of_zeros() -> None:
    layer, x = made(), normal(40, D)
    padded = sf.MoE(D, E, 5, K, dtype=torch.float64)
    with torch.no_grad():
        for name in ("keys", "values"):
            rows = [expert for bank in layer.banks for expert in getattr(bank, name)]
            getattr(padded, name).copy_(torch.stack([nn.functional.pad(r, (0, 0, 0, 5 - len(r))) for r in rows]))
        padded.router.weight.copy_(layer.router.weight)
    torch.testing.assert_close(layer(x), padded(x))


def test_a_training_loop_finds_its_loss_its_statistics_and_its_bias() -> None:
    layer = made(balance=("entropy", "bias"), balance_weight=(1.0, 1.0))
    layer.router.bias.zero_()
    model, x = nn.Sequential(layer), normal(50, D)
    model(x)
    routing = oracle.route("sigmoid", x @ layer.router.weight.detach().T, K)
    torch.testing.assert_close(sf.aux_loss(model), oracle.balance_loss("entropy", routing), check_dtype=False)
    load = torch.tensor(oracle.load(routing)) / (50 * K)
    torch.testing.assert_close(sf.routing_stats(model)["0"]["load"], load)
    sf.update_router_bias(model, 0.5)
    torch.testing.assert_close(layer.router.bias, 0.5 * torch.sign(1 / E - load.double()))
    assert sf.router_parameters(model) == [layer.router.weight]
    with sf.RoutingMeter(model) as meter:
        model(x)
    torch.testing.assert_close(meter.stats()["0"]["load"].sum(), torch.tensor(1.0))


def test_its_cost_is_balanced_if_asked() -> None:
    x = normal(400, D)
    layer = MixedMoE(D, [(3, 2), (3, 8)], 2, balance="bias", balance_cost=True, dtype=torch.float64)
    for step in range(400):
        layer(x)
        sf.update_router_bias(layer, 0.05 / (1 + step / 20))
    load = sf.routing_stats(layer)[""]["load"]
    torch.testing.assert_close(load, torch.tensor([4 / 15] * 3 + [1 / 15] * 3), rtol=0.1, atol=0)


@pytest.mark.parametrize(("name", "least"), [("entropy", -math.log(6)), ("switch", 1.0), ("cv2", 0.0)])
def test_a_loss_is_least_at_the_wished_shares(name: str, least: float) -> None:
    layer = MixedMoE(
        E, [(3, 2), (3, 8)], 1, router="softmax", balance=name, balance_weight=1.0, balance_cost=True,
        dtype=torch.float64,
    )  # fmt: skip
    layer.router.weight.data = torch.eye(E, dtype=torch.float64)
    if name == "cv2":  # the first three experts have four tokens each, the others one
        layer(20 * torch.eye(E, dtype=torch.float64)[torch.tensor([0, 1, 2] * 4 + [3, 4, 5])])
    else:
        wished = torch.tensor([4 / 15] * 3 + [1 / 15] * 3, dtype=torch.float64)
        layer(wished.log().expand(30, E))
    assert sf.aux_loss(layer).item() == pytest.approx(least, abs=1e-6)


def test_sizes_costs_and_initialisation() -> None:
    layer = MixedMoE(64, [(4, 16), (2, 48)], K, glu=True, bias=True, init_scale=0.5)
    assert {n: list(p.shape) for n, p in layer.named_parameters()} == {
        "out_bias": [64], "router.weight": [6, 64],
        "banks.0.keys": [4, 16, 64], "banks.0.gate_keys": [4, 16, 64], "banks.0.key_bias": [4, 16],
        "banks.0.values": [4, 16, 64], "banks.1.keys": [2, 48, 64], "banks.1.gate_keys": [2, 48, 64],
        "banks.1.key_bias": [2, 48], "banks.1.values": [2, 48, 64],
    }  # fmt: skip
    assert (layer.n_experts, layer.d_ff, layer.active_fraction, layer.k) == (6, 160, 0.5, K)
    assert layer.expert_sizes == (16, 16, 16, 16, 48, 48)
    one = 2 * 3 * 64
    assert layer.flops_per_token() == 2 * 6 * 64 + round(K * 160 / 6 * one)
    assert layer.flops_per_token(torch.tensor([0.25] * 4 + [0.0] * 2)) == 2 * 6 * 64 + K * 16 * one
    for bank in layer.banks:
        assert bank.keys.std().item() == pytest.approx(0.5 / 8, rel=0.1)
        assert bank.values.std().item() == pytest.approx(0.5 / 160**0.5, rel=0.1)
    assert repr(layer).startswith("MixedMoE(\n  64, sizes=[(4, 16), (2, 48)], k=3, glu=True, bias=True")
    layer.k = 2
    assert layer.router.k == 2


def test_what_is_wrong_is_said_before_anything_is_computed() -> None:
    layer, x = made(balance="bias"), normal(5, D)
    layer.banks[1].values = nn.Parameter(torch.zeros(2, 4, D, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"banks.1.values must have shape \[2, 5, 6\], got \[2, 4, 6\]"):
        layer(x)
    assert not layer.router.load.any()
    with pytest.raises(TypeError, match=r"x has dtype torch\.float32"):
        made()(x.float())
    with pytest.raises(ValueError, match=r"balance_cost = True needs one of .* as balance, got \('z',\)"):
        MixedMoE(D, SIZES, K, balance_cost=True, balance="z")
    with pytest.raises(ValueError, match="at most n_experts = 6, got 7"):
        MixedMoE(D, SIZES, 7)
    with pytest.raises(TypeError, match="MixedMoE has no argument 'expert_size'"):
        MixedMoE(D, SIZES, K, expert_size=4)
