"""What a training loop calls with a whole model: its MoE layers' balance loss, statistics and bias update."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.backends.choice import SparseFFNWarning
from sparse_ffn.checks import check_finite, check_module
from sparse_ffn.layers.moe import MoE
from sparse_ffn.routing.distributed import all_reduce_sum
from sparse_ffn.routing.statistics import summary


def aux_loss(model: nn.Module) -> Tensor:
    """Sum of the weighted balance losses of the last training forward of all MoE layers: add it to the task's loss.

    A layer's loss counts until it can no longer be differentiated: a backward pass through it or through the layer's
    output, without ``retain_graph``, ends it, and so does ``eval()``. To log it, keep what this returned for the step.

    Args:
        model: any module; layers with ``aux="inject"`` add their gradient themselves and count 0 here.

    Returns:
        fp32 scalar with its graph; 0.0 if no layer has a loss (no MoE layer, no token, evaluation, after backward).

    Raises:
        TypeError: the model is no module.

    Warns:
        SparseFFNWarning: a layer trains but its forward ran without gradients (reentrant checkpoint), so that its loss
            cannot be differentiated.
    """
    check_module("model", model)
    kept = [(name, layer, layer._aux) for name, layer in _moe_layers(model)]
    losses = [(name, layer, loss) for name, layer, loss in kept if loss is not None]
    if not losses:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    for name, layer, loss in losses:
        trains = layer.training and layer.router.weight.requires_grad
        if torch.is_grad_enabled() and trains and not loss.requires_grad:
            warnings.warn(
                f"the balance loss of {name or 'the layer'} has no gradient: its forward ran without gradients, as "
                'under reentrant checkpointing. Use checkpoint(..., use_reentrant=False) or aux="inject".',
                SparseFFNWarning,
                stacklevel=2,
            )
    device = losses[0][2].device
    found = [loss.to(device, torch.float32) for _, _, loss in losses]
    return found[0].clone() if len(found) == 1 else torch.stack(found).sum()  # never a layer's own tensor


def routing_stats(model: nn.Module) -> dict[str, dict[str, Any]]:
    """How the last forward of each MoE layer spread its tokens; waits for the device.

    Args:
        model: any module; ``""`` names a root that is a layer itself.

    Returns:
        The statistics of each layer that has run, by module name. ``entropy`` is that of the load over log E (1 is
        balance), ``busiest`` the busiest expert's share of the slots, ``dead`` the share of experts without a slot,
        ``load`` the experts' shares, on the CPU, [E], summing to 1.

    Raises:
        TypeError: the model is no module.
    """
    check_module("model", model)
    return {
        name: summary(*layer._routed, layer.n_experts)
        for name, layer in _moe_layers(model)
        if layer._routed is not None
    }


@torch.no_grad()
def update_router_bias(model: nn.Module, rate: float = 1e-3) -> None:
    """Move each ``router.bias`` towards balance; call it once per optimizer step (``balance="bias"``, 2408.15664).

    Each expert's bias moves by ``rate · sign(mean load - load)``, where the load is counted over the training forwards
    since the last call; equal loads do not move.

    Args:
        model: any module.
        rate: step, on the scale of the logits.

    Raises:
        TypeError: the model is no module.
        ValueError: the rate is not finite and > 0.
        RuntimeError: a layer has ``sync_balance=True`` and torch.distributed is not initialised.
    """
    check_module("model", model)
    rate = check_finite("rate", rate, positive=True)
    for _, layer in _moe_layers(model):
        router = layer.router
        if router.bias is None or (router.load is None and not layer.sync_balance):
            continue
        load = torch.zeros_like(router.bias) if router.load is None else router.load.to(router.bias)
        router.load = None
        if layer.sync_balance:
            load = all_reduce_sum(load)
        router.bias.add_(torch.sign(load.mean() - load).to(router.bias), alpha=rate)


def _moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))
