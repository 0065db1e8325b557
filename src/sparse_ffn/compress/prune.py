"""Pruning: experts that add little to their layer's output go, or a constant stands in their place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_ffn.checks import (
    called,
    check_changeable,
    check_choice,
    check_loaded,
    check_positive,
    check_type,
    check_unadapted,
    plain,
    shown,
)
from sparse_ffn.compress.keep import SCORES, Score, best_of_all, best_of_each, check_kept, n_groups_of, score_of
from sparse_ffn.compress.report import PrunedLayer, PruningReport
from sparse_ffn.compress.statistics import Experts, ExpertStats
from sparse_ffn.layers.moe import MoE
from sparse_ffn.ops import Units
from sparse_ffn.routing.base import Router
from sparse_ffn.routing.relu import ReLURouter


@torch.inference_mode(False)  # a tensor that is made in it never trains
@torch.no_grad()
def prune_experts_(
    model: nn.Module,
    stats: Mapping[str, ExpertStats],
    keep: float,
    *,
    by: str | Score = "error",
    replace: str | None = None,
    scope: str = "layer",
    protect: Iterable[str] | Mapping[str, Iterable[int]] | None = None,
) -> PruningReport:
    """Remove the experts that matter least from a model's MoE layers, in place, or put constants in their place.

    The kept experts stay in their order, with their rows of the router. Optimizers hold the old parameters: prune
    first. Loads that bias balancing has counted are forgotten.

    Args:
        model: its ``MoE`` layers are pruned.
        stats: what ``expert_stats`` said of them.
        keep: the share of experts to keep, a float in (0, 1], to the nearest number; or that number, an int. k at least
            have to stay in each layer.
        by: what an expert is worth. ``"error"``: the squared error that its removal adds to the output, cross terms
            aside: ``energy``, or ``residual`` where a constant replaces it; ``"reap"``: the mean of g‖f‖ over its
            tokens (arXiv 2510.13999); ``"contribution"``: the sum; ``"frequency"``: how many tokens it gets; or a
            function of ``ExpertStats`` that gives [E] numbers.
        replace: None: its tokens go to their next best expert. ``"mean"``: it becomes a null expert of the kind
            ``"constant"``, with the constant that replaces it best, ``stats.mean``, and keeps its row of the router, so
            that no token goes elsewhere (MoNE, arXiv 2507.00390).
        scope: ``"layer"`` keeps the same share or number in each layer, ``"model"`` the best of all layers' experts
            together, by ``by`` as it is; ``keep`` is then of the whole model, protected layers included.
        protect: names of layers that stay as they are; or for names of layers the experts that stay.

    Returns:
        What was kept in each layer, with the predicted error; prints as a table.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a layer has no statistics or those of another one, would keep fewer experts than k, is parametrised,
            adapted by peft, quantised, on meta, wrapped or tied to something else; the names are listed. Nothing was
            changed then.
    """
    check_changeable("model", model)
    check_type("stats", stats, Mapping, "what expert_stats returned, a dict by the layers' names")
    keep = _check_keep(keep)
    if not callable(by):
        check_choice("by", by, ("error", *SCORES))
    if replace is not None:
        check_choice("replace", replace, ("mean",))
    check_choice("scope", scope, ("layer", "model"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers:
        raise ValueError("the model has no MoE layer: only the experts of MoE and its named forms can be pruned")
    protected = _check_protect(protect, layers)
    pruned = {name: layer for name, layer in layers.items() if len(protected[name]) < layer.n_experts}
    _check_stats(model, stats, pruned)
    check_unadapted(model, [(layer, layer._parameters) for layer in pruned.values()])
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    holders = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name, layer in pruned.items():
        _check_prunable(name, layer, uses, replace)
        if holders[id(layer.router)] > 1:
            raise ValueError(f"the router of {called(name)} is another module's too, which would not be pruned")
        for stack, (tensor, _) in layer._tensors().items():
            if tensor is not None:
                check_loaded(model, f"{name}.{stack}" if name else stack, tensor)
    lost = {name: stats[name].energy if replace is None else stats[name].residual for name in pruned}
    scores = {name: lost[name].clone() if by == "error" else score_of(by, name, stats[name]) for name in pruned}
    for name, score in scores.items():
        score[sorted(protected[name])] = math.inf
    kept = best_of_each(pruned, scores, keep) if scope == "layer" else best_of_all(layers, scores, keep)
    for name, experts in kept.items():
        check_kept(name, pruned[name], experts, protected[name])
    before, done = _size(model), []
    for name, experts in kept.items():
        layer, removed = pruned[name], sorted({*range(pruned[name].n_experts)} - {*experts})
        constants = stats[name].mean[removed] if replace == "mean" else None
        error = _relative(lost[name][removed], stats[name].energy)
        n_constants = 0 if constants is None else len(removed)
        done.append(PrunedLayer(name, layer.n_experts, tuple(experts), n_constants, error))
        if removed:
            _cut(layer, experts, removed, constants)
    return PruningReport(tuple(done), (before, _size(model)))


def _check_keep(keep: float) -> float:
    keep = plain(keep)
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be a share in (0, 1] or a number of experts, an int, got {keep}")
        return keep
    return check_positive("keep", keep)


def _check_protect(
    protect: Iterable[str] | Mapping[str, Iterable[int]] | None, layers: Mapping[str, MoE]
) -> dict[str, set[int]]:
    """For each layer the experts that stay."""
    found: dict[str, set[int]] = {name: set() for name in layers}
    if protect is None:
        return found
    if isinstance(protect, str) or not isinstance(protect, Iterable):
        raise TypeError(f"protect must be names of layers, or a dict of their experts, got {shown(protect)}")
    for name, of in protect.items() if isinstance(protect, Mapping) else ((name, None) for name in protect):
        check_type("a name in protect", name, str, "a string")
        if name not in layers:
            raise ValueError(f"protect names {shown(name)}, which is none of the MoE layers {', '.join(layers)}")
        all_of = range(layers[name].n_experts)
        check_type(f"protect[{name!r}]", all_of if of is None else of, Iterable, "numbers of experts")
        found[name] = set(all_of if of is None else map(plain, of))
        if not all(type(e) is int and e in all_of for e in found[name]):
            raise ValueError(f"protect[{name!r}] must be numbers of experts in [0, {len(all_of)}), got {shown(of)}")
    return found


def _check_stats(model: nn.Module, stats: Mapping[str, ExpertStats], pruned: Mapping[str, MoE]) -> None:
    modules = dict(model.named_modules())
    for name, of in stats.items():
        check_type(f"stats[{name!r}]", of, ExpertStats, "an ExpertStats")
        module = modules.get(name)
        if isinstance(module, MoE):
            shape = (module.n_experts, module.d_out)
            if of.moment.shape != shape:
                raise ValueError(
                    f"stats[{name!r}] are of {list(of.moment.shape)} [experts, d_out], the layer has {list(shape)}"
                )
        elif module is not None and Experts.of(module) is not None:
            raise ValueError(f"{name} is a {type(module).__name__}: only MoE layers are pruned. For a block of "
                             "transformers see sparse_ffn.integrations.from_transformers")  # fmt: skip
        else:
            raise ValueError(f"stats has {shown(name)}, which is no MoE layer of the model: these are another model's")
    if missing := [name for name in pruned if name not in stats]:
        places = ", ".join(name or "the layer" for name in missing)
        raise ValueError(
            f"stats, a dict of {len(stats)} layers, lacks {places}: give expert_stats other batches, or protect"
        )


def _check_prunable(name: str, layer: MoE, uses: Mapping[int, int], replace: str | None) -> None:
    """Raise unless all that would be cut is the layer's own and plain, and can have what comes in its place."""
    place = called(name)
    if n_groups_of(layer) > 1 and (replace or layer.null_experts):
        raise ValueError(f"the router of {place} has n_groups > 1, where a null expert would not fit")
    if replace and layer.null_experts and layer.null_kind != "constant":
        raise ValueError(
            f"replace = {replace!r} makes constants, but {place} has null experts of the kind {layer.null_kind!r}"
        )
    if not isinstance(layer.router, Router):
        raise ValueError(f"the router of {place} is a {type(layer.router).__name__}: prune before it is wrapped")
    for stack, tensor in layer._tensors().items():
        if tensor[0] is None:
            continue
        owner, _, attribute = stack.rpartition(".")
        module = layer.router if owner else layer
        given = {**module._parameters, **module._buffers}.get(attribute)
        if type(given) not in (nn.Parameter, Tensor) or is_traceable_wrapper_subclass(given):
            raise ValueError(
                f"{stack} of {place} is no plain parameter: prune before it is parametrised, quantised or sharded"
            )
        if uses[id(given)] > 1:
            raise ValueError(f"{stack} of {place} is tied to another module's parameter, which would not be pruned")


def _relative(lost: Tensor, energy: Tensor) -> float:
    whole = float(energy.sum())
    return math.sqrt(float(lost.sum()) / whole) if whole else 0.0


def _cut(layer: MoE, kept: list[int], removed: list[int], constants: Tensor | None) -> None:
    """Leave the kept experts; with constants [removed, O] the others become the last null experts."""
    scored = [*kept, *range(layer.n_experts, layer.n_experts + layer.null_experts)]
    if constants is not None:
        scored += removed
    for name in Units._fields:
        _select(layer, name, kept)
    for name in layer.router._tensors():
        _select(layer.router, name, scored)
    layer.n_experts = len(kept)
    layer.d_ff = layer.n_experts * layer.expert_size
    layer.router.n_experts = len(scored)
    layer.router.load = layer.router.load.new_zeros(layer.router.load_shape)
    if isinstance(layer.router, ReLURouter) and layer.router.active is not None:
        layer.router.active = min(layer.router.active, float(len(scored)))
    if constants is not None:
        new = constants.to(layer.values)
        rows = new if layer.constants is None else torch.cat([layer.constants, new])
        layer.constants = nn.Parameter(rows, requires_grad=layer.values.requires_grad)
        layer.null_experts, layer.null_kind = len(rows), "constant"
    layer._last = None  # routing_stats of experts that are gone


def _select(module: nn.Module, name: str, rows: list[int]) -> None:
    old = getattr(module, name)
    if old is not None:
        new = old.detach()[torch.tensor(rows, device=old.device)]
        is_parameter = isinstance(old, nn.Parameter)
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
