"""What a training loop calls with a whole model: its MoE layers' balance loss, statistics and bias update."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.backends.choice import SparseFFNWarning
from sparse_ffn.checks import check_finite, check_module
from sparse_ffn.layers.balanced import Balanced
from sparse_ffn.routing.distributed import Sync, all_reduce_sum, check_group, check_sync, running
from sparse_ffn.routing.statistics import slot_counts, summary


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
    kept = [(name, layer, layer._aux) for name, layer in _routed_layers(model)]
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


def routing_stats(model: nn.Module, *, sync: Sync = False) -> dict[str, dict[str, Any]]:
    """How the last forward of each MoE layer spread its tokens; waits for the device.

    Args:
        model: any module; ``""`` names a root that is a layer itself.
        sync: count the tokens of all processes of a group, True for the default one; all of them must call it.

    Returns:
        The statistics of each layer that has run, by module name. ``entropy`` is that of the load over log E (1 is
        balance), ``busiest`` the busiest expert's share of the slots, ``dead`` the share of experts without a slot,
        ``load`` the experts' shares, on the CPU, [E], summing to 1. Null experts have no part in these; a layer that
        has some says with ``null`` what share of all slots went to them.

    Raises:
        TypeError: the model is no module, or ``sync`` neither a bool nor a process group.
        RuntimeError: ``sync=True`` and torch.distributed is not initialised.
    """
    check_module("model", model)
    sync = check_sync("sync", sync)
    check_group("sync", sync)
    layers = {name: layer for name, layer in _routed_layers(model) if layer._routed is not None}
    counts = [
        slot_counts(*layer._routed, layer.n_experts + layer.null_experts)
        for layer in layers.values()
        if layer._routed is not None
    ]
    if sync is not False:
        counts = _summed(counts, sync)
    pairs = zip(layers.items(), counts, strict=True)
    return {name: summary(count, layer.null_experts) for (name, layer), count in pairs}


@torch.no_grad()
def update_router_bias(model: nn.Module, rate: float = 1e-3) -> None:
    """Move each ``router.bias`` towards balance; call it once per optimizer step (``balance="bias"``, 2408.15664).

    Each expert's bias moves by ``rate · sign(mean load - load)``, where the load is counted over the training forwards
    since the last call; equal loads do not move. Beside null experts the mean is what their wished share leaves to the
    others, and their own biases stay (2509.01322). The loads of layers with one ``sync_balance`` are pooled in one
    collective, which all processes of the group must join.

    Args:
        model: any module.
        rate: step, on the scale of the logits.

    Raises:
        TypeError: the model is no module.
        ValueError: the rate is not finite and > 0.
        RuntimeError: a layer has ``sync_balance=True`` and torch.distributed is not initialised; or it has
            ``sync_balance=False`` among several processes, whose biases would drift apart unseen.
    """
    check_module("model", model)
    rate = check_finite("rate", rate, positive=True)
    layers = [(name, layer) for name, layer in _routed_layers(model) if layer.router.bias is not None]
    for name, layer in layers:
        check_group("sync_balance", layer.sync_balance)
        if layer.sync_balance is False and running() and torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                f'{name or "the layer"} has balance="bias" and sync_balance=False among '
                f"{torch.distributed.get_world_size()} processes, whose biases would drift apart: set sync_balance to "
                "True, or to the group of the processes that train this layer (of one process to keep them apart)"
            )
    pooled: dict[tuple[Sync, torch.device], list[Balanced]] = defaultdict(list)
    for _, layer in layers:
        assert layer.router.bias is not None
        if layer.router.load is not None or layer.sync_balance is not False:
            pooled[layer.sync_balance, layer.router.bias.device].append(layer)
    for (sync, device), members in pooled.items():
        loads = [_load(layer, device) for layer in members]
        for layer, load in zip(members, loads if sync is False else _summed(loads, sync), strict=True):
            _move(layer, load, rate)
            layer.router.load = None


def _move(layer: Balanced, load: Tensor, rate: float) -> None:
    bias: Any = layer.router.bias
    load, null = load.to(bias.dtype), layer._null
    own = slice(None) if null is None else slice(-null.experts)
    wished = load.mean() if null is None else (1 - null.share) * load.sum() / layer.n_experts
    bias[own].add_(torch.sign(wished - load[own]), alpha=rate)


def _load(layer: Balanced, device: torch.device) -> Tensor:
    load, every = layer.router.load, layer.n_experts + layer.null_experts
    return torch.zeros(every, dtype=torch.int64, device=device) if load is None else load.to(device)


def _summed(counts: list[Tensor], sync: Sync) -> list[Tensor]:
    """The counts summed over a group's processes, in one collective."""
    if not counts:
        return []
    return list(torch.split(all_reduce_sum(torch.cat(counts), sync), [len(count) for count in counts]))


def _routed_layers(model: nn.Module) -> Iterator[tuple[str, Balanced]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Balanced))
