"""prune_experts_: what is left is the layer without those experts, and their loss is the error that was predicted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import sparse_ffn as sf
from sparse_ffn import routing
from sparse_ffn.compress import PruningReport

T, D = 64, 6


def deepseek(*sizes: int, **options: Any) -> routing.Router:
    return routing.DeepSeekRouter(*sizes, n_groups=2, topk_groups=1, **options)


LAYERS: dict[str, Callable[[], sf.MoE]] = {
    "sigmoid": lambda: sf.SigmaMoE(D, 8, 4, 2, balance="bias"),
    "softmax over all, GLU, biases": lambda: sf.SwitchMoE(D, 8, 4, 1, glu=True, bias=True, activation="silu", d_out=3),
    "softmax over the selected": lambda: sf.SoftmaxMoE(D, 8, 4, 3),
    "sinkhorn": lambda: sf.SBaseMoE(D, 8, 4, 2),
    "noisy": lambda: sf.NoisyTopKMoE(D, 8, 4, 2),
    "unweighted": lambda: sf.MoE(D, 8, 4, 2, router="unweighted"),
    "DeepSeek, groups": lambda: sf.MoE(D, 8, 4, 2, router=deepseek, balance="bias"),
}


def drawn(layer: sf.MoE) -> sf.MoE:
    """With biases and all else away from zero."""
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return layer


def without(layer: sf.MoE, removed: list[int]) -> sf.MoE:
    """The layer with logits of -inf, at its end, for the removed experts."""
    layer = copy.deepcopy(layer)
    gone = torch.zeros(layer.n_experts, dtype=torch.bool)
    gone[removed] = True
    layer.router.perturb = lambda logits, x: logits.masked_fill(gone, -math.inf)  # type: ignore[method-assign]
    layer.router.register_forward_hook(lambda *call: None)  # so that it is called, and not fused
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_pruned_layer_is_the_layer_whose_router_gives_the_removed_experts_minus_infinity(name: str) -> None:
    layer, x = drawn(LAYERS[name]()).eval(), torch.randn(T, D)
    original = copy.deepcopy(layer)
    stats = sf.expert_stats(layer, [x])
    report = sf.prune_experts_(layer, stats, 0.5)
    kept = list(report.layers[0].kept)
    assert kept == sorted(kept)
    assert len(kept) == 4
    with torch.no_grad():
        torch.testing.assert_close(layer(x), without(original, [e for e in range(8) if e not in kept])(x))
    energy = stats[""].energy
    half = energy.view(2, 4) if "groups" in name else energy.view(1, 8)
    best = half.sort(descending=True).indices[:, : half.shape[1] // 2] + torch.arange(len(half)).unsqueeze(1) * 4
    assert kept == sorted(best.flatten().tolist())


@pytest.mark.parametrize("name", LAYERS)
def test_all_that_belongs_to_an_expert_is_cut_and_fits_a_fresh_layer(name: str) -> None:
    layer = drawn(LAYERS[name]())
    layer.keys.requires_grad_(False)
    before = copy.deepcopy(layer)
    layer(torch.randn(T, D))
    report = sf.prune_experts_(layer, sf.expert_stats(layer, [torch.randn(T, D)]), 6)
    kept = list(report.layers[0].kept)
    for key, tensor in layer.state_dict().items():
        old = before.state_dict()[key]
        assert torch.equal(tensor, old if key == "out_bias" else old[kept]), key
    assert not layer.keys.requires_grad
    assert layer.values.requires_grad
    assert (layer.n_experts, layer.router.n_experts, layer.d_ff) == (6, 6, 24)
    assert layer.active_fraction == layer.k / 6
    assert "n_experts=6" in repr(layer)
    assert layer.router.load.tolist() == [0] * 6
    assert sf.routing_stats(layer) == {}  # nothing has run with these experts
    if name not in ("DeepSeek, groups",):
        fresh = sf.convert.config_of(layer).layer(D, d_out=layer.d_out, **sf.convert.config_of(layer).arguments())
        fresh.load_state_dict(layer.state_dict())
    assert report.parameters == (before.n_parameters, layer.n_parameters)
    (layer(torch.randn(T, D)).sum() + sf.aux_loss(layer)).backward()  # it trains on
    sf.update_router_bias(layer)


def test_to_keep_all_changes_nothing() -> None:
    layer, x = drawn(sf.SigmaMoE(D, 8, 4, 2)), torch.randn(T, D)
    parameters, y = dict(layer.named_parameters()), layer(x)
    report = sf.prune_experts_(layer, sf.expert_stats(layer, [x]), 1.0)
    assert all(layer.get_parameter(name) is p for name, p in parameters.items())
    assert torch.equal(layer(x), y)
    assert report.layers[0].kept == tuple(range(8))
    assert report.layers[0].error == 0


@pytest.mark.parametrize("k", [1, 3])
def test_the_predicted_error_is_that_of_the_lost_slots(k: int) -> None:
    """At K = 1 exactly, where nobody takes the slot; at more but for the cross terms of the lost slots."""
    layer, x = drawn(sf.SigmaMoE(D, 8, 4, k)).double(), torch.randn(T, D, dtype=torch.float64)
    original = copy.deepcopy(layer)
    stats = sf.expert_stats(layer, [x])
    of = sf.prune_experts_(layer, stats, 5).layers[0]
    r = original.router(x)
    lost = torch.ones(8, dtype=torch.bool)
    lost[list(of.kept)] = False
    weights = (original.keys, original.values)
    y = sf.functional.expert_ffn(x, *weights, r.index_TK, r.gate_TK)
    void = r.index_TK.masked_fill(lost[r.index_TK], 8)
    error = (sf.functional.expert_ffn(x, *weights, void, r.gate_TK) - y).square().sum()
    if k == 1:
        assert math.isclose(of.error, math.sqrt((error / y.square().sum()).item()), rel_tol=1e-9)
    else:
        apart = [
            sf.functional.expert_ffn(x, *weights, r.index_TK[:, j : j + 1], r.gate_TK[:, j : j + 1]) for j in range(k)
        ]
        removed = sum((y * lost[r.index_TK[:, j]].unsqueeze(1)).square().sum() for j, y in enumerate(apart))
        whole = sum(y.square().sum() for y in apart)
        assert math.isclose(of.error, math.sqrt((removed / whole).item()), rel_tol=1e-9)


SCORES: dict[str, Callable[[sf.compress.ExpertStats], Tensor]] = {
    "error": lambda s: s.energy,
    "reap": lambda s: s.contribution / s.count.clamp_min(1),
    "contribution": lambda s: s.contribution,
    "frequency": lambda s: s.count,
}


@pytest.mark.parametrize("by", [*SCORES, "own"])
def test_the_experts_of_the_largest_score_stay(by: str) -> None:
    layer, x = drawn(sf.SigmaMoE(D, 8, 4, 2)), torch.randn(T, D)
    stats = sf.expert_stats(layer, [x])
    own = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0, -1.0, 0.0, 0.0])
    score = own if by == "own" else SCORES[by](stats[""])
    report = sf.prune_experts_(layer, stats, 3, by=(lambda s: own) if by == "own" else by)
    assert set(report.layers[0].kept) == set(score.sort(descending=True, stable=True).indices[:3].tolist())


@pytest.mark.parametrize("name", [name for name in LAYERS if "groups" not in name])
def test_a_replaced_expert_is_its_constant_and_nothing_reroutes(name: str) -> None:
    layer, x = drawn(LAYERS[name]()).eval(), torch.randn(T, D)
    original = copy.deepcopy(layer)
    stats = sf.expert_stats(layer, [x])
    report = sf.prune_experts_(layer, stats, 5, replace="mean")
    kept = list(report.layers[0].kept)
    assert set(kept) == set(stats[""].residual.sort(descending=True).indices[:5].tolist())
    removed = sorted({*range(8)} - {*kept})
    r = original.router(x)
    void = r.index_TK.masked_fill(torch.isin(r.index_TK, torch.tensor(removed)), 8)
    weights = {"keys": original.keys, "values": original.values}
    weights |= {"gate_keys": original.gate_keys, "key_bias": original.key_bias}  # type: ignore[dict-item]
    expected = sf.functional.expert_ffn(x, **weights, index=void, gate=r.gate_TK, activation=layer.activation)
    for e in removed:
        expected = expected + (r.gate_TK * (r.index_TK == e)).sum(1, keepdim=True) * stats[""].mean[e].float()
    expected = expected + (0 if layer.out_bias is None else layer.out_bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert (layer.n_experts, layer.null_experts, layer.null_kind) == (5, 3, "constant")
    assert report.layers[0].constants == 3
    assert "8 -> 5 + 3 constants" in str(report)
    again = sf.prune_experts_(layer, sf.expert_stats(layer, [x]), 4, replace="mean").layers[0]
    assert (len(again.kept), again.constants, layer.null_experts) == (4, 1, 4)
    constants = layer.constants
    assert constants is not None
    torch.testing.assert_close(constants[:3].double(), stats[""].mean[removed], atol=1e-6, rtol=1e-5)
    options: dict[str, Any] = {"glu": layer.gate_keys is not None, "bias": layer.out_bias is not None}
    options |= {"balance": layer.balance, "balance_weight": layer.balance_weight, "d_out": layer.d_out}
    fresh = sf.MoE(D, 4, 4, layer.k, router=type(layer.router), null_experts=4, null_kind="constant", **options)
    fresh.load_state_dict(layer.state_dict())
    sf.prune_experts_(layer, sf.expert_stats(layer, [x]), 3)  # null experts stay when others go
    assert (layer.n_experts, layer.null_experts, layer.router.n_experts) == (3, 4, 7)
    (layer.train()(x).sum() + sf.aux_loss(layer)).backward()
    assert constants.shape == (4, layer.d_out)


def test_the_predicted_error_of_replacement_is_the_error_at_k_1() -> None:
    layer, x = drawn(sf.SigmaMoE(D, 8, 4, 1)).double().eval(), torch.randn(T, D, dtype=torch.float64)
    stats, y = sf.expert_stats(layer, [x]), layer(x)
    of = sf.prune_experts_(layer, stats, 5, replace="mean").layers[0]
    error = ((layer(x) - y).square().sum() / y.square().sum()).item()
    assert math.isclose(of.error, math.sqrt(error), rel_tol=1e-9)
    assert of.error < math.sqrt(float(stats[""].energy.sort().values[:3].sum() / stats[""].energy.sum()))


def test_constants_have_no_place_beside_other_null_experts_nor_in_groups() -> None:
    x = torch.randn(T, D)
    zero = sf.SigmaMoE(D, 8, 4, 2, null_experts=2)
    with pytest.raises(ValueError, match="null experts of the kind 'zero'"):
        sf.prune_experts_(zero, sf.expert_stats(zero, [x]), 4, replace="mean")
    sf.prune_experts_(zero, sf.expert_stats(zero, [x]), 4)
    assert zero.router.n_experts == 6
    zero(x)
    groups = sf.MoE(D, 8, 4, 2, router=deepseek, balance="bias")
    with pytest.raises(ValueError, match="a null expert would not fit"):
        sf.prune_experts_(groups, sf.expert_stats(groups, [x]), 4, replace="mean")


class Model(nn.Module):
    def __init__(self, scale: float = 3.0) -> None:
        super().__init__()
        self.a, self.b = drawn(sf.SigmaMoE(D, 8, 4, 2)), drawn(sf.SigmaMoE(D, 6, 4, 3))
        self.b.values.data *= scale
        self.shared = sf.layers.SharedExpertMoE(sf.SoftmaxMoE(D, 4, 3, 2), sf.DenseFFN(D, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.shared(x + self.a(x) + self.b(x))
        return y


def kept_of(report: PruningReport) -> dict[str, list[int]]:
    return {of.name: list(of.kept) for of in report.layers}


def test_over_a_model_the_best_of_all_layers_stay_and_k_of_each() -> None:
    model, x = Model(), torch.randn(T, D)
    stats = sf.expert_stats(model, [x])
    kept = kept_of(sf.prune_experts_(copy.deepcopy(model), stats, 10, scope="model"))
    assert sum(map(len, kept.values())) == 10
    k = {"a": 2, "b": 3, "shared.routed": 2}
    assert all(len(kept[name]) >= k[name] for name in k)
    free: list[tuple[float, str, int]] = []
    for name, of in stats.items():
        order = of.energy.sort(descending=True).indices.tolist()
        assert set(order[: k[name]]) <= set(kept[name])
        free += [(float(of.energy[e]), name, e) for e in order[k[name] :]]
    chosen = sorted(free, reverse=True)[:3]
    assert {(name, e) for _, name, e in chosen} <= {(name, e) for name in kept for e in kept[name]}
    half = kept_of(sf.prune_experts_(model, stats, 0.5, scope="model"))
    assert sum(map(len, half.values())) == 9
    assert model.shared.d_ff == 3 + 3 * len(half["shared.routed"])
    model(x)


def test_protected_layers_and_experts_stay() -> None:
    model, x = Model(), torch.randn(T, D)
    stats = sf.expert_stats(model, [x])
    worst = {name: of.energy.argmin().item() for name, of in stats.items()}
    kept = kept_of(sf.prune_experts_(copy.deepcopy(model), stats, 0.5, protect=["a", "shared.routed"]))
    assert list(kept) == ["b"]
    kept = kept_of(sf.prune_experts_(model, stats, 0.5, protect={name: [e] for name, e in worst.items()}))
    assert all(worst[name] in kept[name] for name in kept)
    assert [len(of) for of in kept.values()] == [4, 3, 2]


@pytest.mark.parametrize("keep", [14, 0.75])
@pytest.mark.parametrize("protect", [["a"], {"a": range(8)}, {"a": range(7)}], ids=["layer", "all", "all but one"])
def test_over_a_model_protected_experts_count(keep: float, protect: Any) -> None:
    """Of 18, 8 of them in the layer that is protected: its 8th expert would be the last to go, too."""
    model = Model(scale=1e-3)
    model.a.values.data *= 1e3
    sf.prune_experts_(model, sf.expert_stats(model, [torch.randn(T, D)]), keep, scope="model", protect=protect)
    assert model.a.n_experts == 8
    assert model.a.n_experts + model.b.n_experts + model.shared.routed.n_experts == 14


def test_the_report_is_a_table_with_the_old_numbers() -> None:
    model = Model()
    report = sf.prune_experts_(model, sf.expert_stats(model, [torch.randn(T, D)]), 0.75, protect=["b"])
    lines = str(report).splitlines()
    assert lines[0].startswith("2 layers pruned: parameters ")
    assert "8 -> 6" in lines[2]
    assert "4 -> 3" in lines[3]
    assert lines[2].endswith("%")


def test_bad_input_changes_nothing_and_is_named() -> None:
    model, x = Model(), torch.randn(T, D)
    stats = sf.expert_stats(model, [x])
    state = copy.deepcopy(model.state_dict())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"keep": 0.3}, "'b' would keep 2 of its experts, fewer than its k = 3"),
        ({"keep": 7}, "keep = 7 is more than the n_experts = 6 of 'b'"),
        ({"keep": 5, "scope": "model"}, r"keep = 5 of the model's experts must be in \[7, 18\]"),
        ({"keep": 12, "scope": "model", "protect": ["a"]}, r"must be in \[13, 18\]: .* and a protected one all"),
        ({"stats": {"a": stats["a"]}}, "lacks b, shared.routed"),
        ({"stats": {**stats, "a": stats["b"]}}, r"stats\['a'\] are of \[6, 6\]"),
        ({"stats": {**stats, "c": stats["b"]}}, "stats has 'c'"),
        ({"protect": ["nowhere"]}, "protect names 'nowhere'"),
        ({"protect": {"a": [8]}}, r"protect\['a'\] must be numbers of experts in \[0, 8\)"),
        ({"protect": {"a": [0, 1, 2, 3, 4, 5]}}, "'a' would keep 4 experts, but protect has more"),
        ({"by": lambda s: s.energy[:2]}, "by must give a finite number for each of the 8 experts of 'a', got a tensor"),
        ({"by": lambda s: s.energy * math.nan}, "by must give a finite number"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            sf.prune_experts_(model, **{"stats": stats, "keep": 0.5, **arguments})
    with pytest.raises(ValueError, match="no MoE layer"):
        sf.prune_experts_(nn.Linear(2, 2), {}, 0.5)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_what_is_not_the_layers_own_is_refused() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    class Wrapped(nn.Module):
        def __init__(self, router: nn.Module) -> None:
            super().__init__()
            self.base = router

        def forward(self, x: Tensor, mask: Tensor | None) -> Any:
            return self.base(x, mask)

    def tied(model: Model) -> None:
        model.b = sf.SigmaMoE(D, 8, 4, 2)
        model.b.keys = model.a.keys

    def routed_alike(model: Model) -> None:
        model.b = sf.SigmaMoE(D, 8, 4, 2)
        model.b.router = model.a.router

    x = torch.randn(T, D)
    changes: list[tuple[Callable[[Model], Any], str]] = [
        (lambda model: parametrize.register_parametrization(model.a, "values", Doubled()), "values of 'a' is no plain"),
        (lambda model: prune.l1_unstructured(model.a, "keys", 0.5), "keys of 'a' is no plain"),
        (lambda model: prune.l1_unstructured(model.a.router, "weight", 0.5), r"router\.weight of 'a' is no plain"),
        (lambda model: setattr(model.a, "router", Wrapped(model.a.router)), "the router of 'a' is a Wrapped"),
        (tied, "keys of 'a' is tied to another"),
        (routed_alike, "the router of 'a' is another module's too"),
    ]
    for change, message in changes:
        model = Model()
        change(model)
        with pytest.raises(ValueError, match=message):
            sf.prune_experts_(model, sf.expert_stats(model, [x]), 0.75)


def test_groups_of_experts_stay_of_one_size() -> None:
    layer = sf.MoE(D, 8, 4, 2, router=deepseek, balance="bias")
    stats = sf.expert_stats(layer, [torch.randn(T, D)])
    for keep, message in ((5, "multiple of its router's n_groups = 2"), (2, "1 experts of each")):
        with pytest.raises(ValueError, match=message):
            sf.prune_experts_(layer, stats, keep)
    with pytest.raises(ValueError, match="groups of unlike sizes"):
        sf.prune_experts_(layer, stats, 0.5, scope="model")
    sf.prune_experts_(layer, stats, 4)
    assert layer.n_experts == 4


def test_a_layer_on_meta_has_nothing_to_prune() -> None:
    layer = sf.SigmaMoE(D, 8, 4, 2)
    stats = sf.expert_stats(layer, [torch.randn(T, D)])
    with pytest.raises(ValueError, match=r"router\.weight is on meta: load the weights first"):
        sf.prune_experts_(layer.to("meta"), stats, 0.5)
    assert layer.n_experts == 8


def test_a_relu_router_aims_at_no_more_experts_than_are_left() -> None:
    layer = sf.MoE(D, 8, 4, 2, router=sf.routing.ReLURouter(D, 8, 2, active=6), balance="l1")
    sf.prune_experts_(layer, sf.expert_stats(layer, [torch.randn(50, D)]), keep=4)
    assert layer.router.active == 4


def test_over_a_model_a_k_beyond_the_experts_keeps_all() -> None:
    layer = sf.SigmaMoE(D, 4, 4, 5, null_experts=3)
    sf.prune_experts_(layer, sf.expert_stats(layer, [torch.randn(30, D)]), 1.0, scope="model")
    assert layer.n_experts == 4
