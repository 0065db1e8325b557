"""Routing over time: loads of all forwards, what two models' routers agree on, and the routers' parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_module
from sparse_ffn.layers.balanced import Balanced, balanced_in, slots_of_all
from sparse_ffn.ops.library import in_backward, under_transforms
from sparse_ffn.routing.distributed import Sync, check_group, check_sync
from sparse_ffn.routing.statistics import slot_counts, summary
from sparse_ffn.running import in_evaluation, run_batch


class _Hook:
    """Counts for a meter; in a copy of the model for none."""

    def __init__(self, meter: RoutingMeter | None, name: str) -> None:
        self.meter, self.name = meter, name

    def __call__(self, layer: Balanced, args: Any, y: Any) -> None:
        if self.meter is not None:
            self.meter._count(self.name, layer)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self.name)


class RoutingMeter:
    """Counts where the tokens of a model's eager forwards go, as ``routing_stats`` does for the last one alone.

    Either a context (``with RoutingMeter(model) as meter``) or ``start()`` and ``stop()``. Counting stays on the device
    and does not wait for it; ``stats()`` does. A forward that checkpointing repeats counts once.

    Args:
        model: any module; MoE layers that it gets later are not counted.

    Raises:
        TypeError: the model is no module.
    """

    def __init__(self, model: nn.Module) -> None:
        check_module("model", model)
        self._layers = balanced_in(model)
        self._counts: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def start(self) -> RoutingMeter:
        """Count from zero."""
        self.stop()
        self._counts = {}
        self._handles = [layer.register_forward_hook(_Hook(self, name)) for name, layer in self._layers.items()]
        return self

    def stop(self) -> None:
        """Count no more; the counts stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def stats(self, *, sync: Sync = False) -> dict[str, dict[str, Any]]:
        """As ``routing_stats``, over all forwards since ``start()``, for each layer that has run.

        Args:
            sync: as ``routing_stats``'s.

        Raises:
            TypeError: ``sync`` is neither a bool nor a process group.
            RuntimeError: ``sync=True`` and torch.distributed is not initialised.
        """
        sync = check_sync("sync", sync)
        check_group("sync", sync)
        counts = slots_of_all(self._layers, self._counts, sync)
        return {name: summary(count, self._layers[name].null_experts) for name, count in counts.items()}

    def _count(self, name: str, layer: Balanced) -> None:
        if in_backward() or layer._routed is None:
            return
        if under_transforms():
            raise RuntimeError(
                "RoutingMeter counts as a side effect, which is lost inside torch.func's transforms: stop it there"
            )
        counts = slot_counts(*layer._routed, layer.n_experts + layer.null_experts)
        if name in self._counts and len(counts) != len(self._counts[name]):
            raise RuntimeError(f"layer {name!r} has other experts than when RoutingMeter began: start it anew")
        self._counts[name] = counts + self._counts[name].to(counts.device) if name in self._counts else counts

    def __enter__(self) -> RoutingMeter:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()


@torch.no_grad()
def routing_agreement(first: nn.Module, second: nn.Module, batch: Any) -> dict[str, float]:
    """Which share of its experts a token has in common in two models, or in two checkpoints of one.

    Of two routers that choose at random k of E experts it is k/E on average; in continual pre-training it says how far
    the routing has moved (arXiv 2503.05029). Both models run in evaluation mode; their modes are as before afterwards,
    and ``routing_stats`` is then of this batch.

    Args:
        first: a model.
        second: one whose MoE layers have the same names, numbers of experts and k.
        batch: a mapping (keyword arguments), a tuple or list (positional arguments), or one argument.

    Returns:
        For each MoE layer that ran, the mean over real tokens of the common experts' share of the k, in [0, 1]; NaN
        without any.

    Raises:
        TypeError: a model is no module.
        ValueError: the models' MoE layers do not correspond, there is none, or they saw other tokens.
    """
    chosen = []
    for name, model in (("first", first), ("second", second)):
        check_module(name, model)
        chosen.append(balanced_in(model))
    sizes = [{n: (m.n_experts, m.null_experts, m.k) for n, m in layers.items()} for layers in chosen]
    if not sizes[0] and not sizes[1]:
        raise ValueError("first and second have no MoE layer")
    if sizes[0] != sizes[1]:
        raise ValueError(f"first and second must have the same MoE layers, got {sizes[0]} and {sizes[1]} (E, N, k)")
    ours, theirs = (_experts_used(model, layers, batch) for model, layers in zip((first, second), chosen, strict=True))
    found = {}
    for name in (name for name in chosen[0] if name in ours or name in theirs):
        calls = [[len(experts) for experts, _ in used.get(name, ())] for used in (ours, theirs)]
        if calls[0] != calls[1]:
            raise ValueError(f"first and second must send the same tokens through {name!r}, which they did not")
        shares = [_common(*a, b) for a, (b, _) in zip(ours[name], theirs[name], strict=True)]
        found[name] = torch.cat(shares).mean().item()
    return found


def _common(ours: Tensor, real: Tensor | None, theirs: Tensor) -> Tensor:
    """Which share of its experts each real token has in common in two calls: bool [T, E] and [T] -> [T]."""
    most = torch.maximum(ours.sum(1), theirs.sum(1))  # k, but of routers that leave slots void
    common = torch.where(most > 0, (ours & theirs).sum(1) / most.double(), 1)
    return common if real is None else common[real]


def _experts_used(
    model: nn.Module, layers: dict[str, Balanced], batch: Any
) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """For each call of each layer the experts that each token uses, bool [T, E] on the CPU, and its mask."""
    used: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    def note(name: str, layer: Balanced, args: Any, y: Any) -> None:
        assert layer._routed is not None
        index_TK, mask_T = (None if t is None else t.cpu() for t in layer._routed)
        assert index_TK is not None
        every = index_TK.new_zeros(len(index_TK), layer.n_experts + layer.null_experts + 1, dtype=torch.bool)
        used.setdefault(name, []).append((every.scatter_(1, index_TK, True)[:, :-1], mask_T))

    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        with in_evaluation(model):
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not used:
        raise ValueError(
            "no MoE layer ran on the batch where it could be seen: of a model that torch.compile has compiled give the "
            "original"
        )
    return used


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all routers, each once: for a group of their own in the optimizer, such as one that re-warms.

    Raises:
        TypeError: the model is no module.
    """
    check_module("model", model)
    return list(dict.fromkeys(p for layer in balanced_in(model).values() for p in layer.router.parameters()))
