"""Routing over time: a meter over many forwards, agreement of two models, and the routers' parameters."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_ffn as sf
from benchmarks import bench_meter
from examples.language_model.configs import DEMO
from sparse_ffn.layers import LatentMoE

D = 8


def network(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), sf.SigmaMoE(D, 5, 3, 2, **options), LatentMoE(D, 4, 6, 3, 2))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, stats in expected.items():
        torch.testing.assert_close(actual[name], stats)


@pytest.mark.parametrize("null", [0, 2])
def test_it_says_of_many_forwards_what_routing_stats_says_of_their_tokens_in_one(null: int) -> None:
    model = network(null_experts=null)
    parts = [tokens(n, seed=n) for n in (1, 7, 30)]
    with sf.RoutingMeter(model) as meter:
        assert meter.stats() == {}
        for x in parts:
            model(x)
    model(tokens(99))  # after the end
    found = meter.stats()
    model(torch.cat(parts))
    same(found, sf.routing_stats(model))
    assert list(found) == ["1", "2.moe"]
    assert not model[1]._forward_hooks
    model(parts[0])
    meter.start()
    model(parts[0])
    same(meter.stats(), sf.routing_stats(model))  # from zero
    meter.stop()


def test_padding_and_repeated_forwards_are_left_out() -> None:
    layer, x = sf.SigmaMoE(D, 5, 3, 2), tokens(2, 9)
    mask = torch.rand(2, 9) < 0.6
    with sf.RoutingMeter(layer) as meter:
        layer(x, mask=mask)
        expected = sf.routing_stats(layer)
        same(meter.stats(), expected)
        for reentrant in (False, True):
            meter.start()
            leaf = x.clone().requires_grad_()
            checkpoint(lambda leaf: layer(leaf, mask=mask), leaf, use_reentrant=reentrant).sum().backward()
            same(meter.stats(), expected)
            assert meter._counts[""].sum() == 2 * mask.sum()
        with pytest.raises(RuntimeError, match=r"RoutingMeter counts as a side effect.*torch.func"):
            torch.func.vmap(layer)(x)


def test_agreement_is_the_common_share_of_the_experts() -> None:
    first, second = network(), network()
    x = tokens(40)
    assert sf.routing_agreement(first, second, x) == {"1": 1.0, "2.moe": 1.0}
    nn.init.normal_(second[1].router.weight)
    found = sf.routing_agreement(first, second, (x,))
    with torch.no_grad():
        h = first[0](x)
        pairs = zip(first[1].router(h).index_TK.tolist(), second[1].router(h).index_TK.tolist(), strict=True)
    assert found["1"] == pytest.approx(sum(len(set(a) & set(b)) for a, b in pairs) / 80)
    assert 0 < found["1"] < 1
    assert first.training
    assert not first[1]._forward_hooks


class Twice(nn.Module):
    """Runs its layers, the first of them twice."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.layers[0], *self.layers):
            x = layer(x)
        return x


def test_agreement_is_of_all_calls_of_a_layer() -> None:
    """In the first call both choose alike; their outputs differ, so that they do not in the second."""
    first = Twice(sf.SigmaMoE(D, 8, 4, 2))
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.layers[0].values.normal_()
    x = tokens(40)
    found = sf.routing_agreement(first, second, x)["layers.0"]
    single = sf.routing_agreement(first.layers[0], second.layers[0], x)[""]
    with torch.no_grad():
        later = [model.layers[0].router(model.layers[0](x)).index_TK.tolist() for model in (first, second)]
    shared = sum(len(set(a) & set(b)) for a, b in zip(*later, strict=True)) / 80
    assert (single, found) == (1.0, pytest.approx((1 + shared) / 2))


def test_agreement_wants_the_same_calls_whichever_model_is_first() -> None:
    """A layer that one of the models leaves out."""
    whole, part = (Twice(sf.SigmaMoE(D, 8, 4, 2), sf.SigmaMoE(D, 8, 4, 2)) for _ in range(2))
    part.forward = lambda x: part.layers[0](part.layers[0](x))
    for models in ((whole, part), (part, whole)):
        with pytest.raises(ValueError, match=r"the same tokens through 'layers\.1'"):
            sf.routing_agreement(*models, tokens(5))


def test_agreement_wants_models_whose_layers_can_be_seen() -> None:
    """Hooks that come after a compilation are not called; of a compiled module it is known, and it runs eagerly."""
    torch.compiler.reset()
    model = nn.Sequential(sf.SigmaMoE(D, 5, 3, 2)).eval()
    compiled, x = torch.compile(model, backend="eager"), tokens(10)
    with torch.no_grad():
        compiled(x)
    assert sf.routing_agreement(compiled, copy.deepcopy(compiled), x) == {"_orig_mod.0": 1.0}
    assert sf.routing_agreement(model, compiled._orig_mod, x) == {"0": 1.0}
    model.forward = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="no MoE layer ran on the batch where it could be seen"):
        sf.routing_agreement(model, model, x)


def test_agreement_does_not_ask_for_the_default_device() -> None:
    layer, x = sf.SigmaMoE(D, 5, 3, 2), tokens(10)
    with torch.device("meta"):
        assert sf.routing_agreement(layer, layer, x) == {"": 1.0}


def test_agreement_keeps_padding_out_and_wants_models_alike() -> None:
    layer, x = sf.SigmaMoE(D, 5, 3, 2), tokens(10)
    other = copy.deepcopy(layer)
    mask = torch.arange(10) < 5
    moved = x.clone()
    with torch.no_grad():
        other.router.weight.neg_()
    same_half = {"x": moved, "mask": mask}
    everything = [sf.routing_agreement(layer, other, {"x": moved[part]})[""] for part in (slice(5), slice(5, 10))]
    assert sf.routing_agreement(layer, other, same_half)[""] == pytest.approx(everything[0])
    assert sf.routing_agreement(layer, other, {"x": x})[""] == pytest.approx(sum(everything) / 2)
    nobody = {"x": x, "mask": torch.zeros(10, dtype=torch.bool)}
    assert math.isnan(sf.routing_agreement(layer, other, nobody)[""])
    for wrong in (sf.SigmaMoE(D, 6, 3, 2), sf.SigmaMoE(D, 5, 3, 1), nn.Sequential(layer)):
        with pytest.raises(ValueError, match="the same MoE layers"):
            sf.routing_agreement(layer, wrong, x)
    with pytest.raises(ValueError, match="first and second have no MoE layer"):
        sf.routing_agreement(nn.Linear(D, D), nn.Linear(D, D), x)


def test_the_routers_parameters_make_a_group_that_re_warms() -> None:
    model = nn.Sequential(network(), sf.NoisyTopKMoE(D, 4, 3, 2))
    model.append(model[1])  # shared
    routers = sf.router_parameters(model)
    names = {name for name, p in model.named_parameters() if any(p is r for r in routers)}
    assert names == {"0.1.router.weight", "0.2.moe.router.weight", "1.router.weight", "1.router.noise_weight"}
    assert len(routers) == 4
    rest = [p for p in model.parameters() if all(p is not r for r in routers)]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": routers}], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.1, lambda step: min(1.0, step / 2)])
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        model(tokens(3)).sum().backward()
        optimizer.step()
        schedule.step()
    assert rates == [[0.1, 0.0], [0.1, 0.5], [0.1, 1.0]]


def test_a_layer_that_was_pruned_meanwhile_is_told() -> None:
    model, x = nn.Sequential(sf.SigmaMoE(6, 4, 4, 2)), torch.randn(9, 6)
    with sf.RoutingMeter(model):
        model(x)
        sf.prune_experts_(model, sf.expert_stats(model, [x]), 0.75)
        with pytest.raises(RuntimeError, match="layer '0' has other experts than when RoutingMeter began"):
            model(x)


def test_its_benchmark_times_steps_that_are_counted() -> None:
    small = replace(DEMO, d_model=16, n_layers=2, n_heads=1, d_head=16, d_ff=32, expert_size=4, context=8, batch_size=2)
    assert bench_meter.ratio(small, 0.05).median > 0


def relu(sign: int, experts: int = 5) -> sf.MoE:
    """All experts have the sign of the first number of a token, from ``experts`` on the other one."""
    layer = sf.MoE(D, 5, 4, 3, router="relu")
    with torch.no_grad():
        layer.router.weight[:, 0] = 9.0 * sign
        layer.router.weight[experts:] *= -1
    return layer


def test_a_model_that_selects_nobody_has_nothing_in_common() -> None:
    x = tokens(20)
    x[:, 0] = 3.0
    for models in ((relu(-1), relu(1)), (relu(1), relu(-1))):
        assert sf.routing_agreement(*models, x) == {"": 0.0}
    few, many = relu(1, experts=1), relu(1, experts=3)
    shared = sf.routing_agreement(few, many, x)[""]
    assert 0 < shared < 1
    assert sf.routing_agreement(many, few, x)[""] == pytest.approx(shared)


def test_agreement_records_no_gradients() -> None:
    layer, seen = sf.SigmaMoE(D, 5, 3, 2), []
    layer.register_forward_hook(lambda *arguments: seen.append(torch.is_grad_enabled()))
    sf.routing_agreement(layer, copy.deepcopy(layer), tokens(4))
    assert seen
    assert not any(seen)
