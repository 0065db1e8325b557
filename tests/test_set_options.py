"""Options that are set on a layer which is there: checked as when it is made, and they count from the next call on."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse_ffn as sf
from sparse_ffn.convert import config_of
from sparse_ffn.layers import LatentMoE, MixedMoE, SharedExpertMoE, SwitchHeadAttention
from sparse_ffn.layers.routed import Routed


def layer(**options: Any) -> sf.SigmaMoE:
    torch.manual_seed(0)
    return sf.SigmaMoE(16, 8, 8, 2, **options)


def step(module: sf.SigmaMoE) -> float:
    torch.manual_seed(1)
    module(torch.randn(20, 16))
    return sf.aux_loss(module).item()


@pytest.mark.parametrize(
    ("made", "name", "value"),
    [
        ({}, "balance_weight", 0.5),
        ({}, "balance", "switch"),
        ({"balance": ("entropy", "z"), "balance_weight": (0.1, 0.2)}, "balance_weight", (0.3, 0.0)),
        ({"balance": ("entropy", "z"), "balance_weight": (0.1, 0.2)}, "balance", ("cv2", "z")),
        ({}, "balance_over", "sequence"),
        ({}, "aux", "inject"),
        ({}, "activation", "silu"),
        ({}, "dropout", 0.5),
        ({}, "expert_dropout", 0.5),
        ({}, "k", 3),
    ],
)
def test_a_layer_is_then_as_if_made_with_the_option(made: dict[str, Any], name: str, value: Any) -> None:
    changed, expected = layer(**made), sf.SigmaMoE(16, 8, 8, **{"k": 2, **made, name: value})
    expected.load_state_dict(changed.state_dict())
    setattr(changed, name, value)
    assert repr(changed) == repr(expected)
    assert getattr(changed, name) == getattr(expected, name)
    assert step(changed) == step(expected)
    x = torch.randn(9, 16)
    for other in (changed, copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert torch.equal(other.eval()(x), expected.eval()(x))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("balance_weight", -1.0, "balance_weight must be finite and >= 0"),
        ("balance_weight", (1.0, 2.0), "balance_weight must hold one weight for each of balance = \\('entropy',\\)"),
        ("balance", "balanced", "balance must be one of"),
        ("balance", ("entropy", "z"), "balance_weight must hold one weight for each"),
        ("balance", "bias", "a router is made with 'bias' or without it: make a new layer"),
        ("balance_over", "tokens", "balance_over must be one of 'batch', 'sequence'"),
        ("aux", "add", "aux must be one of 'attach', 'inject'"),
        ("activation", "tanh", "activation must be one of 'relu'"),
        ("dropout", 1.5, "dropout must be in"),
        ("expert_dropout", 1.0, "expert_dropout must be in"),
        ("k", 9, "k must be at least 1 and at most n_experts = 8"),
    ],
)
def test_what_the_constructor_refuses_is_refused_and_changes_nothing(name: str, value: Any, message: str) -> None:
    changed = layer()
    before = repr(changed), getattr(changed, name)
    with pytest.raises(ValueError, match=message):
        setattr(changed, name, value)
    assert (repr(changed), getattr(changed, name)) == before


def test_the_options_of_a_router_are_checked_there_too() -> None:
    layer = sf.SBaseMoE(16, 8, 8, 2, init_scale=4.0)
    for module, name, value in (
        (layer, "n_iters", 0),
        (layer.router, "n_iters", -3),
        (layer.router, "expert_dropout", 5),
        (layer.router, "k", 9),
    ):
        before = getattr(module, name)
        with pytest.raises(ValueError, match=f"{name} must be"):
            setattr(module, name, value)
        assert getattr(module, name) == before


def test_iterations_that_are_set_balance_more() -> None:
    torch.manual_seed(0)
    layer, x = sf.SBaseMoE(16, 8, 8, 2, init_scale=4.0), torch.randn(200, 16) + 1
    busiest = []
    for n_iters in (1, 50):
        layer.n_iters = n_iters
        layer(x)
        busiest.append(sf.routing_stats(layer)[""]["load"].max().item())
    assert busiest[1] < 0.9 * busiest[0]
    assert config_of(layer).n_iters == 50


@pytest.mark.parametrize("share", [1.5, 1.0, 0.0, -0.2])
def test_a_share_of_null_experts_that_is_none_is_refused(share: float) -> None:
    layer = sf.SigmaMoE(16, 8, 8, 2, null_experts=2, null_share=0.5)
    with pytest.raises(ValueError, match="null_share must be in"):
        layer.null_share = share
    assert layer.null_share == 0.5
    layer.null_share = 0.25
    assert "null_share=0.25" in repr(layer)
    for other, message in (
        (sf.SigmaMoE(16, 8, 8, 2), "null_share = 0.5 needs null experts"),
        (sf.SigmaMoE(16, 8, 8, 2, null_experts=2, balance="z"), "null_share = 0.5 needs one of 'entropy'"),
    ):
        with pytest.raises(ValueError, match=message):
            other.null_share = 0.5
        assert other.null_share is None


def test_only_processes_are_synchronised() -> None:
    changed = layer()
    with pytest.raises(TypeError, match="sync_balance must be True, False or a torch"):
        changed.sync_balance = "yes"
    assert changed.sync_balance is False


def test_a_balance_that_other_options_need_stays() -> None:
    null = layer(null_experts=2, null_share=0.5)
    mixed = MixedMoE(16, [(4, 8), (2, 16)], 2, balance_cost=True)
    for changed, option in ((null, "null_share = 0.5"), (mixed, "balance_cost = True")):
        with pytest.raises(ValueError, match=f"{option} needs one of 'entropy'.*got \\('z',\\)"):
            changed.balance = "z"
        assert changed.balance == ("entropy",)
        changed.balance = "switch"


def test_what_a_layer_says_may_be_set_again() -> None:
    changed = layer(balance_weight=0.5)
    before = repr(changed)
    for name in ("balance", "balance_weight", "balance_over", "aux", "activation", "dropout", "expert_dropout", "k"):
        setattr(changed, name, getattr(changed, name))
    assert repr(changed) == before


def test_a_memory_may_be_set_to_the_softmax_that_it_alone_has() -> None:
    memory = sf.ProductKeyMemory(16, 4, k=2)
    memory.activation = "softmax"
    assert "softmax" in repr(memory)
    with pytest.raises(ValueError, match="activation must be one of"):
        sf.TopKFFN(16, 32, k=4).activation = "softmax"


def wrappers() -> dict[str, nn.Module]:
    return {
        "latent": LatentMoE(16, 8, 4, 8, 2),
        "shared": SharedExpertMoE(sf.SigmaMoE(16, 4, 8, 2), sf.DenseFFN(16, 8)),
        "attention": SwitchHeadAttention(16, 2, 4),
    }


@pytest.mark.parametrize("kind", wrappers())
def test_options_of_a_wrapper_are_those_of_its_parts(kind: str) -> None:
    made = wrappers()[kind]
    values = {"balance_weight": 0.5, "balance_over": "sequence", "aux": "inject", "expert_dropout": 0.25}
    values |= {"balance": "switch", "sync_balance": True}
    values |= {"activation": "silu", "dropout": 0.125} if kind != "attention" else {}
    parts = [module for module in made.modules() if hasattr(module, "_balance_options")]
    assert len(parts) == (2 if kind == "attention" else 1)
    for name, value in values.items():
        setattr(made, name, value)
        for part in parts:
            holder = part.router if name == "expert_dropout" else part
            found = getattr(holder, name)
            assert found == ((value,) if name in ("balance", "balance_weight") else value)
            assert getattr(made, name) == found
    if kind == "shared":
        assert (made.shared.activation, made.shared.dropout) == ("silu", 0.125)
    for name in ("aux", "balance", "balance_over"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            setattr(made, name, "nonsense")
    with pytest.raises(ValueError, match="expert_dropout must be in"):
        made.expert_dropout = 7


def test_what_attention_and_topk_alone_have_is_checked_too() -> None:
    attention, topk = SwitchHeadAttention(16, 2, 4), sf.TopKFFN(16, 32, 8)
    gated, memory = sf.TopKFFN(16, 32, 8, glu=True), sf.ProductKeyMemory(16, 6, 5, experts=True)
    affine = sf.ProductKeyMemory(16, 6, 5, query_norm="rms", norm_affine=True)
    for module, name, value, message in (
        (attention, "dropout", 2.0, "dropout must be in"),
        (attention, "rotary", 3.0, "rotary must be in"),
        (topk, "rank_by", "gate", 'rank_by = "gate" needs a gate'),
        (gated, "rank_by", "gats", "rank_by must be one of"),
        (memory, "activation", "softmax", "activation must be one of"),
        (memory, "query_norm", "layr", "query_norm must be one of"),
        (affine, "query_norm", None, "norm_affine = True needs query_norm"),
        (affine, "query_norm", "layer", "query_norm is 'rms', whose parameters norm_affine = True made"),
    ):
        before = getattr(module, name)
        with pytest.raises(ValueError, match=message):
            setattr(module, name, value)
        assert getattr(module, name) == before
    with pytest.raises(TypeError, match="norm_aware must be"):
        topk.norm_aware = "no"
    gated.rank_by = "gate"
    assert "rank_by='gate'" in repr(gated)
    memory.query_norm = "layer"
    assert torch.equal(memory(x := torch.randn(3, 16)), copy.deepcopy(memory)(x))
    assert "query_norm='layer'" in repr(memory)


def test_a_router_of_another_size_is_named() -> None:
    made = sf.SigmaMoE(16, 8, 4, 2)
    for router in (sf.routing.SigmoidRouter(16, 9, 2), sf.routing.SigmoidRouter(18, 8, 2)):
        made.router = router
        with pytest.raises(ValueError, match=r"router scores \d+ experts of tokens of width \d+, the layer has 8"):
            made(torch.randn(3, 16))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize(("router", "balance"), [("sigmoid", "bias"), ("relu", "l1")])
def test_a_router_in_evaluation_counts_nothing(router: str, balance: str, backend: str) -> None:
    made = sf.MoE(16, 8, 4, 2, router=router, balance=balance)
    made.train().router.eval()
    before = copy.deepcopy(made.router.state_dict())
    with sf.backend(backend):
        made(torch.randn(20, 16))
    assert not made.router.load.any()
    sf.update_router_bias(made)
    assert all(torch.equal(old, made.router.state_dict()[name]) for name, old in before.items())


def test_a_parametrised_router_costs_as_much() -> None:
    made = sf.SigmaMoE(16, 8, 4, 2)
    flops = made.flops_per_token()
    nn.utils.parametrizations.weight_norm(made.router, "weight", dim=0)
    assert made.flops_per_token() == flops


def test_a_form_with_a_k_of_its_own_has_an_equal() -> None:
    class Four(sf.MoE):
        def __init__(self, d_model: int, n_experts: int, expert_size: int = 8, k: int = 4, **options: Any) -> None:
            super().__init__(d_model, n_experts, expert_size, k, **options)

    assert sf.parameter_equal(Four, 32, 64)["n_experts"] == 8


def test_the_api_page_has_every_option_that_may_be_set() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    entries = re.findall(r"^::: sparse_ffn\.([\w.]+)\n((?:    .*\n)*)", page, re.M)
    listed = {found: text for name, text in entries if isinstance(found := find(name), type)}
    ours = (sf.SparseFFN, sf.routing.Router, SwitchHeadAttention)
    for cls in (cls for cls in listed if issubclass(cls, ours)):
        told = [listed.get(base, "") for base in cls.__mro__]
        if issubclass(cls, Routed):
            told.append(listed[sf.MoE])  # all mixtures' options
        options = {name for base in cls.__mro__ for name, found in vars(base).items() if settable(name, found)}
        assert not {name for name in options if not re.search(rf"\b{name}\b", " ".join(told))}, cls


def find(name: str) -> Any:
    module, _, attribute = f"sparse_ffn.{name}".rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def settable(name: str, found: object) -> bool:
    return isinstance(found, property) and found.fset is not None and not name.startswith("_")
