"""Options that are set on a layer which is there: checked as when it is made, and they count from the next call on."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import sparse_ffn as sf
from sparse_ffn.layers import MixedMoE


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
