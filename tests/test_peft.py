"""peft: LoRA on experts and router by target_parameters; merged equals unmerged, on every backend, non-square sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.integrations.peft import inner_first
from sparse_ffn.layers import LatentMoE, SharedExpertMoE, SwitchHeadAttention

peft = pytest.importorskip("peft")

D, E, G, O = 10, 3, 6, 8
NAMES = ("keys", "values", "gate_keys", "router.weight")


def adapted(layer: sf.MoE, *names: str) -> Any:
    """A model around the layer with LoRA on these parameters, its adapters random instead of zero."""
    model = nn.Sequential(nn.Linear(D, D), layer)
    config = peft.LoraConfig(r=2, target_parameters=[f"1.{name}" for name in names], target_modules=[])
    with inner_first(model):
        model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.4)
    return model


def layer_of(**options: Any) -> sf.MoE:
    torch.manual_seed(0)
    return sf.MoE(D, E, G, 2, d_out=O, glu=True, activation="silu", **options)


@pytest.mark.parametrize("router", ["sigmoid", "softmax_topk"])
def test_merged_equals_unmerged(on_backend: str, router: str) -> None:
    model, x = adapted(layer_of(router=router), *NAMES).eval(), torch.randn(7, D)
    with torch.no_grad():
        adapted_y = model(x)
        with model.disable_adapter():
            base_y = model(x)
        assert (adapted_y - base_y).abs().max() > 0.1
        model.merge_and_unload()  # the experts' adapters
        whole = model.merge_and_unload()  # the router's, which was inside
        torch.testing.assert_close(whole(x), adapted_y, rtol=1e-4, atol=1e-5)
    assert type(whole[1]) is sf.MoE
    assert type(whole[1].router).__name__ == {"sigmoid": "SigmoidRouter", "softmax_topk": "SoftmaxTopKRouter"}[router]


@pytest.mark.parametrize("name", NAMES)
def test_each_adapter_trains_and_the_layer_is_frozen(name: str) -> None:
    layer = layer_of()
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    model, x = adapted(layer, name), torch.randn(9, D)
    loss = model(x).square().sum() + sf.aux_loss(model)
    loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in n and g is not None and g.abs().max() > 0 for n, g in trained.items())

    # the gradient that reaches an adapter is that of the merged parameter, pulled through A·B
    wrapper = next(m for m in model.modules() if type(m).__name__ == "ParamWrapper")
    delta = wrapper.get_delta_weight("default").detach()
    plain = layer_of()
    plain.load_state_dict(before)
    with torch.no_grad():
        plain.get_parameter(name).add_(delta)
    h = model.base_model.model[0](x).detach()
    (plain(h).square().sum() + sf.aux_loss(plain)).backward()
    pulled = torch.autograd.grad(
        wrapper.get_delta_weight("default"), [p for n, p in model.named_parameters() if p.requires_grad],
        plain.get_parameter(name).grad,
    )  # fmt: skip
    for got, want in zip(trained.values(), pulled, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_the_balance_loss_and_statistics_are_found_inside() -> None:
    model = adapted(layer_of(), "keys", "values", "router.weight").train()
    model(torch.randn(9, D))
    assert sf.aux_loss(model) != 0
    assert len(sf.routing_stats(model)) == 1


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    model, x = adapted(layer_of(), *NAMES).eval(), torch.randn(7, D)
    y = model(x)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        plain = nn.Sequential(model.base_model.model[0], layer_of())  # the same seed: the same layer
        torch.testing.assert_close(plain(x), model(x))
    with inner_first(plain):
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert "named_modules" not in vars(plain)
    torch.testing.assert_close(loaded.eval()(x), y)


def test_ffns_with_lora_are_left_and_listed_by_conversion() -> None:
    ffn = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D))
    model = peft.get_peft_model(nn.Sequential(nn.LayerNorm(D), ffn), peft.LoraConfig(r=2, target_modules=["1.0"]))
    with pytest.warns(sf.SparseFFNWarning, match="no FFN was replaced"):
        report = sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4))
    assert not report.replacements
    assert "1.0 has no plain weight: it is a peft.tuners.lora.layer.Linear" in report.unknown["base_model.model.1"]
    assert sf.sparsify_(model.merge_and_unload(), sf.SigmaMoEConfig(n_experts=4)).names == ["1"]


def test_codes_are_no_parameters_to_adapt() -> None:
    layer = layer_of()
    sf.quantize_experts_(layer, sf.ExpertQuantization(bits=8))
    with pytest.raises((TypeError, ValueError)):
        adapted(layer, "keys")


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_parametrized_weights_are_what_every_path_computes_with(backend: str) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    x = torch.randn(7, D)
    for layer, names in (
        (layer_of(router="softmax"), ("keys", "values", "gate_keys")),
        (sf.TopKFFN(D, 12, 4), ("keys", "values")),
        (sf.DenseFFN(D, 12), ("keys", "values")),
        (sf.ProductKeyMemory(D, 4, 3), ("sub_keys", "values")),
    ):
        with sf.backend(backend), torch.no_grad():
            for name in names:
                nn.utils.parametrize.register_parametrization(layer, name, Double())
            parametrized = layer(x)
            for name in names:
                nn.utils.parametrize.remove_parametrizations(layer, name)
            torch.testing.assert_close(parametrized, layer(x))


@pytest.mark.parametrize("latent", [False, True])
def test_experts_within_another_layer_are_adapted_too(latent: bool) -> None:
    routed, path = (LatentMoE(D, 4, E, G, 2), "routed.moe") if latent else (sf.SigmaMoE(D, E, G, 2), "routed")
    layer, x = SharedExpertMoE(routed, sf.DenseFFN(D, 12)), torch.randn(7, D)
    expected = layer(x)
    names = [f"{path}.keys", f"{path}.values"]
    model = adapted(layer, *names)
    assert (model.base_model.model[1](x) - expected).abs().max() > 0.01
    assert layer.k == 2
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="x must have shape"):
        layer(x[:, :3])


@pytest.mark.parametrize("name", ["values.weight", "values.router.weight", "outputs.weight"])
def test_experts_of_attention_are_adapted_too(name: str) -> None:
    layer, x = SwitchHeadAttention(D, 2, E, 2), torch.randn(2, 5, D)
    expected = layer(x)
    model = adapted(layer, name)
    assert (model.base_model.model[1](x) - expected).abs().max() > 1e-3
    assert (layer.k, "k=2" in repr(layer), len(sf.routing_stats(model))) == (2, True, 2)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)


def test_layers_with_adapted_parts_have_their_sizes_and_reset_what_is_their_own() -> None:
    shared = SharedExpertMoE(layer_of(balance="bias"), sf.DenseFFN(D, 12, d_out=O), gated=True)
    attention = SwitchHeadAttention(D, 2, E, 2)
    sizes = (shared.d_ff, shared.active_fraction)
    model = nn.Sequential(nn.Linear(D, D), nn.ModuleList([shared, attention]))
    names = ["0.routed.keys", "0.routed.router.weight", "0.shared.keys", "1.values.weight", "1.outputs.router.weight"]
    config = {"target_parameters": [f"1.{name}" for name in names], "target_modules": ["1.0.gate", "1.1.query"]}
    with inner_first(model):
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **config))
    assert type(shared.routed).__name__ == type(attention.values).__name__ == "ParamWrapper"
    assert (shared.d_ff, shared.active_fraction) == sizes
    assert shared.flops_per_token() > 0
    own = [p for n, p in model.named_parameters() if "lora" not in n]
    with torch.no_grad():
        for p in own:
            p.fill_(torch.nan)
    shared.reset_parameters()
    attention.reset_parameters()
    shared.k = attention.k = 1
    assert all(p.isfinite().all() for n, p in model.named_parameters() if ".1." in n)
    sf.update_router_bias(model)


def test_stored_rows_beside_an_adapter_become_parameters_again() -> None:
    model = nn.Sequential(layer_of(), sf.MoE(O, E, G, 2))
    sf.quantize_experts_(model, sf.ExpertQuantization(bits=8), lambda _, name: name == "0")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=["1.values"], target_modules=[]))
    sf.dequantize_experts_(model)
    assert isinstance(model.base_model.model[0].keys, nn.Parameter)


CHANGES = {
    "quantize": lambda model: sf.quantize_experts_(model, sf.ExpertQuantization(bits=8)),
    "offload": lambda model: sf.offload_experts_(model, cache=E, device="cpu"),
    "compress": lambda model: sf.compress.compress_experts_(model, rank=1),
    "prune": lambda model: sf.prune_experts_(model, sf.expert_stats(model, [torch.randn(9, D)]), keep=2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_experts_with_an_adapter_are_not_changed(change: str) -> None:
    model, x = adapted(layer_of(), "keys", "values").eval(), torch.randn(7, D)
    before = model(x)
    with pytest.raises(ValueError, match=r"(keys|values) has an adapter of peft: call merge_and_unload"):
        CHANGES[change](model)
    assert torch.equal(model(x), before)
    whole = model.merge_and_unload()
    CHANGES[change](whole)
    assert whole(x).isfinite().all()
