"""From the weights of a dense FFN and a config to a layer of this library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.checks import check_positive, check_tensor
from sparse_ffn.convert.config import ExpertsConfig, FFNConfig
from sparse_ffn.convert.init.partition import balanced_kmeans, product_grid, product_keys
from sparse_ffn.convert.init.router import centre, fit_router, mean_keys
from sparse_ffn.convert.init.weights import PAD, FFNWeights, relative_error, wide
from sparse_ffn.layers import LowRankMoE, MoE, ProductKeyMemory, SparseFFN
from sparse_ffn.layers.balanced import Balanced
from sparse_ffn.routing.routers import UnweightedRouter


@dataclass(frozen=True)
class Built:
    """A converted layer."""

    module: nn.Module
    """The layer, after a ``ConstantInput`` if the gate has a bias, and before a dropout if the FFN ends in one."""
    layer: SparseFFN
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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a new module, which keeps nothing of what runs in it."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        for inner in module.train(training).modules():
            if isinstance(inner, Balanced):
                inner._last = None


@torch.no_grad()
def build(config: FFNConfig, ffn: FFNWeights, inputs: Tensor | None = None, out_dropout: float = 0.0) -> Built:
    """Make a layer that starts from a dense FFN, which sees inputs [T, d_model].

    Raises:
        ValueError: the config does not fit the FFN.
    """
    before = nn.Sequential(*([] if ffn.gate_bias is None else [ConstantInput()]))
    after = nn.Sequential(*([nn.Dropout(out_dropout)] if out_dropout else []))
    if before:
        ffn, inputs = ffn.with_constant_input(), None if inputs is None else before(inputs)
    config = config.resolve(ffn)
    place: dict[str, Any] = {"device": ffn.keys.device, "dtype": ffn.keys.dtype}
    layer = config.layer(d_model=ffn.d_model, d_out=ffn.d_out, **config.arguments(), **place)
    if config.init == "fresh":
        note = "fresh weights"
    elif isinstance(config, ExpertsConfig):
        assert isinstance(layer, MoE)
        note = _upcycle(layer, config, ffn) if config.init == "upcycle" else _experts(layer, config, ffn, inputs)
    elif isinstance(layer, LowRankMoE):
        note = _base(layer, ffn)
    elif isinstance(layer, ProductKeyMemory):
        note = _memory(layer, ffn)
    else:
        copy_weights(layer, ffn)
        note = f"weights kept: {'exact' if layer.k == ffn.d_ff else f'the {layer.k} largest of {ffn.d_ff} units'}"
    freeze(layer, ffn)
    note += "; a constant input carries the gate's bias" if before else ""
    return Built(nn.Sequential(*before, layer, *after) if before or after else layer, layer, config, note)


def copy_weights(layer: SparseFFN, ffn: FFNWeights) -> None:
    """Set the parameters of a layer to the FFN's tensors of the same names, in the layer's shapes."""
    for name, parameter in layer.named_parameters(recurse=False):
        value = ffn.tensors().get(name)
        parameter.copy_(torch.zeros_like(parameter) if value is None else value.reshape(parameter.shape))


def _experts(layer: MoE, config: ExpertsConfig, ffn: FFNWeights, inputs: Tensor | None) -> str:
    """Deal the hidden units out to experts, and give the router weights that rank these."""
    if layer.keys.is_meta and (config.init == "cluster" or config.router_init == "fitted"):
        raise ValueError('init = "cluster" and router_init = "fitted" need numbers; a model on meta has none')
    if inputs is None and config.cluster_by == "coactivation":
        raise ValueError('cluster_by = "coactivation" needs calibration: give inputs, see sparse_ffn.calibrate')
    n, how = layer.n_experts, f"{layer.n_experts} experts of {layer.expert_size} units"
    if config.init == "split":
        units, how = torch.arange(ffn.d_ff, device="cpu"), f"{how} in their order"
    elif inputs is None or config.cluster_by == "keys":
        units, how = balanced_kmeans(ffn.deciding_keys, n), f"{how} clustered by keys"
    else:
        units, how = balanced_kmeans(coactivation(ffn, inputs), n), f"{how} clustered by coactivation"
    order = units.flatten().to(ffn.keys.device)
    ffn = ffn.map_units(lambda rows: rows[order])
    copy_weights(layer, ffn)
    return how if layer.keys.is_meta else f"{how}; {_route(layer, config, ffn, inputs)}"


def _route(layer: MoE, config: ExpertsConfig, ffn: FFNWeights, inputs: Tensor | None) -> str:
    """Give the router its weights, and the values what makes up for the gates."""
    if inputs is None and config.router_init == "fitted":
        raise ValueError('router_init = "fitted" needs calibration: give inputs, see sparse_ffn.calibrate')
    sample = None if config.router_init == "mean_keys" else inputs
    if sample is None:
        weight, note = mean_keys(ffn, layer.n_experts), "router from mean keys"
    else:
        weight, note = fit_router(ffn, layer.n_experts, sample), "router fitted to the experts' contributions"
    gate = gate_at_zero(layer)
    if gate != 1 and layer.k == layer.n_experts and sample is None:
        weight, note = torch.zeros_like(weight), "zero router"
    elif gate != 1:
        weight = centre(weight, inputs)
    layer.router.weight.copy_(weight)
    layer.values.div_(gate)
    if gate != 1:
        note += f", values times {1 / gate:g}"
    return note if sample is None else note + _correct(layer, ffn, sample)


def coactivation(ffn: FFNWeights, inputs: Tensor, n_tokens: int = 2048) -> Tensor:
    """How strongly each unit adds to the output on each token: [F, tokens].

    A plain unit counts where it is on: the small negative values of GELU and SiLU tie no units together.
    """
    h = wide(ffn.hidden(inputs[:n_tokens].to(ffn.keys)))
    h = torch.relu(h) if ffn.gate_keys is None else h.abs()
    sizes: Tensor = h * wide(ffn.values).norm(dim=1)
    return sizes.t()


def gate_at_zero(layer: MoE | LowRankMoE) -> float:
    """The weight of a selected expert where all logits are zero."""
    index_TK = torch.arange(layer.k, device="cpu").unsqueeze(0)
    logits_TE = wide(torch.zeros(1, layer.n_experts, dtype=layer.values.dtype, device="cpu"))
    gate = layer.router.gate(logits_TE, index_TK, None)[0, 0].item()
    if not gate:
        raise ValueError(
            f"router = {type(layer.router).__name__} weighs an expert of logit 0 with 0, so that no layer with it is "
            'near a dense FFN: take another router or init="fresh"'
        )
    return gate


def _correct(layer: MoE, ffn: FFNWeights, inputs: Tensor) -> str:
    """Make the output right in the mean: values take back the mean gates, the output bias the unselected experts."""
    x = inputs.to(ffn.keys)
    done = ""
    with evaluating(layer):
        routing = layer.router(x)
    index, gate = routing.index_TK.flatten(), routing.gate_TK.flatten()
    count = gate.new_zeros(layer.n_experts).index_add_(0, index, torch.ones_like(gate))
    mean = torch.zeros_like(count).index_add_(0, index, gate) / count.clamp_min(1)
    mean = torch.where(count > 0, mean, mean[count > 0].mean())
    if not isinstance(layer.router, UnweightedRouter):
        layer.values.mul_((gate_at_zero(layer) / mean).view(-1, 1, 1).to(layer.values.dtype))
        done += ", rescaled by mean gates"
    if layer.out_bias is not None:
        with evaluating(layer):
            y = layer(x)
        layer.out_bias.add_((wide(ffn.output(x)) - wide(y)).mean(0).to(layer.out_bias.dtype))
        done += ", output bias corrected"
    return done


def _upcycle(layer: MoE, config: ExpertsConfig, ffn: FFNWeights) -> str:
    """Make each expert a copy; the values are divided by what the k gates sum to where the router is undecided."""
    n, n_drawn = layer.n_experts, round(config.reinit * ffn.d_ff)
    copy_weights(layer, ffn.map_units(lambda rows: rows.expand(n, *rows.shape)))
    if n_drawn:
        _draw_anew(layer, ffn, n_drawn)
    total = layer.k * gate_at_zero(layer)
    layer.values.div_(total)
    drawn = f", {n_drawn} of {ffn.d_ff} units of each drawn anew" if n_drawn else ""
    return f"{n} copies{drawn}, fresh router, values times {1 / total:g}"


def _base(layer: LowRankMoE, ffn: FFNWeights) -> str:
    """Make the FFN what all experts share; what is theirs alone adds nothing yet."""
    given = ffn.tensors()
    for name in ("keys", "gate_keys", "key_bias", "values", "out_bias"):
        if (own := getattr(layer, name)) is not None:
            own.copy_(given[name] if name in given else torch.zeros_like(own))
    total = layer.k * gate_at_zero(layer)
    layer.values.div_(total)
    return f"the base of {layer.n_experts} experts of rank {layer.rank}, fresh router, values times {1 / total:g}"


def _draw_anew(layer: MoE, ffn: FFNWeights, n_drawn: int) -> None:
    """Give so many units of each expert, chosen by chance, rows from normals with the FFN's own mean and deviation."""
    rank_EF = torch.rand(layer.n_experts, ffn.d_ff, device=layer.values.device).argsort(1).argsort(1)
    chosen_EF1 = (rank_EF < n_drawn).unsqueeze(2)
    rows = {"keys": ffn.keys, "gate_keys": ffn.gate_keys, "values": ffn.values}
    for name, own in rows.items():
        if own is not None:
            parameter, own = getattr(layer, name), wide(own)
            drawn = torch.randn_like(parameter) * own.std(correction=0) + own.mean()
            parameter.copy_(torch.where(chosen_EF1, drawn.to(parameter.dtype), parameter))


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


def freeze(layer: SparseFFN, ffn: FFNWeights) -> None:
    """Freeze what was frozen; a parameter without a counterpart trains if any other does."""
    if not ffn.trainable:
        return
    present = {name: ffn.trainable[name] for name in ffn.tensors() if name in ffn.trainable}
    some: Any = any(present.values())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(present.get(name, some))
