"""What a training loop calls with a whole model: its MoE layers' balance loss, statistics and bias update."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.checks import called, check_finite, check_module
from sparse_ffn.layers.balanced import balanced_in, slots_of_all
from sparse_ffn.ops.library import under_transforms
from sparse_ffn.routing.base import Router
from sparse_ffn.routing.distributed import Sync, check_group, check_sync, running, summed
from sparse_ffn.routing.statistics import slot_counts, summary
from sparse_ffn.routing.targets import Targets


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
    kept = [(name, layer, layer._aux) for name, layer in balanced_in(model).items()]
    losses = [(name, layer, loss) for name, layer, loss in kept if loss is not None]
    if not losses:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    for name, layer, loss in losses:
        trains = layer.training and any(p.requires_grad for p in layer.router.parameters())
        if torch.is_grad_enabled() and trains and not loss.requires_grad and not under_transforms():
            warnings.warn(
                f"the balance loss of {called(name)} has no gradient: its forward ran without gradients, as "
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
        The statistics of each layer that has run (with ``sync`` in any of the processes), by module name. ``entropy``
        is that of the load over log E (1 is balance), ``busiest`` the busiest expert's share of the slots, ``dead`` the
        share of experts without a slot, ``load`` the experts' shares, on the CPU, [E], summing to 1. Null experts have
        no part in these; a layer that has some says with ``null`` what share of all slots went to them. Without a slot
        (padding alone) all are 0.

    Raises:
        TypeError: the model is no module, or ``sync`` neither a bool nor a process group.
        RuntimeError: ``sync=True`` and torch.distributed is not initialised.
    """
    check_module("model", model)
    sync = check_sync("sync", sync)
    check_group("sync", sync)
    layers = balanced_in(model)
    counts = {
        name: slot_counts(*routed, layer.n_experts + layer.null_experts)
        for name, layer in layers.items()
        if (routed := layer._routed) is not None
    }
    return {name: summary(c, layers[name].null_experts) for name, c in slots_of_all(layers, counts, sync).items()}


@torch.no_grad()
def update_router_bias(model: nn.Module, rate: float = 1e-3) -> None:
    """Move what balances without a gradient; call it once per optimizer step (``balance="bias"`` and ``"l1"``).

    With ``"bias"`` (2408.15664) each expert's ``router.bias`` moves by ``rate · sign(mean load - load)``, where the
    load is counted over the training forwards since the last call; equal loads do not move. Beside null experts, or
    with experts of unequal size, the mean is replaced by what is wished; the biases of null experts stay (2509.01322).
    With ``"l1"`` the weight of the loss, ``router.l1``, is multiplied or divided by 1.2 towards the wished number of
    experts a token (2412.14711), whatever the rate. A router that layers share moves once, by the load of all of them.
    The loads of layers with one ``sync_balance`` are pooled in one collective, which all processes of the group must
    join.

    Args:
        model: any module.
        rate: step, on the scale of the logits.

    Raises:
        TypeError: the model is no module, or the rate no number.
        ValueError: the rate is not finite and > 0; or layers that share a router differ in ``sync_balance`` or in the
            loads that they wish.
        RuntimeError: a layer has ``sync_balance=True`` and torch.distributed is not initialised; or it has
            ``sync_balance=False`` among several processes, whose biases would drift apart unseen.
    """
    check_module("model", model)
    rate = check_finite("rate", rate, positive=True)
    wishes: dict[Router, tuple[Sync, Targets | None]] = {}  # by router: layers may share one
    for name, layer in balanced_in(model).items():
        if not layer._adapts:
            continue
        check_group("sync_balance", layer.sync_balance)
        if layer.sync_balance is False and running() and torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                f'{called(name)} has balance="{layer._adapts}" and sync_balance=False among '
                f"{torch.distributed.get_world_size()} processes, whose biases would drift apart: set sync_balance to "
                "True, or to the group of the processes that train this layer (of one process to keep them apart)"
            )
        wish = (layer.sync_balance, layer._targets)
        if wishes.setdefault(layer._own_router(), wish) != wish:
            raise ValueError(
                f"{called(name)} shares its router with a layer of another sync_balance, or one that wishes "
                "other loads (null_share, balance_cost): a router takes one step for all its layers"
            )
    pooled: dict[tuple[Sync, torch.device], list[Router]] = defaultdict(list)
    for router, (sync, _) in wishes.items():
        if router.adapted is not None:
            pooled[sync, router.adapted.device].append(router)
    for (sync, device), routers in pooled.items():
        loads = [_load(router, device) for router in routers]
        for router, load in zip(routers, loads if sync is False else summed(loads, sync), strict=True):
            router.adapt(load, rate, wishes[router][1])
            router.load.zero_()


def _load(router: Router, device: torch.device) -> Tensor:
    load = router.load
    return torch.zeros_like(load, device=device) if load.is_meta else load.to(device)  # of meta: nothing has run since
