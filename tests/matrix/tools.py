"""Parametrisation, pruning, quantisation: what replaces or computes parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import sparse_ffn as sf

from .feature import EVERY_BACKEND, feature
from .layers import MIXTURES, assert_near, build, step, tokens


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


def _owners(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parameter's module and its name in it."""
    return [
        (module, name)
        for module in layer.modules()
        for name in list(module._parameters)
        if module._parameters[name] is not None
    ]


@feature("`torch.nn.utils.parametrize`")
def parametrized(name: str) -> None:
    """All parameters at once: the same function, half the gradients at the originals, deep copies, removal."""
    layer, x = build(name), tokens(40)
    expected, owners = step(layer, x), _owners(layer)
    for module, key in owners:
        parametrize.register_parametrization(module, key, _Half())
    for twin in (layer, copy.deepcopy(layer)):
        found = step(twin, x)
        torch.testing.assert_close(found["output"], expected["output"])
        for key, _ in build(name).named_parameters():
            parent, _, leaf = key.rpartition(".")
            prefix = f"{parent}." if parent else ""
            torch.testing.assert_close(found[f"{prefix}parametrizations.{leaf}.original"], expected[key] / 2)
    for module, key in owners:
        parametrize.remove_parametrizations(module, key)
    assert_near(step(layer, x), expected)


@feature("`torch.nn.utils.prune`")
def pruned(name: str) -> None:
    """All parameters at once: the function of the pruned weights, gradients at the originals, removal."""
    layer, twin, x = build(name), build(name), tokens(40)
    for (module, key), (other, _) in zip(_owners(layer), _owners(twin), strict=True):
        prune.random_unstructured(module, key, amount=0.3)
        with torch.no_grad():
            getattr(other, key).mul_(1.5 * getattr(module, f"{key}_mask"))
            module._parameters[f"{key}_orig"].mul_(1.5)  # as an optimizer would, after the mask was made
    expected, found = step(twin, x), step(layer, x)
    torch.testing.assert_close(found["output"], expected["output"])
    for (module, key), (other, _) in zip(_pruned(layer), _owners(twin), strict=True):
        mask = getattr(module, f"{key}_mask")
        torch.testing.assert_close(module._parameters[f"{key}_orig"].grad, getattr(other, key).grad * mask)
        prune.remove(module, key)
    assert_near(step(layer, x), expected)


def _pruned(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, key.removesuffix("_orig")) for module, key in _owners(layer)]


@feature("torchao `quantize_`")
def quantized(name: str) -> None:
    """Int8 weights of `nn.Linear`s: a memory's query, latent projections, a shared expert's gate, attention's own."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # takes seconds

    model, x = nn.Sequential(nn.Linear(8, 8), build(name)).eval(), tokens(40)
    with torch.no_grad():
        expected = model(x)
        quantize_(model, Int8WeightOnlyConfig())
        changed = {key for key, p in model.named_parameters() if type(p.data) is not Tensor}
        own = {
            "ProductKeyMemory": {"1.query.weight"},
            "LatentMoE": {"1.down.weight", "1.up.weight"},
            "SharedExpertMoE": {"1.gate.weight"},
            "SwitchHeadAttention": {"1.query.weight", "1.key.weight"},
        }
        assert changed == {"0.weight"} | own.get(name, set())
        assert (model(x) - expected).norm() < 0.1 * expected.norm()


STACKS = tuple(name for name in MIXTURES if name != "LowRankMoE")


@feature("`quantize_experts_`", dict.fromkeys(EVERY_BACKEND, STACKS))
def experts_quantized(name: str) -> None:
    """Experts in 8 bits: the function of the rounded weights, gradients of all that stays a parameter; and back."""
    layer, x = build(name), tokens(40)
    expected = step(build(name), x)
    sf.quantize_experts_(layer, sf.ExpertQuantization(bits=8))
    found = step(layer, x)
    stored = expected.keys() - found.keys()
    stacks = {key for key in expected if key.rpartition(".")[2] in ("keys", "values", "gate_keys")}
    assert stored == {key for key in stacks if not key.startswith("shared.")}
    assert (found["output"] - expected["output"]).norm() < 0.05 * expected["output"].norm()
    sf.dequantize_experts_(layer)
    exact = step(layer, x)
    assert exact.keys() == expected.keys()
    assert_near(found, {key: t for key, t in exact.items() if key in found}, 1e-4)


FEATURES = (parametrized, pruned, quantized, experts_quantized)
