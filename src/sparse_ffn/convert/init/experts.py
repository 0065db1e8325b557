"""Mixtures out of a dense FFN: which units form an expert, what the router starts from, and what makes up for gates."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_ffn.convert.config_base import Converted
from sparse_ffn.convert.config_experts import ExpertsConfig
from sparse_ffn.convert.init.evaluating import evaluating
from sparse_ffn.convert.init.partition import balanced_kmeans
from sparse_ffn.convert.init.refit import refit
from sparse_ffn.convert.init.router import centre, fit_ranking, fit_router, mean_keys
from sparse_ffn.convert.init.weights import FFNWeights, wide
from sparse_ffn.layers import DenseFFN, LowRankMoE, MoE
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.routing.routers import UnweightedRouter


def copy_weights(layer: MoE | DenseFFN, ffn: FFNWeights) -> None:
    """Set the parameters of a layer to the FFN's tensors of the same names, in the layer's shapes."""
    for name, parameter in layer.named_parameters(recurse=False):
        value = ffn.tensors().get(name)
        parameter.copy_(torch.zeros_like(parameter) if value is None else value.reshape(parameter.shape))


def fill(layer: Converted, config: ExpertsConfig, ffn: FFNWeights, inputs: Tensor | None) -> str:
    """Give a mixture, beside a shared expert or not, the weights that a resolved config says; returns it in words."""
    moe = layer.routed if isinstance(layer, SharedExpertMoE) else layer
    assert isinstance(moe, MoE)
    if config.init == "upcycle":
        return _upcycle(moe, config, ffn)
    if moe.keys.is_meta and (config.init == "cluster" or config.router_init in ("fitted", "ranked")):
        raise ValueError('init = "cluster" and a router that is fitted need numbers; a model on meta has none')
    if inputs is None and config.cluster_by == "coactivation":
        raise ValueError('cluster_by = "coactivation" needs calibration: give inputs, see sparse_ffn.calibrate')
    if inputs is None and (config.router_init in ("fitted", "ranked") or config.refit):
        what = "refit = True" if config.refit else f'router_init = "{config.router_init}"'
        raise ValueError(f"{what} needs calibration: give inputs, see sparse_ffn.calibrate")
    if not isinstance(layer, SharedExpertMoE):
        return _deal(layer, moe, config, ffn, ffn, inputs)
    largest = sizes_of_units(ffn, inputs).argsort(descending=True, stable=True)
    first, rest = (units.sort().values for units in largest.tensor_split([layer.shared.d_ff]))
    copy_weights(layer.shared, ffn.map_units(lambda rows: rows[first]))
    others = replace(ffn.map_units(lambda rows: rows[rest]), out_bias=None)  # the shared expert has it
    return f"the {layer.shared.d_ff} largest units shared, {_deal(layer, moe, config, ffn, others, inputs)}"


def _deal(
    layer: Converted, moe: MoE, config: ExpertsConfig, whole: FFNWeights, ffn: FFNWeights, inputs: Tensor | None
) -> str:
    """Deal the hidden units out to experts, and give the router weights that rank these."""
    n, how = moe.n_experts, f"{moe.n_experts} experts of {moe.expert_size} units"
    if config.init == "split":
        units, how = torch.arange(ffn.d_ff, device="cpu"), f"{how} in their order"
    elif inputs is None or config.cluster_by == "keys":
        units, how = balanced_kmeans(ffn.deciding_keys, n), f"{how} clustered by keys"
    else:
        units, how = balanced_kmeans(coactivation(ffn, inputs), n), f"{how} clustered by coactivation"
    order = units.flatten().to(ffn.keys.device)
    ffn = ffn.map_units(lambda rows: rows[order])
    copy_weights(moe, ffn)
    if moe.keys.is_meta:
        return how
    return f"{how}; {_route(layer, moe, config, whole, ffn, inputs)}"


def _route(
    layer: Converted, moe: MoE, config: ExpertsConfig, whole: FFNWeights, ffn: FFNWeights, inputs: Tensor | None
) -> str:
    """Give the router its weights, and the values what makes up for the gates."""
    sample = None if config.router_init == "mean_keys" else inputs
    if sample is None:
        weight, note = mean_keys(ffn, moe.n_experts), "router from mean keys"
    elif config.router_init == "ranked" and moe.k < moe.n_experts:
        weight = fit_ranking(ffn, moe.n_experts, moe.k, sample)
        note = f"router fitted to the {moe.k} largest experts"
    else:
        weight, note = fit_router(ffn, moe.n_experts, sample), "router fitted to the experts' contributions"
    gate = gate_at_zero(moe)
    if gate != 1 and moe.k == moe.n_experts and sample is None:
        weight, note = torch.zeros_like(weight), "zero router"
    elif gate != 1:
        weight = centre(weight, inputs)
    moe.router.weight.copy_(weight)
    moe.values.div_(gate)
    note = note if gate == 1 else f"{note}, values times {1 / gate:g}"
    note += "" if sample is None else _correct(layer, moe, whole, sample)
    if config.refit and inputs is not None and moe.k < moe.n_experts:
        note += refit(layer, moe, whole, inputs)
    return note


def sizes_of_units(ffn: FFNWeights, inputs: Tensor | None) -> Tensor:
    """The mean of |h|·‖v‖ over the inputs, h a hidden unit and v its value; without inputs ‖key‖·‖v‖: [F]."""
    if inputs is None:
        sizes = wide(ffn.keys).norm(dim=1)
    else:
        sizes = wide(ffn.hidden(inputs.to(ffn.keys))).abs().mean(0)
    found: Tensor = sizes * wide(ffn.values).norm(dim=1)
    return found


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


def _correct(layer: Converted, moe: MoE, ffn: FFNWeights, inputs: Tensor) -> str:
    """Make the output right in the mean: values take back the mean gates, the output bias the unselected experts."""
    x = inputs.to(ffn.keys)
    done = ""
    if not isinstance(moe.router, UnweightedRouter):
        with evaluating(moe):
            routing = moe.router(x)
        index, gate = routing.index_TK.flatten(), routing.gate_TK.flatten()
        count = gate.new_zeros(moe.n_experts).index_add_(0, index, torch.ones_like(gate))
        mean = torch.zeros_like(count).index_add_(0, index, gate) / count.clamp_min(1)
        mean = torch.where(count > 0, mean, mean[count > 0].mean())
        moe.values.mul_((gate_at_zero(moe) / mean).view(-1, 1, 1).to(moe.values.dtype))
        done += ", rescaled by mean gates"
    if moe.out_bias is not None:
        with evaluating(layer):
            y = layer(x)
        moe.out_bias.add_((wide(ffn.output(x)) - wide(y)).mean(0).to(moe.out_bias.dtype))
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


def fill_base(layer: LowRankMoE, ffn: FFNWeights) -> str:
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
