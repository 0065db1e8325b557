"""Expert FFN of all experts at once, where k is near E: results, gradients, and when it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from net import ROUTINGS, check, expert_case, fp32_first
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_ffn.backends.triton import masked, routing
from sparse_ffn.ops import Units
from sparse_ffn.ops.activations import ACTIVATIONS
from sparse_ffn.ops.expert_ffn import dense
from sparse_ffn.ops.expert_ffn import triton as expert_ffn

RULE = dense.use_dense


@pytest.fixture(autouse=True)
def every_expert(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "use_dense", lambda n_experts, k: True)
    monkeypatch.setattr(expert_ffn, "use_decode", lambda n_slots, n_experts: False)
    monkeypatch.setattr(routing, "launch", None)  # nothing is sorted


@fp32_first
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_expert_ffn(form: str, routing: str, dtype: torch.dtype, device: str) -> None:
    names = list(ACTIVATIONS)
    activation = names[list(ROUTINGS).index(routing) % len(names)]
    check(expert_case(routing, dtype, form=form, activation=activation), device)


@pytest.mark.parametrize("form", ["plain", "everything"])
def test_any_size_and_inference(form: str, device: str) -> None:
    for sizes in ((1, 1, 1), (33, 17, 1)):
        check(expert_case(form=form, sizes=sizes, activation="gelu"), device)
    check(expert_case(form=form, activation="gelu", train=False), device)


def test_what_was_not_chosen_may_overflow(device: str) -> None:
    case = expert_case("empty experts first", torch.float16)
    case.tensors["x"] *= 100
    case.tensors["keys"][:3] *= 5000
    check(case, device)


def test_two_runs_are_bit_equal(device: str) -> None:
    case = expert_case("an expert named twice", torch.bfloat16, form="everything", activation="gelu")
    first, second = check(case, device), check(case, device)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("k", [1, 2, 4, 6, 8])
def test_both_sides_of_the_rule(k: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """k = E down to E/k slightly below and above 2.5: with 5 experts, 10, and so on, what is chosen is right."""
    for n_experts, expected in ((k, True), (5 * k // 2, True), (5 * k // 2 + 1, False)):
        monkeypatch.undo()
        assert RULE(n_experts, k) == expected
    assert RULE(1, 1)


@pytest.mark.parametrize(("n_experts", "k"), [(5, 5), (5, 2), (6, 2)])
def test_the_rule_changes_no_result(n_experts: int, k: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "use_dense", RULE)
    if not RULE(n_experts, k):
        monkeypatch.setattr(routing, "launch", LAUNCH)
    monkeypatch.setitem(ROUTINGS, "these", lambda: (n_experts, torch.rand(23, n_experts).topk(k).indices))
    check(expert_case("these", form="everything", activation="silu"), device)


LAUNCH = routing.launch


@pytest.mark.parametrize("form", ["plain", "everything"])
def test_it_never_waits_for_the_device(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()

    def launch(kernel: Any, grid: int, *arguments: Any, **meta: Any) -> None:
        launched.add(kernel.fn.__name__)

    monkeypatch.setattr(masked, "launch", launch)
    t = {n: x.float() if x.is_floating_point() else x for n, x in expert_case(form=form).tensors.items()}
    with FakeTensorMode() as mode:
        t = {n: mode.from_tensor(x) for n, x in t.items()}
        experts = Units(t["keys"], t["values"], t.get("gate_keys"), t.get("key_bias"))
        x, gate, dropout_mask = t["x"], t["gate"], t.get("dropout_mask")
        call = (x, experts, t["index"], gate, dropout_mask, "relu")
        out, saved = expert_ffn.forward(*call)
        assert out.shape == expert_ffn.inference(*call).shape == (23, 33)
        gradients = expert_ffn.backward(out, x, experts, gate, dropout_mask, saved, "relu")
    assert gradients.experts.keys.shape == t["keys"].shape
    assert launched == {"masked_hidden_kernel", "masked_gradient_kernel"}
