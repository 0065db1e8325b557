"""From the weights of a dense FFN and a config to a layer of this library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.checks import check_positive, check_tensor
from sparse_ffn.convert.config_base import Converted, FFNConfig
from sparse_ffn.convert.config_experts import ExpertsConfig
from sparse_ffn.convert.init.auto import choose
from sparse_ffn.convert.init.evaluating import evaluating
from sparse_ffn.convert.init.experts import copy_weights, fill, fill_base
from sparse_ffn.convert.init.partition import product_grid, product_keys
from sparse_ffn.convert.init.weights import PAD, FFNWeights, relative_error
from sparse_ffn.layers import DenseFFN, LowRankMoE, ProductKeyMemory

FOR_A_CHOICE = 1024  # tokens that a Trial looks at: a fit of a thousand ranks ways as one of four thousand does


@dataclass(frozen=True)
class Built:
    """A converted layer."""

    module: nn.Module
    """The layer, after a ``ConstantInput`` if the gate has a bias, and before a dropout if the FFN ends in one."""
    layer: Converted
    config: FFNConfig
    """Resolved: every size given."""
    note: str
    """What was done with the weights."""


class ConstantInput(nn.Module):
    """Appends a 1 and zeros to the last dimension: with it a column of keys is a bias, as a GLU's gate may need.

    Args:
        pad: width that is added.
    """

    def __init__(self, pad: int = PAD) -> None:
        super().__init__()
        self.pad = check_positive("pad", pad)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model + pad]."""
        check_tensor("x", x)
        if not x.dim():
            raise ValueError("x must have shape [..., d_model], got []")
        return F.pad(F.pad(x, (0, 1), value=1.0), (0, self.pad - 1))

    def extra_repr(self) -> str:
        """The width."""
        return f"pad={self.pad}"


@torch.no_grad()
def build(config: FFNConfig, ffn: FFNWeights, inputs: Tensor | None = None, out_dropout: float = 0.0) -> Built:
    """Make a layer that starts from a dense FFN, which sees inputs [T, d_model].

    Raises:
        ValueError: the config does not fit the FFN.
    """
    config = settle(config, ffn, inputs)
    before = nn.Sequential(*([] if ffn.gate_bias is None else [ConstantInput()]))
    after = nn.Sequential(*([nn.Dropout(out_dropout)] if out_dropout else []))
    if before:
        ffn, inputs = ffn.with_constant_input(), None if inputs is None else before(inputs)
    config = config.resolve(ffn)
    layer = config.make(ffn)
    if config.init == "fresh":
        note = "fresh weights"
    elif isinstance(config, ExpertsConfig):
        note = fill(layer, config, ffn, inputs)
    elif isinstance(layer, LowRankMoE):
        note = fill_base(layer, ffn)
    elif isinstance(layer, ProductKeyMemory):
        note = _memory(layer, ffn)
    else:
        assert isinstance(layer, DenseFFN)
        copy_weights(layer, ffn)
        note = f"weights kept: {'exact' if layer.k == ffn.d_ff else f'the {layer.k} largest of {ffn.d_ff} units'}"
    freeze(layer, ffn)
    note += "; a constant input carries the gate's bias" if before else ""
    return Built(nn.Sequential(*before, layer, *after) if before or after else layer, layer, config, note)


class Trial:
    """Layers that are made of a part of the calibration, to be judged on the rest of it: to choose between configs.

    Args:
        ffn: what becomes a layer.
        inputs: what it sees, [T, d_model]; a few of them are looked at.
    """

    def __init__(self, ffn: FFNWeights, inputs: Tensor) -> None:
        few = inputs[:: -(-len(inputs) // FOR_A_CHOICE)]
        held = torch.arange(len(few), device=few.device) % 4 == 3
        self.ffn = ffn
        self.fitted, self.judged = (few[~held], few[held]) if len(few) > 4 else (few, few)

    def build(self, config: ExpertsConfig) -> tuple[nn.Module, float]:
        """A layer without refitted values, and the relative error of its output."""
        new = build(replace(config, refit=False), self.ffn, self.fitted).module
        with evaluating(new):
            return new, relative_error(new(self.judged), self.ffn.output(self.judged))


def settle(config: FFNConfig, ffn: FFNWeights, inputs: Tensor | None) -> FFNConfig:
    """The config with what ``init="auto"`` stands for, if it has that."""
    if not isinstance(config, ExpertsConfig) or config.init != "auto":
        return config
    if inputs is None:
        return replace(config, init="split", cluster_by=None) if ffn.keys.is_meta else replace(config, init="cluster")
    trial = Trial(ffn, inputs)
    return choose(config, ffn, lambda tried: trial.build(tried)[1])


def _memory(layer: ProductKeyMemory, ffn: FFNWeights) -> str:
    """Lay the units out on the nearest grid of product keys; exact where their keys are products."""
    if ffn.gate_keys is not None:
        raise ValueError('init = "pkm" is for plain FFNs; this one is a GLU: take init="fresh"')
    if layer.n_heads != 1 or layer.query is not None or layer.query_norm is not None:
        raise ValueError('init = "pkm" needs n_heads = 1, query_dim = None and query_norm = None: take init="fresh"')
    if layer.experts or layer.gated:
        raise ValueError('init = "pkm" needs experts = False and gated = False: take init="fresh"')
    if layer.d_ff != ffn.d_ff:
        raise ValueError(f"n_sub_keys² = {layer.d_ff} must be d_ff = {ffn.d_ff}: each unit becomes a product key")
    if layer.values.is_meta:
        return "product keys"
    for name in ("key_bias", "out_bias"):
        if (bias := ffn.tensors().get(name)) is not None and bool(bias.any()):
            raise ValueError(f'init = "pkm" has nowhere to keep a non-zero {name}: take init="fresh"')
    grid_NN = product_grid(ffn.keys, layer.n_sub_keys)
    first, second = ffn.keys[grid_NN].chunk(2, dim=-1)
    layer.sub_keys[0, 0].copy_(first.mean(1))
    layer.sub_keys[1, 0].copy_(second.mean(0))
    layer.values.copy_(ffn.values[grid_NN.flatten()])
    error = relative_error(product_keys(layer.sub_keys)[0], ffn.keys[grid_NN.flatten()])
    n = layer.n_sub_keys
    return f"values kept; {n} x {n} product keys, relative error of the keys {error:.2%}"


def freeze(layer: Converted, ffn: FFNWeights) -> None:
    """Freeze what was frozen; a parameter without a counterpart trains if any other does."""
    if not ffn.trainable:
        return
    present = {name: ffn.trainable[name] for name in ffn.tensors() if name in ffn.trainable}
    some: Any = any(present.values())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(present.get(name.rpartition(".")[2], some))
