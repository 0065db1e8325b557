"""quantization_error: which experts of a layer lose most by fewer bits."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from sparse_ffn.checks import check_floating, check_type
from sparse_ffn.compress.config import ExpertQuantization
from sparse_ffn.compress.quantize import quantize_experts_
from sparse_ffn.compress.statistics import Experts, apply, measure, route
from sparse_ffn.layers.moe import MoE
from sparse_ffn.running import in_evaluation


@torch.no_grad()
def quantization_error(layer: MoE, config: ExpertQuantization | None, inputs: Tensor) -> Tensor:
    """What each expert's rounding adds to the squared error of the output (QuantMoE-Bench, arXiv 2406.08155).

    Cross terms aside: Σ g²·‖f_e(x) - f̂_e(x)‖² over the tokens x that are routed to e, f̂ the quantised expert. It says
    where bits are spent well: compare configs, stacks (``values_bits``) and layers. The layer stays as it is, but for a
    balance loss that waits for its backward pass, and ``routing_stats``.

    Args:
        layer: a layer whose router sees what its experts see.
        config: as ``quantize_experts_``'s.
        inputs: what the layer sees, [..., d_model]; ``calibrate`` collects it.

    Returns:
        fp64 on the CPU, [E].

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: no token, or as ``quantize_experts_``.
    """
    check_type("layer", layer, MoE, "a sparse_ffn.MoE")
    check_floating("inputs", inputs)
    if inputs.dim() == 0 or inputs.shape[-1] != layer.d_model or not inputs.numel():
        raise ValueError(f"inputs must be [..., d_model = {layer.d_model}] with a token, got {list(inputs.shape)}")
    small = copy.deepcopy(layer)
    quantize_experts_(small, config)

    def lost(x_SD: Tensor, expert_S: Tensor) -> Tensor:
        return apply(layer, x_SD, expert_S) - apply(small, x_SD, expert_S)

    with in_evaluation(layer), in_evaluation(small):
        stats = measure(Experts(layer, partial(route, layer), lost), (inputs,), {}, None, False)
    assert stats is not None, "there is a token"
    return stats.energy
