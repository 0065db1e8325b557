"""Conversion by calibration: always-active units, routers fitted to a ranking, a share for each FFN, init="auto"."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_convert import Block, Gated, Mlp, same
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.convert import config, config_from_dict, config_of
from sparse_ffn.convert.budget import Judge
from sparse_ffn.convert.curve import Curve, Point, allocate
from sparse_ffn.convert.find.examples import _shorter
from sparse_ffn.convert.init.auto import choose
from sparse_ffn.convert.init.refit import _Fit
from sparse_ffn.convert.init.router import contributions, fit_ranking
from sparse_ffn.convert.init.weights import FFNWeights
from sparse_ffn.layers import SharedExpertMoE

MIXTURES = [kind for kind in config.CONFIGS if issubclass(kind, config.ExpertsConfig)]
SOME = [
    sf.MoEConfig,
    *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in MIXTURES if kind is not sf.MoEConfig),
]
OPEN = sf.MoEConfig(router="unweighted", expert_size=4)


# ------------------------------------------------------------------------------------------------- a shared expert


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("init", ["split", pytest.param("cluster", marks=pytest.mark.exhaustive)])
def test_units_that_are_always_active_and_all_others_are_the_dense_ffn(kind: type[Any], init: str) -> None:
    for dense in (Mlp("gelu", bias=(False, True)), Gated(bias=True)):
        made = sf.from_dense(dense, kind(expert_size=4, k=3, shared_size=4, init=init)).eval()
        layer = made if isinstance(made, SharedExpertMoE) else made[1]  # after a constant input
        assert (layer.routed.n_experts, layer.shared.d_ff, layer.d_ff) == (3, 4, 16)
        same(made, dense, rtol=1e-4)
        same(sf.to_dense(layer), layer, width=layer.d_model, rtol=1e-4)


def test_the_always_active_units_are_the_largest_on_the_calibration_data() -> None:
    dense = Mlp("relu", d_ff=16)
    x = torch.randn(200, 6)
    size = (torch.relu(dense.a(x)).mean(0) * dense.b.weight.norm(dim=0)).argsort(descending=True)
    layer = sf.from_dense(dense, dataclasses.replace(OPEN, k=1, shared_size=8), inputs=x)
    expected = dense.a.weight[size[:8].sort().values]
    torch.testing.assert_close(layer.shared.keys, expected)
    assert layer.active_fraction == 12 / 16
    torch.testing.assert_close(layer.eval()(x).mean(0), dense(x).mean(0), rtol=1e-4, atol=1e-5)


def test_a_layer_with_a_shared_expert_is_reported_saved_and_made_again() -> None:
    model = nn.Sequential(Block(), Block(Mlp("gelu"))).eval()
    dense = copy.deepcopy(model)
    report = sf.sparsify_(model, dataclasses.replace(OPEN, active=0.75, shared_size=4))
    assert "MoE E=3 G=4 k=2 beside 4 shared" in str(report)
    for new in report.replacements:
        assert config_of(model.get_submodule(new.name)) == dataclasses.replace(new.config, init="fresh")
    again = copy.deepcopy(dense)
    configs = {name: config_from_dict(c) for name, c in json.loads(json.dumps(report.to_dict())).items()}
    sf.sparsify_(again, {name: dataclasses.replace(c, init="fresh") for name, c in configs.items()})
    again.load_state_dict(model.state_dict())
    same(again, model)


@pytest.mark.exhaustive
def test_a_model_of_transformers_with_shared_experts_is_saved_and_loaded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from sparse_ffn.integrations.transformers import from_pretrained, record_conversion

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes)).eval()
    batches = [{"input_ids": torch.randint(0, 20, (2, 20))} for _ in range(3)]
    report = sf.sparsify_(model, sf.MoEConfig(expert_size=2, active=0.75, init="auto"), calibration=batches)
    assert any(isinstance(module, SharedExpertMoE) for module in model.modules())
    record_conversion(model, report)
    model.save_pretrained(tmp_path)
    again = from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(again(**batches[0]).logits, model(**batches[0]).logits)


def test_what_no_config_says_of_a_shared_expert_is_an_error() -> None:
    routed = sf.MoE(6, 4, 3, 2, activation="gelu")
    with pytest.raises(ValueError, match="no MoEConfig makes a layer with a shared expert whose activation differ"):
        config_of(SharedExpertMoE(routed, sf.DenseFFN(6, 8, bias=False)))
    gated = SharedExpertMoE(routed, sf.DenseFFN(6, 8, activation="gelu", bias=False), gated=True)
    with pytest.raises(ValueError, match="no MoEConfig makes a layer with a shared expert with a gate"):
        config_of(gated)
    routed.k = 4
    nn.init.zeros_(routed.router.weight)
    part = SharedExpertMoE(routed, sf.TopKFFN(6, 8, 4, activation="gelu", bias=False))
    with pytest.raises(ValueError, match="no MoEConfig makes a layer with a shared expert that is a TopKFFN"):
        config_of(part)
    with pytest.raises(ValueError, match="what this TopKFFN does: each token uses its own k = 4 of d_ff = 8 units"):
        sf.to_dense(part)
    for layer, why in (
        (gated, "depends on the token"),
        (SharedExpertMoE(routed, sf.DenseFFN(6, 8, bias=False)), "another kind"),
    ):
        with pytest.raises(ValueError, match=f"no dense FFN computes what this SharedExpertMoE does: .*{why}"):
            sf.to_dense(layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.5, "k": 2}, r"active = 0\.5: k = 2 decides that, give k=None"),
        ({"active": 0.0}, r"active = 0\.0: it must be above 0"),
        ({"active": 1.5}, r"active must be in \[0, 1\], got 1\.5"),
        ({"shared_size": -1}, "shared_size must be at least 0, got -1"),
        ({"init": "upcycle", "expert_size": None, "shared_size": 4}, "shared_size = 4 is not for init = .upcycle"),
        ({"init": "upcycle", "expert_size": None, "active": 0.5}, r"active = 0\.5 is not for init = .upcycle"),
        ({"active": 0.25, "shared_size": 4}, r"shared_size = 4 leaves no expert of 4 units of active = 0\.25"),
        ({"shared_size": 16}, r"shared_size = 16 must be below d_ff = 16"),
        ({"expert_size": 20}, r"expert_size = 20 must be at most 16, the units of the experts"),
        (
            {"n_experts": 13, "expert_size": None, "shared_size": 4},
            r"n_experts = 13 must be at most 12, the units of the experts",
        ),
        ({"shared_size": 6}, r"n_experts·expert_size = 2·4 must be d_ff = 16 - shared_size = 6"),
    ],
)
def test_shares_and_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.from_dense(Mlp(), dataclasses.replace(OPEN, **options))


# ------------------------------------------------------------------------------------------------------ the routers


def test_a_ranked_router_selects_the_largest_experts() -> None:
    """Of four experts of one unit the outputs of which have the same distribution, but for one that is always small."""
    x = torch.randn(600, 4, dtype=torch.float64) + 3
    keys = torch.eye(4, dtype=torch.float64)
    ffn = FFNWeights(keys, keys * x.new_tensor([1.0, 1.0, 1.0, 0.1]), "relu")
    expected = (torch.relu(x) * ffn.values.diag()).topk(2).indices.sort().values
    selected = (x @ fit_ranking(ffn, 4, 2, x).t()).topk(2).indices.sort().values
    assert (selected == expected).double().mean() > 0.95


@pytest.mark.parametrize("kind", [sf.MoEConfig, sf.SigmaMoEConfig])
@pytest.mark.parametrize("shared_size", [0, 8])
def test_refitted_values_lose_less_on_new_tokens(kind: type[Any], shared_size: int) -> None:
    dense = Gated(bias=True)
    mixed = torch.randn(6, 6)
    x, fresh = (torch.randn(400, 6) @ mixed for _ in range(2))
    chosen = kind(expert_size=2, active=0.75, shared_size=shared_size)
    errors = []
    for refit in (False, True):
        layer = sf.from_dense(dense, dataclasses.replace(chosen, refit=refit), inputs=x).eval()
        errors.append((layer(fresh) - dense(fresh)).norm() / dense(fresh).norm())
        torch.testing.assert_close(layer(x).mean(0), dense(x).mean(0), rtol=1e-4, atol=1e-4)
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match="refit = True needs calibration"):
        sf.from_dense(dense, dataclasses.replace(chosen, refit=True))


# --------------------------------------------------------------------------------------------- a share for each FFN


def curve(*changes: float, units: int = 8) -> Curve:
    """Of shares 1/4, 2/4, ... in steps of 1/4."""
    points = [Point(i / 4, 0.0, change) for i, change in enumerate(changes, 1)]
    return Curve(points, 0.25, units)


def test_the_budget_goes_where_it_helps_most() -> None:
    generator = torch.Generator().manual_seed(0)
    curves = [curve(*torch.rand(4, generator=generator).sort(descending=True).values.tolist()) for _ in range(4)]
    convex = [curve(*(sum(sorted((p.change for p in c.points), reverse=True)[i:]) for i in range(4))) for c in curves]

    def lost(shares: Any) -> float:
        return sum(c.points[round(4 * share) - 1].change for c, share in zip(convex, shares, strict=True))

    for budget in (8, 14, 20, 24, 32):
        shares = allocate(convex, budget)
        assert sum(8 * share for share in shares) == budget
        every = itertools.product((0.25, 0.5, 0.75, 1.0), repeat=4)
        least = min(lost(choice) for choice in every if sum(8 * share for share in choice) <= budget)
        assert lost(shares) == pytest.approx(least)


def test_a_budget_is_not_overrun_and_a_step_that_helps_later_is_seen() -> None:
    late = curve(1.0, 1.0, 1.0, 0.0)  # only all units help
    early = curve(0.4, 0.35, 0.3, 0.25)
    assert allocate([late, early], 12) == [1.0, 0.5]
    assert allocate([late, early], 8)[0] > 0.5
    assert allocate([curve(1, 0.5, 0.2, 0.1, units=16), curve(1, 0.5, 0.2, 0.1)], 11) == [0.25, 0.75]
    assert allocate([curve(1.0), curve(1.0)], 1) == [0.25, 0.25]  # no less than what was tried


def stacked(*scales: float) -> nn.Sequential:
    """Blocks whose FFNs add more or less to the output."""
    torch.manual_seed(1)
    model = nn.Sequential(*(Block(Mlp("relu", d_ff=32)) for _ in scales)).eval()
    with torch.no_grad():
        for block, scale in zip(model, scales, strict=True):
            block.ffn.b.weight.mul_(scale)
    return model


def test_ffns_share_out_the_active_units_by_what_the_outputs_lose() -> None:
    model, batches = stacked(1.0, 0.01), [torch.randn(8, 10, 6) for _ in range(2)]
    dense = copy.deepcopy(model)
    chosen = dataclasses.replace(OPEN, active=0.5, init="cluster")
    report = sf.sparsify_(model, chosen, calibration=iter(batches))
    k = [new.config.k for new in report.replacements]
    assert sum(k) == 8
    assert k[0] > k[1]
    for new in report.replacements:
        shares = [point.active for point in new.curve]
        assert shares == [0.25, 0.375, 0.5, 0.625, 0.75]
        assert new.curve[-1].error < new.curve[0].error
        assert str(new.curve[0]) in str(report)
    same_k = copy.deepcopy(dense)
    sf.sparsify_(same_k, chosen, calibration=sf.calibrate(dense, batches))
    assert {module.k for module in same_k.modules() if isinstance(module, sf.MoE)} == {4}
    x = torch.randn(20, 10, 6)
    ours, theirs = ((m(x) - dense(x)).norm() for m in (model, same_k))
    assert ours < theirs
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sizes_that_do_not_fit_are_named_with_their_ffn_and_nothing_is_replaced() -> None:
    model = stacked(1.0, 1.0)
    for init in ("cluster", "auto"):
        odd = sf.MoEConfig(expert_size=5, active=0.5, init=init)
        with pytest.raises(ValueError, match=r"^0\.ffn \(a, b: relu, d_ff = 32\): n_experts·expert_size = 6·5 must be"):
            sf.sparsify_(model, odd, calibration=[torch.randn(4, 10, 6)])
    assert all(isinstance(block.ffn, Mlp) for block in model)


@pytest.mark.parametrize(("shared", "d_ff", "active"), [(7, 31, 0.5), (31, 35, 0.98)])
def test_a_shared_expert_of_any_size_leaves_each_ffn_an_expert(shared: int, d_ff: int, active: float) -> None:
    model = nn.Sequential(*(Block(Mlp(d_ff=d_ff)) for _ in range(2))).eval()
    sf.sparsify_(model, dataclasses.replace(OPEN, active=active, shared_size=shared), calibration=[torch.randn(20, 6)])
    layers = [module for module in model.modules() if isinstance(module, SharedExpertMoE)]
    assert [layer.shared.d_ff for layer in layers] == [shared] * 2
    assert all(layer.routed.k >= 1 for layer in layers)


def units(model: nn.Module) -> int:
    """That a token uses in all."""
    layers = [m for m in model.modules() if isinstance(m, (SharedExpertMoE, sf.MoE))]
    inside = {m.routed for m in layers if isinstance(m, SharedExpertMoE)}
    return round(sum(m.active_fraction * m.d_ff for m in layers if m not in inside))


@pytest.mark.parametrize("active", [0.3, 0.4, 0.5, 0.6])
def test_no_more_units_are_used_than_asked_for_beside_a_shared_expert_of_another_size(active: float) -> None:
    model = nn.Sequential(*(Block(Mlp(d_ff=256)) for _ in range(3))).eval()
    asked = sf.MoEConfig(router="unweighted", n_experts=8, shared_size=64, active=active)  # of 24 units each
    sf.sparsify_(model, asked, calibration=[torch.randn(20, 6)])
    least = 3 * (64 + 24)
    assert units(model) <= max(least, active * 3 * 256)
    assert units(model) > active * 3 * 256 - 24 or active == 0.6  # where curves are flat the last expert may not fit


def test_an_ffn_in_several_places_uses_units_in_each() -> None:
    a, b = Block(Mlp(d_ff=32)), Block(Mlp(d_ff=32))
    model = nn.Sequential(a, a, a, b).eval()
    sf.sparsify_(model, dataclasses.replace(OPEN, active=0.5, init="cluster"), calibration=[torch.randn(50, 6)])
    assert 3 * a.ffn.k * 4 + b.ffn.k * 4 <= 64


@pytest.mark.parametrize("kind", ["a number", "cut off", "in an object", "another output", "no numbers"])
def test_outputs_that_tell_nothing_of_the_ffns_or_only_a_part(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = stacked(0.01, 1.0)

        def forward(self, x: Tensor) -> Any:
            y = self.blocks(x)
            if kind == "a number":
                return SimpleNamespace(logits=y.sum(-1, keepdim=True))
            if kind == "cut off":
                return SimpleNamespace(logits=y.masked_fill(torch.arange(6) > 3, -torch.inf))
            if kind == "in an object":
                return SimpleNamespace(y=y)
            return y.argmax(-1) if kind == "no numbers" else (x, y)

    model = Model().eval()
    asked = dataclasses.replace(OPEN, active=0.5, init="cluster")
    told = pytest.warns(SparseFFNWarning, match="first outputs do not depend on any FFN: FFNs share out")
    tells_nothing = kind in ("another output", "no numbers")
    with told if tells_nothing else contextlib.nullcontext():
        report = sf.sparsify_(model, asked, calibration=[torch.randn(80, 6)])
    first, second = (new.config.k for new in report.replacements)
    assert first + second == 8
    if tells_nothing:
        assert all(point.change == point.error**2 for new in report.replacements for point in new.curve)
    else:
        assert first < second


def test_outputs_that_are_not_finite_are_told() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = stacked(1.0, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x) * torch.inf

    with pytest.warns(SparseFFNWarning, match="first outputs are not finite") as told:
        sf.sparsify_(Model().eval(), dataclasses.replace(OPEN, active=0.5), calibration=[torch.randn(80, 6)])
    assert told[0].filename == __file__


def test_logits_are_compared_as_distributions() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = stacked(1.0, 0.01)
            self.shift = 0.0

        def forward(self, x: Tensor, attention_mask: Tensor) -> Output:
            return Output(self.blocks(x) + self.shift * (1 + 9 * torch.randn(6) * (1 - attention_mask.unsqueeze(-1))))

    model = Model()
    judge = Judge(model, [{"x": torch.randn(2, 3, 6), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}])
    model.shift = 5.0  # of all logits alike, and of padding by chance
    assert judge.change() < 1e-6
    nn.init.zeros_(model.blocks[0].ffn.b.weight)
    assert judge.change() > 1e-3


@pytest.mark.parametrize("logits", [True, False])
def test_outputs_are_compared_at_a_bounded_number_of_real_tokens(logits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0

        def forward(self, x: Tensor, attention_mask: Tensor) -> Any:
            return SimpleNamespace(logits=self.scale * x) if logits else self.scale * x

    model, x = Outputs(), torch.randn(5, 7, 6)
    mask = torch.rand(5, 7) < 0.7
    judge = Judge(model, [{"x": x, "attention_mask": mask.long()}])
    monkeypatch.setattr("sparse_ffn.convert.budget.CHUNK", 4 * 6)
    model.scale = 1.5
    real = x[mask]
    if logits:
        old, new = real.log_softmax(-1), (1.5 * real).log_softmax(-1)
        assert judge.change() == pytest.approx((old.exp() * (old - new)).sum(-1).mean().item(), rel=1e-5)
    else:
        assert judge.change() == pytest.approx(0.25, rel=1e-5)
    monkeypatch.setattr("sparse_ffn.convert.budget.MOST_ROWS", 8)
    model.scale = 1.0
    (rows,) = Judge(model, [{"x": x, "attention_mask": mask}]).before
    assert torch.equal(rows, real[[i * len(real) // 8 for i in range(8)]])


def test_outputs_are_compared_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Any:
            in_memory.append(sum(type(t) is Tensor and t.shape == (10, 613) for t in gc.get_objects()))
            return SimpleNamespace(logits=x.clone())

    monkeypatch.setattr("sparse_ffn.convert.budget.CHUNK", 2 * 613)
    in_memory: list[int] = []
    judge = Judge(Logits(), torch.randn(3, 2, 5, 613).unbind())
    assert judge.change() == 0
    assert in_memory == [0, 1, 2, 3, 3, 3]  # those from before, and of new ones the model's


def test_padding_counts_in_no_order_of_the_outputs() -> None:
    class Outputs(nn.Module):
        def __init__(self, change: Any) -> None:
            super().__init__()
            self.added, self.change = 0.0, change

        def forward(self, x: Tensor, attention_mask: Tensor) -> Any:
            return self.change(x + self.added)

    x, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    x[mask == 0] = 100.0
    changes = []
    for change in (lambda y: y, lambda y: y.flatten(0, 1), lambda y: y.transpose(0, 1)):
        model = Outputs(change)
        judge = Judge(model, [{"x": x, "attention_mask": mask}])
        model.added = 1.0
        changes.append(judge.change())
    assert changes == [pytest.approx(changes[0])] * 3
    assert changes[0] > 0.1


# ------------------------------------------------------------------------------------------------------------- auto


def test_auto_chooses_for_fewer_experts_where_all_would_come_nearest_to_the_share() -> None:
    model = nn.Sequential(*(Block(Mlp("relu", d_ff=64)) for _ in range(3))).eval()
    asked = sf.MoEConfig(router="unweighted", init="auto", expert_size=32, active=0.8)  # of two experts
    report = sf.sparsify_(model, asked, calibration=[torch.randn(300, 6)])
    assert units(model) <= 0.8 * 3 * 64
    fewer = [new for new in report.replacements if new.config.k < 2]
    assert fewer
    assert all(new.config.init == "cluster" or new.config.router_init != "mean_keys" for new in fewer)


@pytest.mark.parametrize(("d_ff", "active"), [(256, 0.1), (256, 0.25), (256, 0.75), (64, 0.25), (1536, 0.3), (96, 0.5)])
def test_the_size_of_experts_that_is_chosen_fits_the_active_share(d_ff: int, active: float) -> None:
    layer = sf.from_dense(Mlp(d_ff=d_ff), sf.MoEConfig(router="unweighted", active=active))
    assert layer.active_fraction == pytest.approx(active, rel=0.26 if active == 0.1 else 0.1)
    assert sf.from_dense(Mlp(d_ff=1536), sf.MoEConfig(active=0.25)).expert_size == 128  # the largest that does


def test_auto_is_no_worse_on_new_tokens_than_what_it_chooses_from() -> None:
    dense, x = Mlp("relu", d_ff=32), torch.randn(100, 6)
    fresh = torch.randn(600, 6)
    with torch.no_grad():
        dense.a.bias[:8] = 3.0  # always on

    def error(chosen: config.ExpertsConfig) -> float:
        layer = sf.from_dense(dense, chosen, inputs=x).eval()
        return ((layer(fresh) - dense(fresh)).norm() / dense(fresh).norm()).item()

    auto = dataclasses.replace(OPEN, active=0.5, init="auto")
    plain = dataclasses.replace(auto, init="cluster")
    assert error(auto) < 0.8 * error(plain)
    layer = sf.from_dense(dense, auto, inputs=x)
    assert isinstance(layer, SharedExpertMoE)
    assert layer.active_fraction == 0.5
    kept = sf.from_dense(dense, dataclasses.replace(auto, shared_size=0, cluster_by="keys"), inputs=x)
    assert isinstance(kept, sf.MoE)
    assert kept.k == 4


@pytest.mark.parametrize("kind", SOME)
def test_auto_is_exact_at_all_experts_and_needs_no_calibration(kind: type[Any]) -> None:
    dense, x = Gated(), torch.randn(60, 6)
    for inputs in (None, x):
        same(sf.from_dense(dense, kind(expert_size=4, k=4, init="auto"), inputs=inputs).eval(), dense, rtol=1e-4)
    layer = sf.from_dense(dense, kind(expert_size=4, k=2, init="auto"))
    assert (type(layer), layer.k) == (kind.layer, 2)


@pytest.mark.parametrize("best", [("split", None), ("cluster", "keys"), ("cluster", None)])
def test_auto_tries_each_way_to_deal_units_out_after_any_other(best: tuple[str, str | None]) -> None:
    ffn = FFNWeights(torch.randn(16, 6), torch.randn(16, 6), "relu")
    auto = dataclasses.replace(OPEN, active=0.5, init="auto")
    chosen = choose(auto, ffn, lambda tried: (tried.init, tried.cluster_by) != best)
    assert (chosen.init, chosen.cluster_by) == best


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_auto_splits_though_units_were_to_be_clustered_where_that_is_exact_or_all_that_can_be(where: str) -> None:
    dense, k = Mlp("relu", d_ff=16).to(where), {"cpu": 4, "meta": 2}[where]
    auto = dataclasses.replace(OPEN, k=k, init="auto", cluster_by="keys")
    layer = sf.from_dense(dense, auto, inputs=torch.randn(20, 6) if where == "cpu" else None)
    if where == "cpu":
        same(layer, dense)
    assert (layer.k, layer.keys.device.type) == (k, where)


# --------------------------------------------------------------------------------------------------- example inputs


class Window(nn.Module):
    """A layer that does not run on tokens alone, as those of LED and LXMERT."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)

    def forward(self, x: Tensor, *, size: int, weights: Tensor) -> Tensor:
        assert x.shape[1] % size == 0
        return x + self.down(self.act(self.up(x * weights)))


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Window(), Window()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, size=4, weights=torch.linspace(0, 1, x.shape[1]).view(1, -1, 1))
        return x


def test_a_layer_that_needs_more_arguments_is_found_by_an_example() -> None:
    model, x = Windows().eval(), torch.randn(2, 8, 6)
    dense = copy.deepcopy(model)
    exact = dataclasses.replace(OPEN, k=4)
    with pytest.warns(sf.SparseFFNWarning, match="no FFN was replaced"):
        report = sf.sparsify_(model, exact)
    assert not report.replacements
    assert "does not run by itself" in report.unknown["layers.0.up"]
    assert sf.sparsify_(model, exact, example_inputs=x).names == ["layers.0.up", "layers.1.up"]
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    assert list(sf.calibrate(dense, [x])) == ["layers.0.up", "layers.1.up"]  # the first batch is an example
    assert sf.sparsify_(dense, exact, calibration=[x]).names == ["layers.0.up", "layers.1.up"]


class Embedded(nn.Module):
    """An FFN of small tokens without a norm, its dropout before its activation in the module's order."""

    def __init__(self, d_model: int = 64) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(20, d_model), nn.Linear(d_model, 4 * d_model)
        self.dropout, self.act, self.down = nn.Dropout(0.1), nn.ReLU(), nn.Linear(4 * d_model, d_model)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.down(self.dropout(self.act(self.up(self.table(ids)))))
        return y


@pytest.mark.parametrize("d_model", [32, 256])
def test_a_dropout_is_not_taken_for_the_activation_where_the_tokens_are_small(d_model: int) -> None:
    model, ids = nn.Sequential(Embedded(d_model)).eval(), torch.arange(12).view(2, 6)
    expected = model(ids)
    assert sf.sparsify_(model, sf.DenseFFNConfig(), example_inputs=ids).names == ["0.up"]
    assert isinstance(model[0].act, nn.Identity)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "rows", "shape"), [(4, 1, (2, 8, 6)), (16, 1, (2, 48, 6)), (16, 5, (5, 48, 6))], ids=str
)
def test_an_example_is_short_where_the_model_runs_on_a_short_one(size: int, rows: int, shape: tuple[int, ...]) -> None:
    """Layers are probed in fp64 on what they get: not on a whole batch."""
    seen = set()

    class Watched(Windows):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) >= rows
            for layer in self.layers:
                x = layer(x, size=size, weights=torch.linspace(0, 1, x.shape[1]).view(1, -1, 1))
            return x

    class Layer(Window):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            if x.dtype == torch.float64:
                seen.add(tuple(x.shape))
            return super().forward(x, **options)

    model = Watched().eval()
    model.layers = nn.ModuleList([Layer(), Layer()])
    x = torch.randn(5, 48, 6)
    report = sf.sparsify_(model, dataclasses.replace(OPEN, k=4), example_inputs=x)
    assert report.names == ["layers.0.up", "layers.1.up"]
    assert {of for of in seen if of[1] != 3} == {shape}  # others are of a probe


IDS = torch.arange(60).view(3, 20)
SHORTER: dict[str, tuple[Any, list[Any]]] = {
    "all sequences of one length": ((IDS, IDS.view(3, 20, 1)), [(2, 8), (2, 8, 1)]),
    "a decoder's have their own": (
        {"input_ids": IDS, "decoder_input_ids": IDS.view(3, 4, 5)[:, :, 0], "use_cache": False},
        [(2, 8), (2, 4), False],
    ),
    "a row's label": ({"x": IDS, "labels": IDS[:, 0]}, [(2, 8), (2,)]),
    "what may hold positions": ({"x": IDS, "spans": IDS[:, :2]}, [(2, 20), (2, 2)]),
    "an image": ([torch.zeros(3, 3, 16, 16), torch.zeros(7)], [(2, 3, 16, 16), (7,)]),
}


@pytest.mark.parametrize("what", SHORTER)
def test_only_what_is_surely_a_sequence_is_cut_to_fewer_positions(what: str) -> None:
    batch, shapes = SHORTER[what]
    short = next(iter(_shorter(batch)))
    values = short.values() if isinstance(short, dict) else short
    assert [tuple(v.shape) if isinstance(v, Tensor) else v for v in values] == shapes


def test_real_tokens_are_left_where_padding_comes_first() -> None:
    mask = (torch.arange(20) >= torch.tensor([[15], [0], [3]])).long()
    for padded, expected in ((mask, IDS[:2, -8:]), (mask.flip(1), IDS[:2, :8])):
        for given in (padded, -1e9 * (1 - padded)):  # 1 for tokens, and added to scores
            assert torch.equal(next(iter(_shorter({"ids": IDS, "attention_mask": given})))["ids"], expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["LED", "Lxmert"])
def test_led_and_lxmert_are_converted_by_an_example(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(3, 20, (2, 8))
    if kind == "LED":
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": 4}
        model = transformers.LEDModel(transformers.LEDConfig(vocab_size=20, d_model=8, **sizes, **heads)).eval()
        batch = {"input_ids": ids, "decoder_input_ids": ids}
        count = 2
    else:
        layers = {"l_layers": 1, "x_layers": 1, "r_layers": 1}
        shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "visual_feat_dim": 5}
        model = transformers.LxmertModel(transformers.LxmertConfig(vocab_size=20, **shape, **layers)).eval()
        batch = {"input_ids": ids, "visual_feats": torch.randn(2, 3, 5), "visual_pos": torch.rand(2, 3, 4)}
        count = 4
    dense = copy.deepcopy(model)
    report = sf.sparsify_(model, dataclasses.replace(OPEN, k=4), example_inputs=batch)
    assert len(report.replacements) == count, report
    ours, theirs = model(**batch), dense(**batch)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [sf.SigmaMoEConfig(expert_size=4, k=1), sf.SwitchMoEConfig(expert_size=4)])
def test_experts_that_no_token_of_the_calibration_selects_are_finite(config: Any) -> None:
    layer = sf.from_dense(sf.DenseFFN(8, 16), config, inputs=torch.randn(1, 8).repeat(20, 1))
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("options", [{}, {"refit": True, "k": 2}, {"init": "auto", "active": 0.5}])
def test_calibration_beyond_the_ffns_dtype_is_told_with_its_name(options: dict[str, Any]) -> None:
    """A token whose output overflows would make the whole router NaN."""
    model = nn.Sequential(Block(Mlp("relu", d_ff=32))).half()
    next(model[0].ffn.parameters()).data.fill_(1.0)
    x = torch.randn(64, 6).half()
    x[3] = 2e4
    before = list(model[0].children())
    config = sf.SigmaMoEConfig(n_experts=4, **{"k": 2, **options}) if "init" not in options else None
    with pytest.raises(ValueError, match=r"0\.ffn: its calibration must give finite outputs of the FFN, .* float16"):
        sf.sparsify_(model, config or dataclasses.replace(OPEN, **options), calibration={"0.ffn": x})
    assert list(model[0].children()) == before


def test_a_router_is_fitted_though_one_experts_part_is_beyond_fp16() -> None:
    """Two parts of 1.2e5 and -1.2e5: the FFN's output is finite."""
    values = torch.tensor([[400.0], [400.0], [-400.0], [-400.0]]).half()
    ffn = FFNWeights(torch.ones(4, 1).half(), values, "relu")
    x = torch.full((3, 1), 150.0).half()
    assert ffn.output(x).isfinite().all()
    assert contributions(ffn, 2, x).tolist() == [[120000.0, 120000.0]] * 3


def test_one_token_and_one_expert_give_a_finite_router() -> None:
    config = sf.SigmaMoEConfig(n_experts=1, k=1)
    layer = sf.from_dense(sf.DenseFFN(8, 16), config, inputs=torch.randn(1, 8))
    assert layer.router.weight.isfinite().all()
    assert layer(torch.randn(2, 8)).isfinite().all()


@pytest.mark.parametrize(
    "chosen",
    [
        dataclasses.replace(OPEN, k=2, init="cluster", router_init="ranked", refit=True, bias=True),
        dataclasses.replace(OPEN, active=0.5, init="auto"),
    ],
    ids=["refitted", "auto"],
)
def test_layers_are_made_in_their_own_dtype_under_autocast(chosen: Any) -> None:
    x, made = torch.randn(64, 6) + 4 * torch.randn(6), []
    dense = nn.Sequential(Block(Mlp("gelu", d_ff=32)))
    for on in (False, True):
        model = copy.deepcopy(dense)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            report = sf.sparsify_(model, chosen, calibration={"0.ffn": x})
        made.append((model, report.replacements[0].relative_error))
    (plain, error), (cast, same_error) = made
    assert error == same_error
    for ours, theirs in zip(cast.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_an_output_bias_values_are_refitted_without_an_intercept() -> None:
    units, outputs = torch.rand(50, 4).double() + 1, torch.randn(50, 3).double() + 5
    gram = units.T @ units
    expected = torch.linalg.solve(gram + torch.eye(4) * gram.diagonal().mean(), units.T @ outputs)
    values, bias = _Fit(units, outputs, centred=False).solve(1.0)
    torch.testing.assert_close(values, expected)
    assert not bias.any()
